"""What a training is at a window's boundary, as plain values and tensors; and the same training out of them.

- Only what `torch.load(weights_only=True)` reads goes in: numbers, texts, containers, tensors. What is none of these is
  refused when it is saved, by name, rather than when somebody needs it.
- A module is its `state_dict()`, and the buffers that it keeps out of it as well: a training goes on from all of them.
- An optimizer casts what it loads to its parameters' dtypes. Here each value comes back in the dtype that it had, since
  an optimizer with fp32 state beside bf16 parameters would go on another way.
- Modules, optimizer, scaler and scheduler are alike on all ranks. The random generators and how far the data was read
  are each rank's own, and are gathered.
- Before anything is loaded, all that tells one training from another is compared, and all that differs is named.
"""

import codecs
import contextlib
import io
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.agreement import described

__all__ = [
    "Boundary",
    "TrainingParts",
    "accumulator_state",
    "check_same",
    "kept_answers",
    "load_accumulator",
    "load_optimizer",
    "loading",
    "plain",
    "scheduler_state",
]

SCHEMA = 2
_NAMED = 8  # differences, in an error

torch.serialization.add_safe_globals([complex, codecs.encode])  # torch 2.4 refuses complex numbers and bytes
_AS_THEY_ARE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def plain(value: Any, where: str) -> Any:
    """`value` as a checkpoint can hold it: mappings become dicts, sequences lists or tuples, numpy's values torch's.

    A Counter stays one: torch's MultiStepLR has its milestones in it, and others call its methods. A CheckpointError
    where there is something in it that only code can make; `where` says what holds it.
    """
    if isinstance(value, Mapping):
        items = {plain(key, where): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
        return Counter(items) if type(value) is Counter else items
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        entries = [plain(item, f"{where}[{place}]") for place, item in enumerate(value)]
        return tuple(entries) if isinstance(value, tuple) else entries
    if type(value) in _AS_THEY_ARE:
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if type(value).__module__ == "numpy":
        return value.item() if value.ndim == 0 else torch.as_tensor(value)
    for kind in (int, float, str):
        if isinstance(value, kind):  # a subclass, as a member of an enum is
            return kind(value)
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold without code in it: let its state_dict() "
        "return numbers, texts, lists, dicts and tensors only"
    )


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Around what others read out of a checkpoint: torch's modules and optimizers, the user's data.

    A CheckpointError where it has not the structure that they expect; their own error is the cause.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        short = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            f"the checkpoint's {what} cannot be put back ({short}): it is not of this program, or of another version: "
            "go on from another checkpoint, or resume=False"
        ) from error


# --- modules ---------------------------------------------------------------------------------------------------------


def _module_state(module: nn.Module, where: str) -> dict[str, Any]:
    """The module's `state_dict()`, its versions, and the buffers that are not in it."""
    state = module.state_dict()
    return {
        "state": plain(state, where),
        "versions": plain(getattr(state, "_metadata", {}), where),
        "other_buffers": {name: each.detach() for name, each in module.named_buffers() if name not in state},
    }


def _load_module(module: nn.Module, saved: Mapping[str, Any]) -> None:
    state: OrderedDict[str, Any] = OrderedDict(saved["state"])
    state._metadata = saved["versions"]  # type: ignore[attr-defined]  # where torch keeps and looks for them
    module.load_state_dict(state)
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in saved["other_buffers"] and name not in saved["state"]:
                buffer.copy_(saved["other_buffers"][name])


# --- optimizers and schedulers ---------------------------------------------------------------------------------------


def load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Puts back an optimizer's `state_dict()`, each value in the dtype it had."""
    optimizer.load_state_dict({"state": saved["state"], "param_groups": saved["param_groups"]})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for parameter, number in zip(parameters, numbers, strict=True):
        for name, value in saved["state"].get(number, {}).items():
            loaded = optimizer.state[parameter].get(name)
            if isinstance(value, Tensor) and isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][name] = value.to(loaded.device, copy=True)


