"""The public functions: wiring only. What each keyword means is said once, at `prepare`."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from autoaccum.assembly import Parts, agreed, assemble, share_model
from autoaccum.checking.verify import VerifyReport
from autoaccum.checks import check_counts, check_switches, listed, one_of
from autoaccum.data.source import open_source, read_more_than_once
from autoaccum.interrupts import uninterrupted
from autoaccum.memory.device import check_memory
from autoaccum.memory.forecast import Forecast
from autoaccum.model.memory_savers import RUNGS
from autoaccum.model.optimizer import check_no_gradient, trained_parameters
from autoaccum.phased import checked_phases, for_phase, probed_phases, ready_to_train
from autoaccum.pipeline import (
    Isolation,
    adopt,
    beside_own_rate,
    check_arithmetic,
    compile_model,
    for_ranks,
    given_plan,
    planned,
    share_of,
    target_of,
    told_of_padding,
    told_of_the_plans,
    total_steps,
    verified,
)
from autoaccum.planning.plan import Plan, plan
from autoaccum.probing.cache import Lines
from autoaccum.probing.isolate import InChild, Send
from autoaccum.probing.length_search import OverLengths
from autoaccum.probing.outcome import Trial
from autoaccum.probing.over_ranks import shared_out
from autoaccum.probing.probe import Question, as_lines
from autoaccum.probing.report import ProbeReport
from autoaccum.ranks import Ranks, ends_all
from autoaccum.training.evaluate import Evaluator, check_metrics
from autoaccum.training.events import Event, Events, Listener, Noted, TrialRan
from autoaccum.training.loop import FitResult, TrainingLoop
from autoaccum.training.parts import kept_answers
from autoaccum.training.rates import take_back
from autoaccum.training.run_folder import open_run
from autoaccum.training.schedule import check_schedule
from autoaccum.window.phase import Phase, check_phases

__all__ = ["fit", "plan", "prepare", "probe", "verify"]

P = ParamSpec("P")
R = TypeVar("R")

READ_AWAY = (
    "the data can be read only once, and the samples that this probe read are gone with it: give it an iterable of its "
    "own; fit and prepare train on what their probe reads"
)


@uninterrupted
def probe(
    model: nn.Module,
    data: Any,
    *,
    target_batch: int | None = None,
    loss: Any = None,
    step: Callable[[nn.Module, Any], Any] | None = None,
    phases: Sequence[Phase] | None = None,
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
    isolate: bool | Callable[[], Mapping[str, Any]] = False,
    cache: bool = True,
    compile: bool = False,
    ladder: str | bool | None = None,
    on_nonfinite: str = "raise",
    seed: int | None = None,
    progress: bool | None = None,
    callbacks: Iterable[Listener] = (),
    group: Any = None,
) -> ProbeReport:
    """The largest micro-batch that fits, or the one that `target_batch` needs; nothing else is changed by asking.

    The keywords are those of `prepare`. With a target, the report's `plan` is the plan for it. Of data that can be read
    only once some samples are read for good, which a note says: `prepare` and `fit` lose nothing. The model is moved to
    the device, unless a child process probes; lazy modules are materialised.

    Raises:
        NothingFitsError, DeviceError, SetupError, DataError, LossError, PlanError: as `prepare`.
    """
    together = target_batch is not None or ladder == "auto"  # else each rank asks for itself
    with ends_all(together, group):
        check_counts(target_batch=target_batch, max_batch=max_batch, multiple_of=multiple_of)
        _check_choices(prefer, ladder, memory, cache=cache, compile=compile)
        parts = assemble(
            model, data, loss=loss, step=step, reduction=reduction, optimizer=optimizer, lr=lr, device=device,
            precision=precision, clip_norm=clip_norm, seed=seed, worst_case=worst_case,
            stays=_in_a_child(isolate), phases=check_phases(phases, loss=loss, step=step, optimizer=optimizer),
            group=group,
        )  # fmt: skip
        check_arithmetic(parts, lr_batch=lr_batch, lr_rule=lr_rule, batch_norm=batch_norm, tail=tail)
        if together:
            agreed(parts, "probe", target_batch=target_batch, multiple_of=multiple_of, tail=tail, ladder=ladder,
                   batch_norm=batch_norm, lr_batch=lr_batch, lr_rule=lr_rule)  # fmt: skip
        share = None if target_batch is None else share_of(target_batch, parts.source.length, parts.ranks)
        question = Question(share, memory, max_batch, multiple_of, prefer)
        events = Events([*listed("callbacks", callbacks), *display(progress, parts.ranks)])
        _run_as_asked(parts, compile, ladder, events)
        report = _probed(
            parts, question, target_batch, events=events, isolation=_isolation(isolate), cache=cache, ladder=ladder,
            accumulate=accumulate, clip_norm=clip_norm, batch_norm=batch_norm, on_nonfinite=on_nonfinite,
        )  # fmt: skip
        reads_away = parts.source.one_shot and worst_case is None
        if reads_away and not _in_a_child(isolate):
            report = replace(report, notes=(*report.notes, READ_AWAY))
        if target_batch is None:
            return report
        made = planned(parts, report, None, target_batch, lr_batch=lr_batch, lr_rule=lr_rule, batch_norm=batch_norm,
                     tail=tail, multiple_of=multiple_of, settles=not (reads_away and _in_a_child(isolate)))  # fmt: skip
        return replace(report, plan=made)


def _probed(parts: Parts, question: Question, target_batch: int | None, **settings: Any) -> ProbeReport:
    """The probe of all phases, its answer shared over ranks with unequal memory."""
    look = functools.partial(probed_phases, parts, **settings)
    return shared_out(look, question, parts.ranks, target_batch, parts.source.length)


def _on_all_ranks(function: Callable[P, R]) -> Callable[P, R]:
    """An error on one rank ends the function on all."""

    @functools.wraps(function)
    def called(*arguments: P.args, **keywords: P.kwargs) -> R:
        with ends_all(group=keywords.get("group")):
            return function(*arguments, **keywords)

    return called


@uninterrupted
@_on_all_ranks
def prepare(
    model: nn.Module,
    data: Any,
    *,
    target_batch: int | None = None,
    loss: Any = None,
    step: Callable[[nn.Module, Any], Any] | None = None,
    phases: Sequence[Phase] | None = None,
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
    metrics: Mapping[str, Any] | None = None,
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
    isolate: bool | Callable[[], Mapping[str, Any]] = False,
    cache: bool = True,
    check: bool | str = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool | str = "auto",
    compile: bool = False,
    ladder: str | bool | None = None,
    regrow_after: int | None = None,
    on_nonfinite: str = "raise",
    seed: int | None = None,
    progress: bool | None = None,
    sinks: Iterable[Listener] = (),
    callbacks: Iterable[Listener] = (),
    group: Any = None,
) -> TrainingLoop:
    """The configured training loop: probed, planned, verified, not yet begun. Iterate it, or call `run()`.

    Args:
        model: any module; moved to the device. DistributedDataParallel is taken off: gradients are summed once a
            window. Submodules in evaluation mode inside a model in training mode are frozen, and stay so.
        data: a DataLoader (its dataset, sampler, collate_fn and workers are kept, the batching is ours), a Dataset, an
            iterable of samples, a tensor, a tuple or a dict of equally long tensors. Where the collate function pads
            samples of different lengths, each window is sorted and cut by length: short ones run many at once.
        target_batch: samples per optimizer step, over all ranks.
        loss: `f(outputs, targets)`; None: the model returns its loss.
        step: `f(model, batch) -> Tensor | Mean | dict[str, Mean]`, instead of `loss`; or a Coupled one, whose loss
            compares samples.
        phases: a list of Phase, instead of `step`, `loss` and `optimizer`: several optimizers that take turns over the
            same samples. Validation runs the first one's step.
        reduction: what a mean loss divides by: "auto", "sample_mean", "token_mean", "weighted_mean", "element_mean",
            "sum", "coupled" (`loss` compares samples), or `f(batch) -> float`; a dict of these where `step` returns
            several terms.
        optimizer: an Optimizer, a class or factory called as `f(params, lr=lr)`, or a name in torch.optim. An
            Optimizer's rates are the ones it was tuned with, also where it was trained with here before: they are
            scaled once.
        lr: the learning rate, 1e-3 unless given; not beside an Optimizer instance, whose own count.
        lr_batch: the batch that rate was tuned at; None: a DataLoader's batch_size where the rate is the user's own,
            else the rate is not scaled.
        lr_rule: "auto", "linear", "sqrt", "adam-sde" or "none".
        schedule: "constant", "linear", "cosine" or `f(optimizer) -> LRScheduler`, counted in optimizer steps; none that
            wants a loss (ReduceLROnPlateau).
        warmup_steps: optimizer steps over which the rate rises.
        epochs: passes over the data; `max_steps`, where given, decides instead, over as many epochs as it takes.
        val_data: evaluated after each epoch, with `metrics`: `{name: f(outputs, targets) -> Mean}`, not beside `step`.
            A ratio of sums is a Mean: an F1 is Mean(2 * tp, 2 * tp + fp + fn). What is none, such as an average over
            classes or an AUC, is an object with `reset()`, `update(outputs, targets)` and `compute()`, which sees all
            outputs first: torchmetrics are.
        shuffle: for Datasets and tensors; a DataLoader keeps its own sampler.
        device: None: where the model is, if that is a GPU, else the best there is.
        memory: a hard budget: bytes, "8GiB" or "80%" of the device; None: what is free, less headroom.
        precision: "auto" (bf16 autocast where native), "fp32" (the model's own dtype), "bf16" or "fp16".
        accumulate: "fp32" (16-bit gradients are summed in fp32) or "native".
        clip_norm: the largest norm of the whole window's gradient; `log_grad_norm` records the norm without clipping.
        batch_norm: "pooled" (running statistics as the large batch would leave them), "momentum" or "keep".
        tail: "step" (a short last window steps with its true denominator) or "drop".
        prefer: the "fewest" micro-batches, or the "fastest" by measured throughput.
        micro_batch: use this and skip the probe; samples of all lengths then run so many at once.
        plan: a Plan or its file: skip the probe and the arithmetic.
        multiple_of: prefer such micro-batches where that costs no extra one.
        worst_case: a batch, or `f(n) -> batch`, to probe with.
        max_batch: no micro-batch is larger.
        isolate: probe in a child process, which a kill for memory may take: a picklable function that returns these
            arguments as a dict, since the child builds a model of its own.
        cache: reuse what an earlier probe of the same training found, and keep what this one finds.
        check: verify the accumulated gradient before training: True, "warn" or False.
        checkpoint: a folder for checkpoints and the run's record. A run that ends early, however that comes, goes on
            from there when it is started again in the same way, without probing, to the same result.
        checkpoint_every: optimizer steps between checkpoints; None: at the end of each epoch, and every ten minutes.
        resume: "auto" goes on where there is something to go on from, True insists on it, False starts anew.
        compile: run the model's forward through torch.compile while it trains: one graph for all batch sizes. Each
            compilation is noted with its time, and so is what falls back to running as it is.
        ladder: what is done when not even one sample fits: "chunked_loss", "bf16" (where precision is "auto"),
            "checkpointing", "checkpointing/2" of each second block, "selective_checkpointing", "save_on_cpu", or two of
            them with a plus. None: each is tried with one sample, and the error says which would fit; "auto": the first
            that fits is taken; one of these names: it is taken in any case; False: none is tried.
        regrow_after: undisturbed windows after which a micro-batch that was halved is tried again; None: never.
        on_nonfinite: "raise" or "skip" windows whose loss is not finite.
        seed: of shuffling and of what is random in training.
        progress: draw a progress bar; None: on a terminal.
        sinks, callbacks: functions of an event.
        group: the ranks that train together, a process group of torch.distributed's; None: all of them.

    Raises:
        NothingFitsError: not even the smallest micro-batch fits.
        PlanError: a target that cannot be cut, with the nearest that can.
        SetupError: a model, optimizer or setting that cannot be trained with.
        LossError: a loss that is not a finite scalar with a graph, or whose gradient check failed.
        DataError: data that is empty, or whose parts disagree.
        DeviceError: no such device.
        CheckpointError: what is in the folder is of another training, or has code in it.
    """
    given = None if plan is None else given_plan(plan, target_batch)
    target_batch = target_of(given, target_batch)
    check_counts(max_batch=max_batch, micro_batch=micro_batch, epochs=epochs, max_steps=max_steps,
                 multiple_of=multiple_of, checkpoint_every=checkpoint_every, regrow_after=regrow_after)  # fmt: skip
    listeners = [*listed("sinks", sinks), *listed("callbacks", callbacks)]
    _check_training(check, resume, schedule, warmup_steps)
    _check_choices(prefer, ladder, memory, cache=cache, compile=compile, log_grad_norm=log_grad_norm)
    check_metrics(metrics, step, val_data=None if loss is None else val_data)
    if given is not None and given.lr is not None and lr is None and not isinstance(optimizer, Optimizer):
        lr = given.lr / given.lr_scale
    parts = assemble(
        model, data, loss=loss, step=step, reduction=reduction, optimizer=optimizer, lr=lr, device=device,
        precision=precision, clip_norm=clip_norm, log_grad_norm=log_grad_norm, shuffle=shuffle, seed=seed,
        worst_case=worst_case, stays=_in_a_child(isolate), group=group,
        phases=check_phases(phases, loss=loss, step=step, optimizer=optimizer),
    )  # fmt: skip
    check_no_gradient(trained_parameters(parts.model, loss))
    for turn in parts.turns:
        take_back(turn.optimizer)
    check_arithmetic(parts, lr_batch=lr_batch, lr_rule=lr_rule, batch_norm=batch_norm, tail=tail)
    if given is not None:
        given = for_ranks(given, parts.ranks)
    val_source = None if val_data is None else open_source(val_data, shuffle=False, ranks=parts.ranks)
    read_more_than_once(epochs if max_steps is None else 1, data=parts.source, val_data=val_source)
    agreed(
        parts, "prepare", val_source, target_batch=target_batch, reduction=reduction, lr_batch=lr_batch,
        lr_rule=lr_rule, schedule=schedule, warmup_steps=warmup_steps, epochs=epochs, max_steps=max_steps,
        metrics=sorted(metrics or {}), shuffle=shuffle, precision=precision, accumulate=accumulate,
        clip_norm=clip_norm, log_grad_norm=log_grad_norm, batch_norm=batch_norm, tail=tail, multiple_of=multiple_of,
        check=check, checkpoint="none" if checkpoint is None else "given", checkpoint_every=checkpoint_every,
        resume=resume, compile=compile, ladder=ladder, regrow_after=regrow_after, on_nonfinite=on_nonfinite,
        seed=seed, plan="none" if plan is None else "given", micro_batch="none" if micro_batch is None else "given",
    )  # fmt: skip
    _settle(parts, when=not _in_a_child(isolate))
    events = Events([*listeners, *display(progress, parts.ranks)])
    _run_as_asked(parts, compile, ladder, events)

    report: ProbeReport | None = None
    verdict: VerifyReport | None = None
    folder, kept = open_run(checkpoint, checkpoint_every, resume, parts.ranks, events)
    if kept is not None:
        given, report, verdict = kept_answers(kept, target_batch, parts.ranks)
    if given is not None:
        adopt(parts, given, events)
        given = beside_own_rate(given, parts) if kept is None else given
        told_of_the_plans(
            given, events, micro_batch=micro_batch, lr_batch=lr_batch, lr_rule=lr_rule, tail=tail,
            batch_norm=batch_norm, prefer=prefer, multiple_of=multiple_of, max_batch=max_batch,
        )  # fmt: skip
    if given is None and micro_batch is None:
        question = Question(
            share_of(target_batch, parts.source.length, parts.ranks), memory, max_batch, multiple_of, prefer
        )
        report = _probed(
            parts, question, target_batch, events=events, isolation=_isolation(isolate), cache=cache, ladder=ladder,
            accumulate=accumulate, clip_norm=clip_norm, batch_norm=batch_norm, on_nonfinite=on_nonfinite,
        )  # fmt: skip
    _settle(parts, when=_in_a_child(isolate))  # which had the device's memory to itself so far
    if given is None:
        given = planned(parts, report, micro_batch, target_batch, lr_batch=lr_batch, lr_rule=lr_rule,
                        batch_norm=batch_norm, tail=tail, multiple_of=multiple_of)  # fmt: skip
    if kept is None:
        verdict = checked_phases(parts, check, given, events)
        told_of_padding(parts, given, check, events)
    if parts.compiled is not None:
        parts.compiled.single = given.micro_batch <= 1
    total = total_steps(given, parts.source.length, epochs, max_steps)
    accumulators = [
        ready_to_train(
            turn, given if turn is parts else for_phase(turn, given, lr_rule), total, events, schedule=schedule,
            warmup_steps=warmup_steps, accumulate=accumulate, clip_norm=clip_norm, log_grad_norm=log_grad_norm,
            on_nonfinite=on_nonfinite,
        )
        for turn in parts.turns
    ]  # fmt: skip
    accumulator = accumulators[0]
    evaluator = Evaluator(
        parts.objective,
        parts.device,
        accumulator.precision,
        parts.ranks,
        max(given.micro_batch, 1),
        val_source,
        metrics or {},
    )
    loop = TrainingLoop(
        accumulator, parts.source, parts.device, epochs=epochs, max_steps=max_steps, total_steps=total,
        budget=parts.device.budget(memory, headroom=parts.device.headroom()), events=events, evaluator=evaluator,
        probe=report, verify=verdict,
        regrow_after=regrow_after, seed=seed, shuffle=shuffle, folder=folder,
        running=parts.unfrozen, phases=[(turn.phase, each) for turn, each in zip(parts.turns, accumulators)],
    )  # fmt: skip
    if kept is not None:
        loop.load_state_dict(kept)
    parts.ranks.tally("the end of prepare")  # whoever failed on the way here is heard by all
    return loop


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


@uninterrupted
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
    return verified(parts)


def _check_choices(prefer: str, ladder: str | bool | None, memory: int | str | None, **switches: bool) -> None:
    one_of("prefer", prefer, ("fewest", "fastest"))
    one_of("ladder", ladder, (None, False, "auto", *RUNGS))
    check_switches(**switches)
    check_memory(memory)


def _check_training(check: Any, resume: Any, schedule: Any, warmup_steps: Any) -> None:
    one_of("check", check, (True, False, "warn"))
    one_of("resume", resume, ("auto", True, False))
    check_schedule(schedule, warmup_steps)


def _run_as_asked(parts: Parts, compile: bool, ladder: str | bool | None, events: Events) -> None:
    if compile:
        compile_model(parts, events)
    if isinstance(ladder, str) and ladder != "auto":
        parts.take(ladder)


def _settle(parts: Parts, *, when: bool) -> None:
    if when:
        parts.settle()
        share_model(parts)


def _in_a_child(isolate: Any) -> bool:
    return isinstance(_isolation(isolate), Isolation)


def _isolation(isolate: bool | Callable[[], Mapping[str, Any]] | InChild) -> Isolation | InChild | None:
    if isinstance(isolate, InChild):
        return isolate
    return Isolation(_child_probe, isolate) if isolate else None


def _child_probe(
    send: Send, factory: Callable[[], Mapping[str, Any]], asked: Mapping[str, Any], killed: list[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the child does: builds everything anew and probes; each trial is sent as it ends."""
    os.environ["WORLD_SIZE"] = "1"  # of several ranks each has a child of its own, which answers for its device alone
    arguments: dict[str, Any] = {
        name: value for name, value in factory().items() if name in inspect.signature(probe).parameters
    }
    arguments.update(asked, isolate=InChild(send), callbacks=[lambda event: _heard(event, send)], progress=False)
    report = probe(**arguments)
    lines = report.forecaster
    if isinstance(lines, (Forecast, OverLengths)):
        lines = as_lines(lines, report.trials)
    trials = (*(Trial(**trial) for trial in killed), *report.trials)
    notes = tuple(note for note in report.notes if note != READ_AWAY)  # the parent's samples are all there
    report = replace(report, trials=trials, notes=notes)
    return {"report": report.to_dict(), "lines": asdict(lines) if isinstance(lines, Lines) else None}


def _heard(event: Event, send: Send) -> None:
    if isinstance(event, TrialRan):
        send("trial", event.trial)
    elif isinstance(event, Noted):
        send("note", event.text)


def display(progress: bool | None, ranks: Ranks, *, bar: bool = True) -> list[Listener]:
    """Who shows a person what happens: on the first rank, where `progress` or a terminal asks for it."""
    if ranks.rank != 0 or not (sys.stderr.isatty() if progress is None else progress):
        return []
    from autoaccum.display.narrator import Narrator

    return [Narrator(bar=bar)]
