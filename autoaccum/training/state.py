"""What a training is at a window's boundary, as plain values and tensors; and the same training out of them.

- Only what `torch.load(weights_only=True)` reads goes in: numbers, texts, containers, tensors. What is none of these is
  refused when it is saved, by name, rather than when somebody needs it.
- A module is its `state_dict()`, and the buffers that it keeps out of it as well: a training goes on from all of them.
- An optimizer casts what it loads to its parameters' dtypes. Here each value comes back in the dtype that it had, since
  an optimizer with fp32 state beside bf16 parameters would go on another way.
- Before anything is loaded, all that tells one training from another is compared, and all that differs is named.
"""

import codecs
import contextlib
import io
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoaccum.checks import typed
from autoaccum.errors import CheckpointError
from autoaccum.ranks import Ranks
from autoaccum.window.accumulate import Accumulator

__all__ = [
    "SCHEMA",
    "accumulator_state",
    "check_same",
    "gathered",
    "load_accumulator",
    "load_module",
    "load_optimizer",
    "loading",
    "module_state",
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
    if type(value) not in _AS_THEY_ARE:
        return _single(value, where)
    return value


def _single(value: Any, where: str) -> Any:
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


def module_state(module: nn.Module, where: str) -> dict[str, Any]:
    """The module's `state_dict()`, its versions, and the buffers that are not in it."""
    state = module.state_dict()
    return {
        "state": plain(state, where),
        "versions": plain(getattr(state, "_metadata", {}), where),
        "other_buffers": {name: buffer.detach() for name, buffer in _other_buffers(module, state).items()},
    }


def load_module(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Puts back what `module_state` gave."""
    state: OrderedDict[str, Any] = OrderedDict(saved["state"])
    state._metadata = saved["versions"]  # type: ignore[attr-defined]  # where torch keeps and looks for them
    module.load_state_dict(state)
    with torch.no_grad():
        for name, buffer in _other_buffers(module, saved["state"]).items():
            if name in saved["other_buffers"]:
                buffer.copy_(saved["other_buffers"][name])


def _other_buffers(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module.named_buffers() if name not in state}


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
    with loading("scaler"):
        scaler = typed(saved["scaler"], dict)
        if scaler and accumulator.precision.scaler.is_enabled():
            accumulator.precision.scaler.load_state_dict(scaler)
    with loading("scheduler"):
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


# --- several ranks ---------------------------------------------------------------------------------------------------


def gathered(own: Mapping[str, Any], ranks: Ranks, what: str) -> list[dict[str, Any]]:
    """Every rank's values, on every rank, in the order of ranks. All ranks call this; `what` says where they are."""
    if ranks.size == 1:
        return [dict(own)]
    file = io.BytesIO()
    torch.save(dict(own), file)
    messages = ranks.collect(what, file.getvalue())
    return [torch.load(io.BytesIO(message), map_location="cpu", weights_only=True) for message in messages]


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
