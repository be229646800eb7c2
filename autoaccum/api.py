"""The public functions: wiring only. What each keyword means is said once, at `prepare`."""

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from autoaccum.assembly import Parts, assemble
from autoaccum.data.source import open_source
from autoaccum.errors import LossError, PlanError, SetupError
from autoaccum.planning.plan import Plan, plan
from autoaccum.planning.reasons import format_sizes
from autoaccum.probing.probe import Question, run_probe
from autoaccum.probing.report import ProbeReport
from autoaccum.ranks import Ranks
from autoaccum.training.evaluate import Evaluator
from autoaccum.training.events import Events, Listener, Noted, TrialRan
from autoaccum.training.loop import FitResult, TrainingLoop
from autoaccum.training.schedule import build_schedule
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.loss import Mean
from autoaccum.window.verify import VerifyReport, verify_gradient

__all__ = ["fit", "plan", "prepare", "probe", "verify"]

P = ParamSpec("P")
R = TypeVar("R")


def probe(
    model: nn.Module,
    data: Any,
    *,
    target_batch: int | None = None,
    loss: Any = None,
    step: Callable[[nn.Module, Any], Any] | None = None,
    reduction: Any = "auto",
    optimizer: str | Optimizer | Callable[..., Optimizer] = "adamw",
    lr: float | None = None,
    lr_batch: int | None = None,
    lr_rule: str = "auto",
    device: str | torch.device | None = None,
    memory: int | str | None = None,
    precision: str = "auto",
    accumulate: str = "fp32",
    clip_norm: float | None = None,
    batch_norm: str = "pooled",
    tail: str = "step",
    prefer: str = "fewest",
    multiple_of: int = 1,
    worst_case: Any = None,
    max_batch: int | None = None,
    seed: int | None = None,
    callbacks: Iterable[Listener] = (),
) -> ProbeReport:
    """The largest micro-batch that fits, or the one that `target_batch` needs; nothing else is changed by asking.

    The keywords are those of `prepare`. With a target, the report's `plan` is the plan for it. The model is moved to the
    device; lazy modules are materialised.

    Raises:
        NothingFitsError, DeviceError, SetupError, DataError, LossError, PlanError: as `prepare`.
    """
    _check_counts(target_batch=target_batch, max_batch=max_batch)
    _choose("prefer", prefer, ("fewest", "fastest"))
    parts = assemble(
        model, data, loss=loss, step=step, reduction=reduction, optimizer=optimizer, lr=lr, device=device,
        precision=precision, clip_norm=clip_norm, seed=seed, worst_case=worst_case,
    )  # fmt: skip
    share = None if target_batch is None else _share(target_batch, parts.ranks)
    question = Question(share, memory, max_batch, multiple_of, prefer)
    events = Events(callbacks)
    report = _probe(parts, question, accumulate, clip_norm, batch_norm, events)
    if target_batch is None:
        return report
    made = _plan(parts, report, None, target_batch, lr_batch=lr_batch, lr_rule=lr_rule, batch_norm=batch_norm,
                 tail=tail, multiple_of=multiple_of)  # fmt: skip
    return replace(report, plan=made)