def accumulator_state(accumulator: Accumulator) -> dict[str, Any]:
    """What one optimizer's windows go on from beside the modules: it, its scaler, schedule, noise scale and counts."""
    scheduler = accumulator.scheduler
    return {
        "step": accumulator.step,
        "skipped": accumulator.skipped_windows,
        "optimizer": plain(accumulator.optimizer.state_dict(), "the optimizer"),
        "noise_scale": accumulator.noise_scale.state_dict(),
        "scaler": plain(accumulator.precision.scaler.state_dict(), "the scaler"),
        "scheduler": None if scheduler is None else scheduler_state(scheduler),
    }


def load_accumulator(accumulator: Accumulator, saved: Mapping[str, Any]) -> None:
    """Puts back what `accumulator_state` gave."""
    with loading("optimizer"):
        load_optimizer(accumulator.optimizer, saved["optimizer"])
    with loading("noise scale"):
        accumulator.noise_scale.load_state_dict(saved["noise_scale"])
    with loading("scaler or scheduler"):
        scaler = typed(saved["scaler"], dict)
        if scaler and accumulator.precision.scaler.is_enabled():
            accumulator.precision.scaler.load_state_dict(scaler)
        scheduler = typed(saved["scheduler"], dict | None)
        if scheduler is not None and accumulator.scheduler is not None:
            accumulator.scheduler.load_state_dict(scheduler)
    with loading("progress"):
        accumulator.step, accumulator.skipped_windows = typed(saved["step"], int), typed(saved["skipped"], int)


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """Its `state_dict()` without functions: those the constructor has made already."""
    return {
        name: plain(value, f"the scheduler's {name!r}")
        for name, value in scheduler.state_dict().items()
        if not callable(value)
    }


# --- is it the same training? ----------------------------------------------------------------------------------------


