"""What a session runs: the user's model, data, loss and optimizer, checked and put on the device.

Probing, checking and training share one Assembly; where several optimizers take turns, each phase has its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autoaccum.checks import check_seed, is_positive, one_of
from autoaccum.data import tree
from autoaccum.data.source import Source, data_facts, open_source, read_more_than_once
from autoaccum.errors import SetupError, shown
from autoaccum.loss.objective import Objective
from autoaccum.memory.budget import Device
from autoaccum.memory.device import open_device
from autoaccum.model.compiled import Compiled, compiled
from autoaccum.model.forward import OwnStatistics
from autoaccum.model.given_model import check_gradients_are_on, device_of, follow, is_lazy, unwrapped
from autoaccum.model.memory_savers import BY_NAME, installed, obstacle
from autoaccum.model.optimizer import build_optimizer, check_model, check_no_gradient, trained_parameters
from autoaccum.model.precision import Precision
from autoaccum.model.rates import take_back
from autoaccum.model.shards import local, put_on, refuse_for_shards
from autoaccum.model.snapshot import Snapshot
from autoaccum.model.step_in_backward import StepInBackward
from autoaccum.planning.plan import plan
from autoaccum.ranks import Ranks
from autoaccum.settings import Settings, alike
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
    validation: Source | None = None
    """The validation data, where there is some."""
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
    steps: bool = True
    """Whether the optimizer's step is ours; somebody else's trainer takes it."""

    @property
    def turns(self) -> "list[Assembly]":
        """One for each phase, in order; this one alone where there is but one optimizer."""
        return [self, *self.later]

    @torch.no_grad()
    def settle(self) -> None:
        """Puts the model on the device, where it is not yet, and gives every rank rank 0's; all ranks call this.

        Parameters and buffers go from rank 0 to the others, as DistributedDataParallel sends them; shards are each
        rank's own.
        """
        modules = self.objective.modules
        for module in modules:
            put_on(self.device.torch_device, module)
        for turn in self.turns:
            follow(turn.optimizer)
        if self.ranks.size == 1:
            return
        for tensor in (tensor for module in modules for tensor in (*module.parameters(), *module.buffers())):
            if tensor.layout == torch.strided and local(tensor) is tensor:
                self.ranks.broadcast("sharing the model", tensor)

    def obstacle(self, rung: str) -> str | None:
        """Why a rung cannot be taken here, in a few words; None where it can be tried."""
        if rung in BY_NAME and not self.steps:
            return "the trainer it is attached to steps the optimizer itself"
        if rung == "step_in_backward":
            for why, is_so in (
                ("gradients are summed over ranks before the step", self.ranks.size > 1),
                ("several optimizers take turns", self.phase is not None),
                ("a loss that compares samples has two passes", self.objective.coupled is not None),
                ("a loss scale is undone at the window's end", self.precision.scaler.is_enabled()),
            ):
                if is_so:
                    return why
        return obstacle(
            rung, self.model, self.device.torch_device, self.asked_precision,
            optimizers=[self.optimizer, *self.beside], compiled=self.compiled,
        )  # fmt: skip

    @property
    def in_backward(self) -> StepInBackward | None:
        """Where the optimizer steps in the backward pass, what does so."""
        return StepInBackward(self.optimizer) if self.ladder == "step_in_backward" else None

    def take(self, rung: str | None) -> None:
        """Everything after this runs under `rung`; a SetupError where it cannot be taken here."""
        if rung is None:
            return
        why = self.obstacle(rung)
        if why is not None and (rung, self.asked_precision) != ("bf16", "bf16"):
            raise SetupError(f'ladder="{rung}" cannot be taken: {why}')
        self.ladder = rung
        if rung == "bf16":
            self.asked_precision = "bf16"
            self.precision = Precision("bf16", self.device.torch_device, self.model)

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
            stack.enter_context(self.under(self.ladder))
            yield

    def under(self, rung: str | None) -> AbstractContextManager[Any]:
        """The model runs under a rung inside."""
        optimizers = [self.optimizer, *self.beside]
        return installed(rung, self.model, self.device.torch_device, optimizers=optimizers, compiled=self.compiled)


def assemble(
    model: Any, data: Any, asked: Settings, ranks: Ranks, *, what: str = "prepare", stays: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Assembly:  # fmt: skip
    """Checks everything first, then puts the model on the device and makes the optimizer; all ranks call this.

    The model is untouched when this raises; a lazy module is materialised, and stays so.

    Args:
        model, data, asked: as they were given, and the settings.
        ranks: this process among others.
        what: "prepare" where a training follows, else what is asked: "probe", "verify" or "attach".
        stays: the model is left where it is until `Assembly.settle`: a child process has the device's memory first.
        note: told in words what is going on.

    Raises:
        SetupError, DataError, DeviceError, LossError: what cannot be trained with, or not so; or, on all ranks, what
            they do not have alike.
    """
    check_gradients_are_on()
    lr = asked.lr
    if lr is not None and not (isinstance(lr, (int, float)) and is_positive(lr) and lr < float("inf")):
        raise SetupError(f"lr={shown(lr)} is not a learning rate: give a number above 0, such as 1e-3")
    check_seed(asked.seed)
    one_of("shuffle", asked.shuffle, (True, False))
    phases = check_phases(asked)
    model = unwrapped(model)
    refuse_for_shards(
        model,
        phases=(bool(phases), "train it with one optimizer"),
        compile=(bool(asked.compile), "leave it out"),
    )
    wanted = asked.device if asked.device is not None else device_of(model, ranks)
    device = open_device(wanted)
    source = open_source(data, shuffle=asked.shuffle, seed=asked.seed, worst_case=asked.worst_case, ranks=ranks)
    owners: Sequence[Any] = phases or (asked,)  # of each turn's step, optimizer and learning rate
    objectives = [Objective(model, loss=asked.loss, step=own.step, reduction=own.reduction) for own in owners]
    objective = objectives[0]
    loss, norms, lazy = objective.loss, asked.some("clip_norm", "log_grad_norm"), is_lazy(model)
    if not lazy:
        check_model(model, loss=loss, **norms)
        if isinstance(asked.optimizer, Optimizer):
            build_optimizer(asked.optimizer, model, lr=asked.lr, loss=loss)
    precisions = [Precision(asked.precision, device.torch_device, model) for _ in objectives]
    run = compiled(model, note) if asked.compile else None
    # Nothing of the model was changed so far.
    if not stays:
        for module in objective.modules:
            put_on(device.torch_device, module)
    if lazy:
        _materialise(objective, source, open_device("cpu") if stays else device, precisions[0])
        check_model(model, loss=loss, **norms)
    turns = [
        Assembly(
            model, source, device, ranks, objective, _optimizer(asked, own, model, objective.loss), precision,
            lr_given=asked.lr is not None or own.lr is not None or isinstance(own.optimizer, Optimizer),
            asked_precision=asked.precision, compiled=run, phase=own if phases else None, steps=what != "attach",
        )
        for own, objective, precision in zip(owners, objectives, precisions)
    ]  # fmt: skip
    for turn in turns:
        turn.beside = [other.optimizer for other in turns if other is not turn]
    parts, *parts.later = turns
    _agree(parts, asked, what)
    if what == "prepare" and not stays:
        parts.settle()
    if isinstance(asked.ladder, str) and asked.ladder != "auto":
        parts.take(asked.ladder)
    return parts


def _agree(parts: Assembly, asked: Settings, what: str) -> None:
    """Checks what the parts must be for a training that is asked for; then what the ranks must have alike.

    A probe or a check may be each rank's own: these compare nothing. A SetupError for gradients that are there already,
    or on all ranks for what differs; a PlanError for settings that no plan can be made with, before a probe is spent on
    them; a DataError for data that cannot be read as often as is asked for.
    """
    trains = what == "prepare"
    if trains:
        check_no_gradient(trained_parameters(parts.model, asked.loss))
        for turn in parts.turns:
            take_back(turn.optimizer)  # where an earlier training with it left the rates of its plan
    plan(1, 1, optimizer=parts.optimizer, **asked.some("lr_batch", "lr_rule", "batch_norm", "tail"))
    if asked.val_data is not None:
        parts.validation = open_source(asked.val_data, shuffle=False, ranks=parts.ranks)
    passes = asked.epochs if asked.max_steps is None else 1
    read_more_than_once(passes, data=parts.source, val_data=parts.validation)
    together = trains or (what == "probe" and (asked.target_batch is not None or asked.ladder == "auto"))
    if parts.ranks.size == 1 or not together:
        return
    settings = {name: asked[name] for name in alike("same") if trains or name != "seed"}
    settings |= {name: "none" if asked[name] is None else "given" for name in alike("given")}
    objective = parts.objective
    facts = setting_facts(loss=objective.loss, step=objective.step, metrics=sorted(asked.metrics or {}), **settings)
    facts |= data_facts("data", parts.source) | data_facts("val_data", parts.validation)
    facts |= model_facts(parts.model, objective.loss) | optimizer_facts(parts.optimizer)
    parts.ranks.agree(what, facts, GIVE_ALIKE)


def _optimizer(asked: Settings, own: Any, model: nn.Module, loss: Any) -> Optimizer:
    if isinstance(own, Phase):
        made = own.build_optimizer(model, loss, asked.lr)
    else:
        made = build_optimizer(asked.optimizer, model, lr=asked.lr, loss=loss)
    follow(made)
    return made


def _materialise(objective: Objective, source: Source, device: Device, precision: Precision) -> None:
    """Runs one small forward, so that lazy parameters take their shapes; statistics and generators stay as they are."""
    batch = tree.move(source.trial(2), device.torch_device)
    with precision.autocast(), torch.no_grad(), Snapshot(objective.model, device=device.torch_device, parameters=False):
        objective.model.eval()
        objective.forward(batch)
