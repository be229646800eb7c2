"""The user's arguments, checked and made into the parts that probing, verifying and training share."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
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
from autoaccum.model.memory_savers import installed, obstacle
from autoaccum.model.optimizer import build_optimizer, check_model
from autoaccum.model.precision import Precision
from autoaccum.model.shards import refuse_for_shards
from autoaccum.model.untouched import Untouched
from autoaccum.ranks import Ranks, here, join
from autoaccum.window.agreement import model_facts, optimizer_facts, setting_facts
from autoaccum.window.phase import Phase

__all__ = ["GIVE_ALIKE", "Parts", "agreed", "assemble", "share_model"]

GIVE_ALIKE = (
    "Give every rank the same; and all of the data, since each rank takes its own part of every window, and what is "
    "split over the ranks already would be split twice"
)


@dataclass
class Parts:
    """What every entry point needs, on the device and checked."""

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
    """The phase that these parts are of; None where the training has but one optimizer."""
    beside: Sequence[Optimizer] = ()
    """The optimizers of the other phases, whose state stands in memory too."""
    later: "Sequence[Parts]" = ()
    """The parts of the phases after this, the first."""

    @property
    def turns(self) -> "list[Parts]":
        """The parts of each phase, in order; these alone where there is but one."""
        return [self, *self.later]

    def settle(self) -> None:
        """Puts the model on the device, where `assemble` left it where it was."""
        for module in (self.model, self.objective.loss):
            if isinstance(module, nn.Module):
                module.to(self.device.torch_device)
        for turn in self.turns:
            _follow(turn.optimizer)

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


def assemble(
    model: nn.Module,
    data: Any,
    *,
    loss: Any = None,
    step: Any = None,
    reduction: Any = "auto",
    optimizer: str | Optimizer | Callable[..., Optimizer] = "adamw",
    lr: float | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
    clip_norm: float | None = None,
    log_grad_norm: bool = False,
    shuffle: bool = True,
    seed: int | None = None,
    worst_case: Any = None,
    stays: bool = False,
    phases: Sequence[Phase] = (),
    group: Any = None,
) -> Parts:
    """Checks everything first, then puts the model on the device and makes the optimizer.

    The model is untouched when this raises; a lazy module is materialised, and stays so. With `stays` the model is left
    where it is until `Parts.settle`: a child process is to have the device's memory first.
    """
    model = unwrapped(model)
    refuse_for_shards(model, fit=(True, "use autoaccum.Accumulator, with a plan of your own"))
    join()
    ranks = here(group=group)
    first = phases[0] if phases else None
    if first is not None:
        step, reduction = first.step, first.reduction
    _check_gradients_are_on()
    _check_rate(lr)
    check_seed(seed)
    one_of("shuffle", shuffle, (True, False))
    place = open_device(device if device is not None else _where(model, ranks))
    source = open_source(data, shuffle=shuffle, seed=seed, worst_case=worst_case, ranks=ranks)
    objective = Objective(model, loss=loss, step=step, reduction=reduction)
    loss = objective.loss
    lazy = _is_lazy(model)
    if not lazy:
        check_model(model, loss=loss, clip_norm=clip_norm, log_grad_norm=log_grad_norm)
        if isinstance(optimizer, Optimizer):
            build_optimizer(optimizer, model, lr=lr, loss=loss)
    format_ = Precision(precision, place.torch_device, model)
    for module in (model, loss):
        if isinstance(module, nn.Module) and not stays:
            module.to(place.torch_device)
    if lazy:
        _materialise(objective, source, open_device("cpu") if stays else place, format_)
        check_model(model, loss=loss, clip_norm=clip_norm, log_grad_norm=log_grad_norm)
    if first is not None:
        made = first.build_optimizer(model, loss, lr)
        lr_given = first.owns_rate or lr is not None
    else:
        made = build_optimizer(optimizer, model, lr=lr, loss=loss)
        lr_given = lr is not None or isinstance(optimizer, Optimizer)
    _follow(made)
    parts = Parts(model, source, place, ranks, objective, made, format_, lr_given, precision, phase=first)
    parts.later = [_turn(parts, phase, lr) for phase in phases[1:]]
    for turn in parts.turns:
        turn.beside = [other.optimizer for other in parts.turns if other is not turn]
    return parts


def _turn(first: Parts, phase: Phase, lr: float | None) -> Parts:
    """The parts of a later phase, which shares model and data with the first."""
    objective = Objective(first.model, step=phase.step, reduction=phase.reduction)
    optimizer = phase.build_optimizer(first.model, objective.loss, lr)
    _follow(optimizer)
    return replace(
        first, objective=objective, optimizer=optimizer, phase=phase, lr_given=phase.owns_rate or lr is not None,
        precision=Precision(first.asked_precision, first.device.torch_device, first.model),
    )  # fmt: skip


def unwrapped(model: Any) -> Any:
    """The module inside DistributedDataParallel: gradients are summed once a window here, not in each backward.

    Raises:
        SetupError: a DataParallel model, which splits each batch over GPUs by itself.
    """
    if isinstance(model, DataParallel):
        raise SetupError(
            "the model is wrapped in DataParallel, which splits every micro-batch over the GPUs of one process: "
            "pass the model inside it, and start one process for each GPU with torchrun"
        )
    return model.module if isinstance(model, DistributedDataParallel) else model


def agreed(parts: Parts, what: str, val_data: Source | None = None, **settings: Any) -> None:
    """Compares what the ranks must have alike, before anything depends on it; all ranks call this, at `what`.

    Raises:
        SetupError: they differ, and in what; on all ranks.
    """
    if parts.ranks.size == 1:
        return
    facts = setting_facts(loss=parts.objective.loss, step=parts.objective.step, **settings)
    facts |= data_facts("data", parts.source) | data_facts("val_data", val_data)
    facts |= model_facts(parts.model, parts.objective.loss) | optimizer_facts(parts.optimizer)
    parts.ranks.agree(what, facts, GIVE_ALIKE)


@torch.no_grad()
def share_model(parts: Parts) -> None:
    """Gives every rank rank 0's parameters and buffers, as DistributedDataParallel does; all ranks call this."""
    ranks = parts.ranks
    if ranks.size == 1:
        return
    modules = [module for module in (parts.model, parts.objective.loss) if isinstance(module, nn.Module)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    for tensor in (tensor for tensor in tensors if tensor.layout == torch.strided):
        ranks.broadcast("sharing the model", tensor)


def _where(model: Any, ranks: Ranks) -> torch.device | None:
    """Where the model already is, if that is an accelerator; else the rank's own; else the best there is."""
    first = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
    if first is not None and first.device.type not in ("cpu", "meta"):
        return first.device
    if ranks.size > 1 and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", ranks.rank % torch.cuda.device_count())))
    return None


def _check_gradients_are_on() -> None:
    if not torch.is_grad_enabled():
        raise SetupError(
            "gradients are switched off here, by torch.no_grad(), torch.inference_mode() or "
            "torch.set_grad_enabled(False), and without them nothing can be trained: call this outside of it"
        )


def _check_rate(lr: Any) -> None:
    if lr is not None and not (isinstance(lr, (int, float)) and is_positive(lr) and lr < float("inf")):
        raise SetupError(f"lr={shown(lr)} is not a learning rate: give a number above 0, such as 1e-3")


def _is_lazy(model: nn.Module) -> bool:
    if not isinstance(model, nn.Module):
        return False
    tensors = (*model.parameters(), *model.buffers())
    return any(isinstance(tensor, (UninitializedParameter, UninitializedBuffer)) for tensor in tensors)


def _materialise(objective: Objective, source: Source, device: Device, precision: Precision) -> None:
    """Runs one small forward, so that lazy parameters take their shapes; statistics and generators stay as they are."""
    with Untouched(objective.model, device=device.torch_device), torch.no_grad(), precision.autocast():
        objective.model.eval()
        objective.forward(tree.move(source.trial(2), device.torch_device))


def _follow(optimizer: Optimizer) -> None:
    """An optimizer that was used before the model moved keeps its state where the parameters are now."""
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.dim() and value.device != parameter.device:
                optimizer.load_state_dict(optimizer.state_dict())
                return