def check_same(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """That a state belongs to this training; a CheckpointError names what differs, both values each time.

    `identity` is what this training is, as `saved["identity"]` says what the other was: a value under each name.
    """
    if saved.get("schema") != SCHEMA:
        raise CheckpointError(
            f"the checkpoint has schema {saved.get('schema')!r}, and this version of autoaccum reads schema {SCHEMA}: "
            "go on with the version that wrote it, or start anew with resume=False"
        )
    was = saved["identity"]
    names = dict.fromkeys([*identity, *was])
    pairs = [(name, was.get(name, "none"), identity.get(name, "none")) for name in names]
    different = [f"{name}: {then} in the checkpoint, {now} here" for name, then, now in pairs if then != now]
    if different:
        more = f"; and {len(different) - _NAMED} more" if len(different) > _NAMED else ""
        raise CheckpointError(
            f"the checkpoint is of another training. {'; '.join(different[:_NAMED])}{more}. Give the same as then, "
            "another folder, or resume=False to start anew"
        )


# --- the parts of a training -----------------------------------------------------------------------------------------


class Boundary(NamedTuple):
    """What this rank's next window will draw from: the generators and the data's state, between two windows."""

    random: RandomState
    data: list[Any]


class TrainingParts:
    """Model, loss, optimizer, scaler, scheduler, data and generators, as one state.

    `modules` are the model, and the loss where it is a module, by name.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        source: Source,
        device: Device,
        evaluator: Evaluator,
        settings: Mapping[str, Any],
    ) -> None:
        """Keeps references only. `settings`: what a resumed training must share beside the rest, such as the seed."""
        modules = {"model": accumulator.model, "loss": evaluator.objective.loss}
        self.modules = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
        self._accumulator, self._device = accumulator, device.torch_device
        self._evaluator, self._settings = evaluator, settings
        self._sources = [source] if evaluator.source is None else [source, evaluator.source]

    def boundary(self, *, quick: bool = False) -> Boundary:
        """This moment, between two windows; `quick` as in random_state.py."""
        return Boundary(RandomState(self._device, quick=quick), [each.state_dict() for each in self._sources])

    def restore(self, boundary: Boundary) -> None:
        """Puts generators and data back to that moment."""
        with loading("data"):
            for each, state in zip(self._sources, boundary.data):
                each.load_state_dict(state)
        with loading("random generators"):
            boundary.random.restore()

    def _identity(self) -> dict[str, Any]:
        """What tells this training from others; of its modules the names, dtypes and shapes of what they hold."""
        values = {
            "target_batch": self._accumulator.plan.target_batch,
            **{f"data {name}": value for name, value in self._sources[0].fingerprint().items()},
            "optimizer": optimizer_name(self._accumulator.optimizer),
            "schedule": schedule_name(self._accumulator.scheduler),
            **({} if self._accumulator.sharded is None else {"sharded": True}),
            **self._settings,
        }
        for owner, module in self.modules.items():
            for name, value in module.state_dict().items():
                values[f"{owner}'s {name!r}"] = described(value) if isinstance(value, Tensor) else "there"
        return dict(plain(values, "the training's identity"))

    def state_dict(self, boundary: Boundary | None) -> dict[str, Any]:
        """Everything, as plain values and tensors; on several ranks all call this.

        `boundary` is the moment between two windows, where it is past. A CheckpointError where something cannot be held
        without code.
        """
        accumulator = self._accumulator
        if accumulator.sharded is not None:
            check_alike(accumulator.optimizer, accumulator.sharded.holds, accumulator.ranks)
        here = boundary if boundary is not None else self.boundary()
        data = [plain(state, "the data's state") for state in here.data]
        own, ranks = {"random": here.random.state_dict(), "data": data}, accumulator.ranks
        return {
            "schema": SCHEMA,
            "device": self._device.type,
            "identity": self._identity(),
            "modules": {name: _module_state(module, f"the {name}") for name, module in self.modules.items()},
            "validation_batch": self._evaluator.micro_batch,
            "ranks": [own] if ranks.size == 1 else _gathered(own, ranks),
        }

    def checked(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state of this training, its shards read; nothing is changed.

        Raises:
            CheckpointError: it is of another one.
        """
        accumulator = self._accumulator
        with loading("identity"):
            check_same(state, self._identity())
            if "shards" in state:
                return with_shards(state, self.modules, accumulator.optimizer, state["shards"], accumulator.ranks)
        return state

    def load_state_dict(self, state: Mapping[str, Any], events: Events) -> Boundary:
        """Puts the modules back; the generators and the data are returned for when the first window is due."""
        rank, size = self._accumulator.ranks.rank, self._accumulator.ranks.size
        with loading("ranks"):
            validation_batch, ranks = typed(state["validation_batch"], int | None), state["ranks"]
            own = ranks[rank if rank < len(ranks) else 0]
            generators, data, device = typed(own["random"], dict), own["data"], typed(state["device"], str)
        for name, module in self.modules.items():
            with loading(name):
                # A loss that holds nothing may have been a function then, of which nothing was kept.
                if name in state["modules"] or module.state_dict():
                    _load_module(module, state["modules"][name])
        if validation_batch and len(ranks) == size:
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
        with loading("random generators"):
            random = RandomState.from_state(generators, self._device)
            if rank >= len(ranks):  # it goes on as rank 0 did, but no two ranks drop out alike
                here = RandomState(self._device)
                random.restore()
                seed_everything(mix(int(torch.randint(2**62, ())), rank))
                random = RandomState(self._device)
                here.restore()
        return Boundary(random, data)


def _gathered(own: Mapping[str, Any], ranks: Ranks) -> list[dict[str, Any]]:
    """Every rank's values, on every rank, in the order of ranks. All ranks call this."""
    file = io.BytesIO()
    torch.save(own, file)
    messages = ranks.collect("a checkpoint", file.getvalue())
    return [torch.load(io.BytesIO(message), map_location="cpu", weights_only=True) for message in messages]


def kept_answers(
    state: Mapping[str, Any], target_batch: int, ranks: Ranks
) -> tuple[Plan, ProbeReport | None, VerifyReport | None]:
    """What a checkpoint knows already: the plan with its k, as this rank has it, the probe's report, the check's.

    Of another number of ranks the plan stays as it was, and there is no report: what fits has to be found anew. A
    CheckpointError where it is for another target batch.
    """
    with loading("identity"):
        was = {"target_batch": state["identity"].get("target_batch")}
        check_same({**state, "identity": was}, {"target_batch": target_batch})
    with loading("plan, probe's report or check"):
        plan, probe, verify = plan_for(ranks.rank, state["plan"]), state["probe"], state["verify"]
        return (
            plan,
            None if probe is None or plan.world_size != ranks.size else ProbeReport.from_dict(probe),
            None if verify is None else VerifyReport(**verify),
        )
