"""What a session runs: the user's model, data, loss and optimizer, checked and put on the device.

Probing, checking and training share one Assembly; where several optimizers take turns, each phase has its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autoaccum.checks import check_seed, is_positive, one_of
from autoaccum.data import tree
from autoaccum.data.alike import data_facts
from autoaccum.data.source import Source, open_source
from autoaccum.errors import SetupError, shown
from autoaccum.loss.objective import Objective
from autoaccum.memory.device import Device, open_device
from autoaccum.model.compiled import Compiled
from autoaccum.model.forward import OwnStatistics
from autoaccum.model.given_model import check_gradients_are_on, device_of, follow, is_lazy, unwrapped
from autoaccum.model.memory_savers import installed, obstacle
from autoaccum.model.optimizer import build_optimizer, check_model
from autoaccum.model.precision import Precision
from autoaccum.model.shards import local, put_on, refuse_for_shards
from autoaccum.model.untouched import Untouched
from autoaccum.ranks import Ranks, here, join
from autoaccum.settings import Settings
from autoaccum.window.agreement import model_facts, optimizer_facts, setting_facts
from autoaccum.window.phase import Phase, check_phases

__all__ = ["GIVE_ALIKE", "Assembly", "assemble"]

GIVE_ALIKE = (
    "Give every rank the same; and all of the data, since each rank takes its own part of every window, and what is "
    "split over the ranks already would be split twice"
)


@dataclass
class Assembly:
    """What is probed, checked and trained, on the device."""

    model: nn.Module
    source: Source
    device: Device
    ranks: Ranks
    objective: Objective
    optimizer: Optimizer
    precision: Precision
    lr_given: bool
    """Whether the learning rate is the user's own, so that a batch it was tuned at means something."""
    asked_precision: str = "auto"
    """As the user gave it; "bf16" once the ladder took it."""
    ladder: str | None = None
    """The rung that the model runs under."""
    compiled: Compiled | None = None
    """The model's compiled forward, where it has one."""
    phase: Phase | None = None
    """The phase that this is of; None where the training has but one optimizer."""
    beside: Sequence[Optimizer] = ()
    """The optimizers of the other phases, whose state stands in memory too."""
    later: "Sequence[Assembly]" = ()
    """Of the phases after this, the first."""

    @property
    def turns(self) -> "list[Assembly]":
        """One for each phase, in order; this one alone where there is but one optimizer."""
        return [self, *self.later]

    def settle(self) -> None:
        """Puts the model on the device, where `assemble` left it where it was."""
        for module in (self.model, self.objective.loss):
            if isinstance(module, nn.Module):
                put_on(self.device.torch_device, module)
        for turn in self.turns:
            follow(turn.optimizer)

    def take(self, rung: str | None) -> None:
        """Everything after this runs under `rung`.

        Raises:
            SetupError: it cannot be taken here.
        """
        if rung is None:
            return
        why = obstacle(rung, self.model, self.device.torch_device, self.asked_precision)
        if why is not None and (rung, self.asked_precision) != ("bf16", "bf16"):
            raise SetupError(f'ladder="{rung}" cannot be taken: {why}')
        self.ladder = rung
        if rung == "bf16":
            self.asked_precision = "bf16"
            self.precision = Precision("bf16", self.device.torch_device, self.model)

    def unfrozen(self) -> AbstractContextManager[None]:
        """The model runs as it is trained inside, with no phase's parameters frozen: each turn sees to that itself."""
        return replace(self, phase=None).running()

    @contextmanager
    def running(self, *, compiled: bool = True, alone: bool = False) -> Iterator[None]:
        """The model runs as it is trained inside: compiled, if it is, and under the rung that was taken. Not beyond.

        `alone`: but for layers that share statistics over ranks, which keep to this rank's. Of several phases all but
        this one's parameters are frozen.
        """
        with ExitStack() as stack:
            if self.phase is not None:
                stack.enter_context(self.phase.alone(self.model))
            if alone:
                for module in self.model.modules():
                    if isinstance(module, nn.SyncBatchNorm):
                        stack.enter_context(OwnStatistics(module))
            if self.compiled is not None and compiled:
                stack.enter_context(self.compiled)
            stack.enter_context(installed(self.ladder, self.model, self.device.torch_device))
            yield

    def agree(self, what: str, val_data: Source | None, settings: dict[str, Any]) -> None:
        """Compares what the ranks must have alike, before anything depends on it; all ranks call this, at `what`.

        Raises:
            SetupError: they differ, and in what; on all ranks.
        """
        if self.ranks.size == 1:
            return
        facts = setting_facts(loss=self.objective.loss, step=self.objective.step, **settings)
        facts |= data_facts("data", self.source) | data_facts("val_data", val_data)
        facts |= model_facts(self.model, self.objective.loss) | optimizer_facts(self.optimizer)
        self.ranks.agree(what, facts, GIVE_ALIKE)

    @torch.no_grad()
    def share_model(self) -> None:
        """Gives every rank rank 0's parameters and buffers, as DistributedDataParallel does; all ranks call this."""
        if self.ranks.size == 1:
            return
        modules = [module for module in (self.model, self.objective.loss) if isinstance(module, nn.Module)]
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        for tensor in (tensor for tensor in tensors if tensor.layout == torch.strided and local(tensor) is tensor):
            self.ranks.broadcast("sharing the model", tensor)