def prepare(
    model: nn.Module,
    data: Any,
    *,
    target_batch: int | None = None,
    loss: Any = None,
    step: Callable[[nn.Module, Any], Any] | None = None,
    reduction: Any = "auto",
    optimizer: str | Optimizer | Callable[..., Optimizer] = "adamw",
    lr: float | None = None,
    lr_batch: int | None = None,
    lr_rule: str = "auto",
    schedule: str | Callable[[Optimizer], Any] = "constant",
    warmup_steps: int = 0,
    epochs: int = 1,
    max_steps: int | None = None,
    val_data: Any = None,
    metrics: Mapping[str, Callable[[Any, Any], Mean]] | None = None,
    shuffle: bool = True,
    device: str | torch.device | None = None,
    memory: int | str | None = None,
    precision: str = "auto",
    accumulate: str = "fp32",
    clip_norm: float | None = None,
    log_grad_norm: bool = False,
    batch_norm: str = "pooled",
    tail: str = "step",
    prefer: str = "fewest",
    micro_batch: int | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    multiple_of: int = 1,
    worst_case: Any = None,
    max_batch: int | None = None,
    check: bool | str = True,
    regrow_after: int | None = None,
    on_nonfinite: str = "raise",
    seed: int | None = None,
    progress: bool | None = None,
    sinks: Iterable[Listener] = (),
    callbacks: Iterable[Listener] = (),
) -> TrainingLoop:
    """The configured training loop: probed, planned, verified, not yet begun. Iterate it, or call `run()`.

    Args:
        model: any module; moved to the device. DistributedDataParallel is taken off: gradients are summed once a window.
        data: a DataLoader (its dataset, sampler, collate_fn and workers are kept, the batching is ours), a Dataset, an
            iterable of samples, a tensor, a tuple or a dict of equally long tensors.
        target_batch: samples per optimizer step, over all ranks.
        loss: `f(outputs, targets)`; None: the model returns its loss.
        step: `f(model, batch) -> Tensor | Mean | dict[str, Mean]`, instead of `loss`.
        reduction: what a mean loss divides by: "auto", "sample_mean", "token_mean", "weighted_mean", "element_mean",
            "sum", or `f(batch) -> float`; a dict of these where `step` returns several terms.
        optimizer: an Optimizer, a class or factory called as `f(params, lr=lr)`, or a name in torch.optim.
        lr: the learning rate, 1e-3 unless given; not beside an Optimizer instance, whose own count.
        lr_batch: the batch that rate was tuned at; None: a DataLoader's batch_size where the rate is the user's own, else
            the rate is not scaled.
        lr_rule: "auto", "linear", "sqrt", "adam-sde" or "none".
        schedule: "constant", "linear", "cosine" or `f(optimizer) -> LRScheduler`, counted in optimizer steps.
        warmup_steps: optimizer steps over which the rate rises.
        epochs: passes over the data; `max_steps`, where given, decides instead, over as many epochs as it takes.
        val_data: evaluated after each epoch, with `metrics`: `{name: f(outputs, targets) -> Mean}`.
        shuffle: for Datasets and tensors; a DataLoader keeps its own sampler.
        device: None: where the model is, if that is a GPU, else the best there is.
        memory: a hard budget: bytes, "8GiB" or "80%" of the device; None: what is free, less headroom.
        precision: "auto" (bf16 autocast where native), "fp32" (the model's own dtype), "bf16" or "fp16".
        accumulate: "fp32" (16-bit gradients are summed in fp32) or "native".
        clip_norm: the largest norm of the whole window's gradient; `log_grad_norm` records the norm without clipping.
        batch_norm: "pooled" (running statistics as the large batch would leave them), "momentum" or "keep".
        tail: "step" (a short last window steps with its true denominator) or "drop".
        prefer: the "fewest" micro-batches, or the "fastest" by measured throughput.
        micro_batch: use this and skip the probe.
        plan: a Plan or its file: skip the probe and the arithmetic.
        multiple_of: prefer such micro-batches where that costs no extra one.
        worst_case: a batch, or `f(n) -> batch`, to probe with.
        max_batch: no micro-batch is larger.
        check: verify the accumulated gradient before training: True, "warn" or False.
        regrow_after: undisturbed windows after which a micro-batch that was halved is tried again; None: never.
        on_nonfinite: "raise" or "skip" windows whose loss is not finite.
        seed: of shuffling and of what is random in training.
        progress: draw a progress bar; None: on a terminal.
        sinks, callbacks: functions of an event.

    Raises:
        NothingFitsError: not even the smallest micro-batch fits.
        PlanError: a target that cannot be cut, with the nearest that can.
        SetupError: a model, optimizer or setting that cannot be trained with.
        LossError: a loss that is not a finite scalar with a graph, or whose gradient check failed.
        DataError: data that is empty, or whose parts disagree.
        DeviceError: no such device.
    """
    given = None if plan is None else _given_plan(plan, target_batch)
    target_batch = _target(given, target_batch)
    _check_counts(max_batch=max_batch, micro_batch=micro_batch, epochs=epochs, max_steps=max_steps)
    _choose("check", check, (True, False, "warn"))
    _choose("prefer", prefer, ("fewest", "fastest"))
    if given is not None and given.lr is not None and lr is None and not isinstance(optimizer, Optimizer):
        lr = given.lr / given.lr_scale
    parts = assemble(
        model, data, loss=loss, step=step, reduction=reduction, optimizer=optimizer, lr=lr, device=device,
        precision=precision, clip_norm=clip_norm, shuffle=shuffle, seed=seed, worst_case=worst_case,
    )  # fmt: skip
    if given is not None:
        given = _for_ranks(given, parts.ranks)
    val_source = None if val_data is None else open_source(val_data, shuffle=False)
    events = Events([*sinks, *callbacks, *_display(progress, parts.ranks)])

    report: ProbeReport | None = None
    if given is None and micro_batch is None:
        question = Question(_share(target_batch, parts.ranks), memory, max_batch, multiple_of, prefer)
        report = _probe(parts, question, accumulate, clip_norm, batch_norm, events)
    if given is None:
        given = _plan(parts, report, micro_batch, target_batch, lr_batch=lr_batch, lr_rule=lr_rule, batch_norm=batch_norm,
                      tail=tail, multiple_of=multiple_of)  # fmt: skip
    checked = _verify(parts, check, events)
    _apply(given, parts.optimizer)
    total = _total_steps(given, parts.source.length, epochs, max_steps)
    scheduler = build_schedule(schedule, parts.optimizer, warmup_steps=warmup_steps, total_steps=total)
    accumulator = Accumulator(
        parts.model, parts.optimizer, given, objective=parts.objective, scheduler=scheduler, precision=precision,
        accumulate=accumulate, clip_norm=clip_norm, log_grad_norm=log_grad_norm, batch_norm=batch_norm,
        on_nonfinite=on_nonfinite, device=parts.device.torch_device, ranks=parts.ranks,
    )  # fmt: skip
    evaluator = Evaluator(
        parts.objective,
        parts.device,
        accumulator.precision,
        parts.ranks,
        max(given.micro_batch, 1),
        val_source,
        metrics or {},
    )
    return TrainingLoop(
        accumulator, parts.source, parts.device, epochs=epochs, max_steps=max_steps, total_steps=total,
        budget=parts.device.budget(memory), events=events, evaluator=evaluator, probe=report, verify=checked,
        regrow_after=regrow_after, seed=seed,
    )  # fmt: skip


