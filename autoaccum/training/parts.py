"""The parts of a training whose state a checkpoint keeps: what each of them is, and that they are the same ones again.

Modules, optimizer, scaler and scheduler are alike on all ranks. The random generators and how far the data was read are
each rank's own, and are gathered.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoaccum.checking.verify import VerifyReport
from autoaccum.checks import typed
from autoaccum.data.draws import mix
from autoaccum.data.source import Source
from autoaccum.errors import CheckpointError
from autoaccum.memory.budget import Device
from autoaccum.model.optimizer import optimizer_name
from autoaccum.planning.plan import Plan
from autoaccum.probing.report import ProbeReport
from autoaccum.random_state import RandomState, seed_everything
from autoaccum.ranks import Ranks
from autoaccum.training.evaluate import Evaluator
from autoaccum.training.events import Events
from autoaccum.training.schedule import schedule_name
from autoaccum.training.shard_files import check_alike, with_shards
from autoaccum.training.smaller import plan_for
from autoaccum.training.state import (
    SCHEMA,
    check_same,
    gathered,
    load_module,
    loading,
    module_state,
    plain,
)
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.agreement import described

__all__ = ["Boundary", "TrainingParts", "kept_answers"]


class Boundary:
    """What this rank's next window will draw from: the generators and the data's state, between two windows."""

    def __init__(self, device: torch.device, sources: Sequence[Source], *, quick: bool) -> None:
        """Captures; `quick` as in random_state.py."""
        self.random = RandomState(device, quick=quick)
        self._sources = sources
        self._data = [each.state_dict() for each in self._sources]

    def restore(self) -> None:
        """Puts generators and data back to that moment."""
        with loading("data"):
            for each, state in zip(self._sources, self._data):
                each.load_state_dict(state)
        with loading("random generators"):
            self.random.restore()

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"random": self.random.state_dict(), "data": [plain(state, "the data's state") for state in self._data]}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], device: torch.device, sources: Sequence[Source], new: int = 0
    ) -> "Boundary":
        """The moment that gave `state`, of these sources; for the rank `new`, where that is above 0, as it was on rank
        0 but for the generators.
        """
        made = cls.__new__(cls)
        with loading("random generators"):
            made.random = RandomState.from_state(state["random"], device)
            if new:  # no two ranks drop out alike
                here = RandomState(device)
                made.random.restore()
                seed_everything(mix(int(torch.randint(2**62, ())), new))
                made.random = RandomState(device)
                here.restore()
        made._sources, made._data = sources, state["data"]
        return made


class TrainingParts:
    """Model, loss, optimizer, scaler, scheduler, data and generators, as one state.

    `modules` are the model, and the loss where it is a module, by name.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        source: Source,
        device: Device,
        evaluator: Evaluator | None,
        settings: Mapping[str, Any],
    ) -> None:
        """Keeps references only. `settings`: what a resumed training must share beside the rest, such as the seed."""
        self.modules: dict[str, nn.Module] = {"model": accumulator.model}
        loss = evaluator.objective.loss if evaluator is not None else None
        if isinstance(loss, nn.Module):
            self.modules["loss"] = loss
        self._accumulator, self._source, self._device = accumulator, source, device.torch_device
        self._evaluator, self._settings = evaluator, settings
        validation = None if evaluator is None else evaluator.source
        self._sources = [source] if validation is None else [source, validation]

    def boundary(self, *, quick: bool = False) -> Boundary:
        """This moment, between two windows."""
        return Boundary(self._device, self._sources, quick=quick)

    def identity(self) -> dict[str, Any]:
        """What tells this training from others; of its modules the names, dtypes and shapes of what they hold."""
        data = {f"data {name}": value for name, value in self._source.fingerprint().items()}
        return {
            "target_batch": self._accumulator.plan.target_batch,
            **data,
            "optimizer": optimizer_name(self._accumulator.optimizer),
            "schedule": schedule_name(self._accumulator.scheduler),
            **({} if self._accumulator.sharded is None else {"sharded": True}),
            **self._settings,
            **{
                f"{owner}'s {name!r}": described(value) if isinstance(value, Tensor) else "there"
                for owner, module in self.modules.items()
                for name, value in module.state_dict().items()
            },
        }

    def state_dict(self, boundary: Boundary | None) -> dict[str, Any]:
        """Everything, as plain values and tensors; on several ranks all call this.

        `boundary` is the moment between two windows, where it is past. A CheckpointError where something cannot be held
        without code.
        """
        accumulator = self._accumulator
        if accumulator.sharded is not None:
            check_alike(accumulator.optimizer, accumulator.sharded.holds, accumulator.ranks)
        here = boundary if boundary is not None else self.boundary()
        return {
            "schema": SCHEMA,
            "device": self._device.type,
            "identity": plain(self.identity(), "the training's identity"),
            "modules": {name: module_state(module, f"the {name}") for name, module in self.modules.items()},
            "validation_batch": None if self._evaluator is None else self._evaluator.micro_batch,
            "ranks": gathered(here.state_dict(), accumulator.ranks, "a checkpoint"),
        }

    def checked(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state of this training, its shards read; nothing is changed.

        Raises:
            CheckpointError: it is of another one.
        """
        accumulator = self._accumulator
        with loading("identity"):
            check_same(state, plain(self.identity(), "the training's identity"))
            if "shards" in state:
                return with_shards(state, self.modules, accumulator.optimizer, state["shards"], accumulator.ranks)
        return state

    def load_state_dict(self, state: Mapping[str, Any], events: Events) -> Boundary:
        """Puts the modules back; the generators and the data are returned for when the first window is due."""
        rank, size = self._accumulator.ranks.rank, self._accumulator.ranks.size
        with loading("ranks"):
            validation_batch, ranks = typed(state["validation_batch"], int | None), state["ranks"]
            own = ranks[rank if rank < len(ranks) else 0]
            kept = {"random": typed(own["random"], dict), "data": own["data"]}
            device = typed(state["device"], str)
        for name, module in self.modules.items():
            with loading(name):
                # A loss that holds nothing may have been a function then, of which nothing was kept.
                if name in state["modules"] or module.state_dict():
                    load_module(module, state["modules"][name])
        if self._evaluator is not None and validation_batch and len(ranks) == size:
            self._evaluator.micro_batch = validation_batch
        if device != self._device.type:
            events.note(
                f"the checkpoint is from {device}, and the training goes on on {self._device.type}: the same "
                "samples in the same windows, but other rounding, and what the model draws there is drawn anew"
            )
        if len(ranks) != size:
            events.note(
                f"the checkpoint is of {len(ranks)} rank{'s' * (len(ranks) > 1)}, and {size} train now: windows hold "
                "the same samples, each rank's share of them is cut anew, and what the model draws is drawn anew"
            )
        return Boundary.from_state(kept, self._device, self._sources, new=rank if rank >= len(ranks) else 0)


def kept_answers(
    state: Mapping[str, Any], target_batch: int, ranks: Ranks
) -> tuple[Plan, ProbeReport | None, VerifyReport | None]:
    """What a checkpoint knows already: the plan with its k, as this rank has it, the probe's report, the check's.

    Of another number of ranks the plan stays as it was, and there is no report: what fits has to be found anew. A
    CheckpointError where it is for another target batch.
    """
    with loading("identity"):
        was = state["identity"].get("target_batch")
    if was != target_batch:
        raise CheckpointError(
            f"the checkpoint is of another training. target_batch: {was} in the checkpoint, {target_batch} here. Give "
            "the same as then, another folder, or resume=False to start anew"
        )
    with loading("plan, probe's report or check"):
        plan, probe, verify = plan_for(ranks.rank, state["plan"]), state["probe"], state["verify"]
        return (
            plan,
            None if probe is None or plan.world_size != ranks.size else ProbeReport.from_dict(probe),
            None if verify is None else VerifyReport(**verify),
        )