def assemble(model: Any, data: Any, asked: Settings, *, stays: bool = False) -> Assembly:
    """Checks everything first, then puts the model on the device and makes the optimizer.

    The model is untouched when this raises; a lazy module is materialised, and stays so. With `stays` the model is left
    where it is until `Assembly.settle`: a child process is to have the device's memory first.

    Raises:
        SetupError, DataError, DeviceError, LossError: what cannot be trained with, or not so.
    """
    phases = check_phases(asked.phases, loss=asked.loss, step=asked.step, optimizer=asked.optimizer)
    model, first = unwrapped(model), phases[0] if phases else None
    refuse_for_shards(
        model,
        phases=(bool(phases), "train it with one optimizer"),
        compile=(bool(asked.compile), "leave it out"),
        checkpoint=(asked.checkpoint is not None, "save it by torch.distributed.checkpoint yourself"),
    )
    join()
    ranks = here(group=asked.group)
    check_gradients_are_on()
    _check_rate(asked.lr)
    check_seed(asked.seed)
    one_of("shuffle", asked.shuffle, (True, False))
    place = open_device(asked.device if asked.device is not None else device_of(model, ranks))
    source = open_source(data, shuffle=asked.shuffle, seed=asked.seed, worst_case=asked.worst_case, ranks=ranks)
    step, reduction = (asked.step, asked.reduction) if first is None else (first.step, first.reduction)
    objective = Objective(model, loss=asked.loss, step=step, reduction=reduction)
    loss, norms = objective.loss, asked.some("clip_norm", "log_grad_norm")
    lazy = is_lazy(model)
    if not lazy:
        check_model(model, loss=loss, **norms)
        if isinstance(asked.optimizer, Optimizer):
            build_optimizer(asked.optimizer, model, lr=asked.lr, loss=loss)
    precision = Precision(asked.precision, place.torch_device, model)
    for module in (model, loss):
        if isinstance(module, nn.Module) and not stays:
            put_on(place.torch_device, module)
    if lazy:
        _materialise(objective, source, open_device("cpu") if stays else place, precision)
        check_model(model, loss=loss, **norms)
    made = _optimizer(asked, first, model, loss)
    lr_given = _owns_rate(asked, first)
    parts = Assembly(model, source, place, ranks, objective, made, precision, lr_given, asked.precision, phase=first)
    parts.later = [_later(parts, asked, phase) for phase in phases[1:]]
    for turn in parts.turns:
        turn.beside = [other.optimizer for other in parts.turns if other is not turn]
    return parts


def _optimizer(asked: Settings, phase: Phase | None, model: nn.Module, loss: Any) -> Optimizer:
    if phase is not None:
        made = phase.build_optimizer(model, loss, asked.lr)
    else:
        made = build_optimizer(asked.optimizer, model, lr=asked.lr, loss=loss)
    follow(made)
    return made


def _owns_rate(asked: Settings, phase: Phase | None) -> bool:
    return asked.lr is not None or (isinstance(asked.optimizer, Optimizer) if phase is None else phase.owns_rate)


def _later(first: Assembly, asked: Settings, phase: Phase) -> Assembly:
    """Of a later phase, which shares model and data with the first."""
    objective = Objective(first.model, step=phase.step, reduction=phase.reduction)
    return replace(
        first, objective=objective, optimizer=_optimizer(asked, phase, first.model, objective.loss), phase=phase,
        lr_given=_owns_rate(asked, phase),
        precision=Precision(first.asked_precision, first.device.torch_device, first.model),
    )  # fmt: skip


def _check_rate(lr: Any) -> None:
    if lr is not None and not (isinstance(lr, (int, float)) and is_positive(lr) and lr < float("inf")):
        raise SetupError(f"lr={shown(lr)} is not a learning rate: give a number above 0, such as 1e-3")


def _materialise(objective: Objective, source: Source, device: Device, precision: Precision) -> None:
    """Runs one small forward, so that lazy parameters take their shapes; statistics and generators stay as they are."""
    with Untouched(objective.model, device=device.torch_device), torch.no_grad(), precision.autocast():
        objective.model.eval()
        objective.forward(tree.move(source.trial(2), device.torch_device))