def _as(source: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Gives a function the signature of another, for people, editors and type checkers."""

    def named(function: Callable[..., R]) -> Callable[P, R]:
        signature = inspect.signature(source)
        returns = inspect.signature(function).return_annotation
        function.__signature__ = signature.replace(return_annotation=returns)  # type: ignore[attr-defined]
        return function

    return named


@_as(prepare)
def fit(*arguments: Any, **keywords: Any) -> FitResult:
    """Trains: `prepare(...)` with the same arguments, then `run()`."""
    return prepare(*arguments, **keywords).run()


def verify(
    model: nn.Module,
    data: Any,
    *,
    loss: Any = None,
    step: Callable[[nn.Module, Any], Any] | None = None,
    reduction: Any = "auto",
    device: str | torch.device | None = None,
    precision: str = "auto",
    worst_case: Any = None,
) -> VerifyReport:
    """Whether the gradient accumulated over micro-batches is the large batch's, on this model and this data.

    About four small steps; no optimizer is stepped and everything is put back. The keywords are those of `prepare`.

    Raises:
        LossError: the loss is not a scalar with a graph.
        SetupError, DataError, DeviceError: as `prepare`.
    """
    parts = assemble(model, data, loss=loss, step=step, reduction=reduction, device=device, precision=precision,
                     worst_case=worst_case)  # fmt: skip
    return _verified(parts)


def _verified(parts: Parts) -> VerifyReport:
    size = 8 if parts.source.length is None else min(8, parts.source.length)
    return verify_gradient(
        parts.model,
        parts.objective,
        parts.source.trial(size),
        device=parts.device.torch_device,
        precision=parts.precision.name,
    )


def _verify(parts: Parts, check: bool | str, events: Events) -> VerifyReport | None:
    if check is False:
        return None
    report = _verified(parts)
    if not report.ok and check != "warn":
        raise LossError(f'{report.text}; check="warn" trains all the same')
    if not report.ok or not report.verifiable:
        events.tell(Noted(report.text))
    return report


def _probe(
    parts: Parts, question: Question, accumulate: str, clip_norm: float | None, batch_norm: str, events: Events
) -> ProbeReport:
    alone = Ranks()  # a trial waits for nobody: each rank probes its own device
    first = plan(1, 1, optimizer=parts.optimizer, batch_norm=batch_norm)
    accumulator = Accumulator(
        parts.model, parts.optimizer, first, objective=parts.objective, precision=parts.precision.name,
        accumulate=accumulate, clip_norm=clip_norm, batch_norm=batch_norm, device=parts.device.torch_device, ranks=alone,
    )  # fmt: skip
    return run_probe(
        accumulator, parts.objective, parts.source, parts.device, question,
        listener=lambda trial: events.tell(TrialRan(trial.to_dict())),
    )  # fmt: skip


def _plan(
    parts: Parts, report: ProbeReport | None, micro_batch: int | None, target_batch: int, *, lr_batch: int | None,
    lr_rule: str, batch_norm: str, tail: str, multiple_of: int,
) -> Plan:  # fmt: skip
    """The plan over all ranks; each rank's limit is the micro-batch that it has run, or was given."""
    layers = [module for module in parts.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    reasons = _reasons(parts, report)
    if lr_batch is None and parts.lr_given and parts.source.loader_batch is not None:
        lr_batch = parts.source.loader_batch
        reasons["lr_batch"] = f"{lr_batch}: the DataLoader's batch_size, since the rate given was tuned at it"
    if parts.source.drop_last:
        tail = "drop"
    size = report.micro_batch if report is not None else micro_batch or target_batch
    made = plan(
        parts.ranks.gather(size), target_batch, world_size=parts.ranks.size, rank=parts.ranks.rank,
        samples=parts.source.length, optimizer=parts.optimizer, lr_batch=lr_batch, lr_rule=lr_rule,
        batch_norm=batch_norm, batch_norm_layers=len(layers), bn_momentum=layers[0].momentum if layers else None,
        minimum=report.floor if report is not None else 1, multiple_of=multiple_of, tail=tail, reasons=reasons,
    )  # fmt: skip
    return _explained(made, report)


def _reasons(parts: Parts, report: ProbeReport | None) -> dict[str, str]:
    reasons = {"denominator": parts.objective.reason, "precision": parts.precision.reason}
    if report is None:
        return reasons
    reasons["budget"] = report.budget_reason
    if report.limit is not None:
        proof = {
            "forecast": f"{report.limit + 1} is forecast to overrun the budget",
            "out of memory": f"{report.limit + 1} ran out of memory",
            "cap": "nothing larger was looked for",
        }
        reasons["limit"] = f"{report.limit} samples fit at once; {proof[report.limit_proof or 'cap']}"
    return reasons


def _explained(made: Plan, report: ProbeReport | None) -> Plan:
    """The plan with the probe's own words on the micro-batch: what was run is below what would fit."""
    if report is None:
        return made
    count, sizes = made.accumulation_steps, format_sizes(made.micro_batches)
    most = f"{report.limit} samples fit at once" if report.limit is not None else f"{report.micro_batch} samples fit"
    why = "measured to be the fastest" if report.throughput else f"the fewest that fit, since at most {most}"
    several = f"{count} micro-batch{'es' if count > 1 else ''} of {sizes}"
    return replace(
        made,
        reasons={
            **made.reasons,
            "micro_batch": f"{made.micro_batch}: was run, and fits in the budget",
            "accumulation_steps": f"{several}: {why}",
        },
    )


def _given_plan(given: Plan | str | os.PathLike[str], target_batch: int | None) -> Plan:
    made = given if isinstance(given, Plan) else Plan.load(given)
    if target_batch is not None and target_batch != made.target_batch:
        raise PlanError(f"target_batch={target_batch}, but the plan given is for {made.target_batch}: give one of them")
    return made


def _target(given: Plan | None, target_batch: int | None) -> int:
    if given is not None:
        return given.target_batch
    if target_batch is None:
        raise PlanError("target_batch is missing: give the samples of one optimizer step, such as target_batch=256")
    _check_counts(target_batch=target_batch)
    return target_batch


def _for_ranks(given: Plan, ranks: Ranks) -> Plan:
    if given.world_size != ranks.size:
        raise PlanError(
            f"the plan given is for {given.world_size} ranks, and there are {ranks.size}: make one for these"
        )
    return given.on_rank(ranks.rank)


def _share(target_batch: int, ranks: Ranks) -> int:
    """The most samples of a window that one of equal ranks takes."""
    return -(-target_batch // ranks.size)


def _apply(made: Plan, optimizer: Optimizer) -> None:
    """Puts the plan's rates and settings into every parameter group alike."""
    for group in optimizer.param_groups:
        group.update(made.group_settings(group))


def _total_steps(made: Plan, length: int | None, epochs: int, max_steps: int | None) -> int | None:
    if max_steps is not None:
        return max_steps
    return None if length is None else sum(1 for _ in made.window_sizes(length)) * epochs


def _display(progress: bool | None, ranks: Ranks) -> list[Listener]:
    if ranks.rank != 0 or not (sys.stderr.isatty() if progress is None else progress):
        return []
    from autoaccum.display.narrator import Narrator

    return [Narrator()]


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise PlanError(f"{name}={value!r}: give a whole number of 1 or more, such as 256")


def _choose(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise SetupError(f"{name}={value!r}: choose {', '.join(map(repr, choices))}")
