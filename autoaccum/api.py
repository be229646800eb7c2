"""The public functions: signatures, what each keyword means, and a few of a Session's steps."""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from autoaccum.checking.verify import VerifyReport
from autoaccum.integrations import trainers
from autoaccum.interrupts import uninterrupted
from autoaccum.model.shards import is_sharded
from autoaccum.planning.plan import Plan
from autoaccum.probing.report import ProbeReport
from autoaccum.ranks import ends_all, ranks_given
from autoaccum.session import Session
from autoaccum.training.events import Listener
from autoaccum.training.fit_result import FitResult
from autoaccum.training.loop import TrainingLoop
from autoaccum.window.phase import Phase

__all__ = ["fit", "prepare", "probe", "verify"]

P = ParamSpec("P")
R = TypeVar("R")


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in ("model", "data")}


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
    device_mesh: Any = None,
) -> ProbeReport:
    """The largest micro-batch that fits, or the one that `target_batch` needs; nothing else is changed by asking.

    The keywords are those of `prepare`. With a target, the report's `plan` is the plan for it. Of data that can be read
    only once some samples are read for good, which a note says: `prepare` and `fit` lose nothing. The model is moved to
    the device, unless a child process probes; lazy modules are materialised.

    Raises:
        NothingFitsError, DeviceError, SetupError, DataError, LossError, PlanError: as `prepare`.
    """
    settings = _settings(locals())
    together = target_batch is not None or ladder == "auto" or is_sharded(model)  # else each rank asks for itself
    with ends_all(together, ranks_given(group, device_mesh)):
        session = Session(model, data, settings, what="probe")
        report = session.probe()
        return report if target_batch is None else replace(report, plan=session.plan())


@uninterrupted
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
    device_mesh: Any = None,
) -> TrainingLoop:
    """The configured training loop: probed, planned, verified, not yet begun. Iterate it, or call `run()`.

    Args:
        model: any module; moved to the device. DistributedDataParallel is taken off: gradients are summed once a
            window. Submodules in evaluation mode inside a model in training mode are frozen, and stay so.
        data: a DataLoader (its dataset, sampler, collate_fn and workers are kept, the batching is ours), a Dataset, an
            iterable of samples, a tensor, a tuple or a dict of equally long tensors. Where the collate function pads
            samples of different lengths, each window is sorted and cut by length: short ones run many at once. A random
            generator that a sampler, dataset, transform or collate function holds is an attribute of it (`.generator`),
            so that a resumed run draws on from it; a dataset or collate function that draws in another way has
            `state_dict()` and `load_state_dict()`, of plain values and tensors.
        target_batch: samples per optimizer step, over all ranks.
        loss: `f(outputs, targets)`; None: the model returns its loss.
        step: `f(model, batch) -> Tensor | Mean | dict[str, Mean]`, instead of `loss`; or a Coupled one, whose loss
            compares samples.
        phases: a list of Phase, instead of `step`, `loss` and `optimizer`: several optimizers that take turns over the
            same samples, each with a reduction, schedule and clipping of its own. Validation runs the first one's step.
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
        isolate: probe in a child process, which a kill for memory may take. True: the child gets copies of these
            arguments, which must be picklable; else a picklable function that returns them as a dict, so that the child
            builds a model of its own.
        cache: reuse what an earlier probe of the same training found, and keep what this one finds.
        check: verify the accumulated gradient before training: True, "warn" or False.
        checkpoint: a folder for checkpoints and the run's record. A run that ends early, however that comes, goes on
            from there when it is started again in the same way, without probing, to the same result.
        checkpoint_every: optimizer steps between checkpoints; None: at the end of each epoch, and every ten minutes.
        resume: "auto" goes on where there is something to go on from, True insists on it, False starts anew.
        compile: run the model's forward through torch.compile while it trains: one graph for all batch sizes. Each
            compilation is noted with its time, and so is what falls back to running as it is.
        ladder: what is done when not even one sample fits: "chunked_loss", "bf16" (where precision is "auto"),
            "checkpointing", "checkpointing/2" of each second block, "selective_checkpointing", "save_on_cpu", two of
            them with a plus, or "activation_memory_budget/0.5" of a compiled model. None: each is tried with one
            sample, and the error says which would fit; "auto": the first that fits is taken; one of these names: it is
            taken in any case; False: none is tried. Two are taken by name only: "optimizer_on_host" (its state travels
            there and back in every step) and "step_in_backward" (each gradient is stepped with and freed as it comes:
            a window is one micro-batch, and memory that runs out after its first step ends the training).
        regrow_after: undisturbed windows after which a micro-batch that was halved is tried again; None: never.
        on_nonfinite: "raise" or "skip" windows whose loss is not finite; "skip" also those with such a gradient.
        seed: of shuffling and of what is random in training.
        progress: draw a progress bar; None: on a terminal.
        sinks, callbacks: functions of an event.
        group: the ranks that train together, a process group of torch.distributed's; None: all of them.
        device_mesh: these ranks as a DeviceMesh, instead of `group`: of one dimension, or all ranks in several that
            are named as those of data parallelism are, such as ("replicate", "shard"). Along a dimension with another
            name, such as "tp" in ("dp", "tp"), ranks have the same samples and train copies of one model.

    Raises:
        NothingFitsError: not even the smallest micro-batch fits.
        PlanError: a target that cannot be cut, with the nearest that can.
        SetupError: a model, optimizer or setting that cannot be trained with.
        LossError: a loss that is not a finite scalar with a graph, or whose gradient check failed.
        DataError: data that is empty, or whose parts disagree.
        DeviceError: no such device.
        CheckpointError: what is in the folder is of another training, or has code in it.
    """
    settings = _settings(locals())
    with ends_all(group=ranks_given(group, device_mesh)):  # an error on one rank ends it on all
        return Session(model, data, settings).loop()


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
    model: Any,
    data: Any = None,
    *,
    loss: Any = None,
    step: Callable[[Any, Any], Any] | None = None,
    reduction: Any = "auto",
    device: Any = None,
    precision: str = "auto",
    worst_case: Any = None,
) -> VerifyReport:
    """Whether the gradient accumulated over micro-batches is the large batch's: of a model, or in a trainer.

    With a model and its data: as autoaccum would accumulate, on this model and this data; about four small steps. The
    keywords are those of `prepare`. With a trainer alone, `verify(trainer)`: that trainer's own accumulation, as it is
    configured, on a few of its own samples; a Lightning Trainer with its module, `verify(trainer, module)`. No
    optimizer is stepped and everything is put back.

    Raises:
        LossError: the loss is not a scalar with a graph.
        SetupError, DataError, DeviceError: as `prepare`; or a trainer that cannot be looked at.
    """
    settings = _settings(locals())
    if trainers.is_trainer(model) or (data is None and not isinstance(model, nn.Module)):
        return trainers.verify(model, data, settings)
    report = Session(model, data, settings, what="verify").check()
    assert report is not None
    return report
