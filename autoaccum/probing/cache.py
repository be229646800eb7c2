"""Answers kept between runs: the second run of the same training goes straight to one verifying trial.

What is kept is the forecast, as the few functions whose maximum it is, under a key of all that decides it: the model's
structure, code and shapes, the batch, the optimizer, the formats, the device and the versions. A cached forecast is
believed only after a small step was measured and is where it says; anything unreadable costs a warning and a new probe.
"""

import functools
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoaccum.checks import typed
from autoaccum.data import tree
from autoaccum.files import read_json, write_json
from autoaccum.memory.fitting import basis
from autoaccum.memory.forecast import Forecast
from autoaccum.probing.journal import cache_folder
from autoaccum.probing.outcome import Trial
from autoaccum.window.assembly import Assembly

__all__ = ["Forecaster", "Lines", "keep_lines", "read_lines", "training_key"]

SCHEMA = 4
LARGEST = 2**62  # more bytes than there are


@dataclass
class Lines:
    """A forecast as the functions whose maximum it is: peak(n) = max(a + b·n), in bytes; or of a length too.

    Attributes:
        lines: (a, b) each; over batches and lengths the coefficients of 1, B, L, BL, L², BL².
        residual: as the forecast from which they were taken.
        reserve: reserved over requested bytes, as measured at the size verified; 1 without a caching allocator.
        longest: over lengths, the one that is meant where none is given; else None.
    """

    lines: tuple[tuple[float, ...], ...]
    residual: float | None
    reserve: float = 1.0
    longest: int | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Lines":
        """From what `asdict` made, also by way of JSON; a KeyError, TypeError or ValueError where it is not that."""
        lines = typed(values["lines"], tuple[tuple[float, ...], ...])
        residual, reserve = typed(values["residual"], float | None), typed(values["reserve"], float)
        longest = typed(values["longest"], int | None)
        if not 0 < reserve < LARGEST or (residual or 0.0) < 0 or longest == 0:
            raise ValueError(f"reserve={reserve!r}, residual={residual!r} or longest={longest!r} is out of range")
        if any(abs(part) >= LARGEST for line in lines for part in line):
            raise ValueError("the forecast is of more bytes than there are")
        if {len(line) for line in lines} != {2 if longest is None else 6}:
            raise ValueError("the forecast's functions do not have as many coefficients as they need")
        return cls(lines, residual, reserve, longest)

    @classmethod
    def of(cls, forecast: Forecast, trials: Sequence[Trial]) -> "Lines":
        """A forecast, and what the allocator reserved above it at the largest step measured."""
        ran = [trial for trial in trials if trial.reserved_bytes is not None and trial.peak_bytes]
        largest = max(ran, key=lambda trial: trial.peak_bytes or 0, default=None)
        reserve = 1.0 if largest is None else (largest.reserved_bytes or 0) / (largest.peak_bytes or 1)
        return cls(envelope(forecast.lines()), forecast.residual, reserve, forecast.longest)

    @cached_property
    def _rows(self) -> Tensor:
        return torch.tensor(self.lines, dtype=torch.float64, device="cpu")

    def peak(self, batch: int, length: int | None = None) -> int:
        """The peak in requested bytes at `batch` samples; sizes beside batch and length are part of the key."""
        size = (batch,) if self.longest is None else (batch, self.longest if length is None else length)
        return round(float((self._rows @ basis(size)).max()))

    def reserved(self, batch: int, length: int | None = None) -> int:
        """The peak in the bytes that the budget counts."""
        return round(self.peak(batch, length) * self.reserve)


Forecaster = Forecast | Lines


def envelope(lines: Iterable[tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
    """Those of the functions that no other tops in each coefficient: at sizes of 1 and above one of them is highest."""
    rows = torch.tensor(sorted(set(lines), reverse=True), dtype=torch.float64, device="cpu")
    kept: list[tuple[float, ...]] = []
    while len(rows):  # none is topped by one that comes after it
        kept.append(tuple(rows[0].tolist()))
        rows = rows[(rows > rows[0]).any(1)]
    return tuple(kept)


def read_lines(key: str) -> Lines | None:
    """The forecast that was kept of a training; None where there is none that can be read (with a warning)."""
    path = _path(key)
    try:
        values = read_json(path)
        if values["schema"] != SCHEMA:
            raise ValueError(f"schema {values['schema']} instead of {SCHEMA}")
        return Lines.from_dict(values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        # Its text alone: the repr of an error in decoding has the whole file in it.
        why = f"{type(error).__name__}: {error}"[:200]
        warnings.warn(f"the cached answer {path} cannot be used ({why}): probing anew", stacklevel=2)
        return None


def keep_lines(key: str, lines: Lines) -> None:
    """Keeps a training's forecast, whole or not at all; a folder that cannot be written costs a warning."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(path, {"schema": SCHEMA, **asdict(lines)}, checksum=True, private=True)
    except OSError as error:
        warnings.warn(f"the answer cannot be kept in {path} ({error}): going on without", stacklevel=2)


def _path(key: str) -> Path:
    return cache_folder() / f"{key}.json"


def training_key(parts: Assembly, settings: Mapping[str, Any]) -> str:
    """A name for all that decides a step's memory: equal keys mean equal forecasts.

    Of model, optimizer and loss the structure and the code count, not the numbers; of a small batch the shapes beside
    the batch dimension and the dtypes; of the device its name and capacity. `settings` are plain values.
    """
    device, optimizer, loss = parts.device, parts.optimizer, parts.objective.loss or parts.objective.step
    facts = [
        torch.__version__,
        str(torch.get_num_threads()),
        f"{device.type} {device.name} {device.total()}",
        json.dumps({"precision": parts.precision.name, **settings}, sort_keys=True, default=str),
        *_structure(parts.model),
        *(_structure(loss) if isinstance(loss, nn.Module) else [_code(loss)]),
        f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        *(json.dumps(_plain(group), sort_keys=True, default=str) for group in optimizer.param_groups),
        *(f"{path} {tensor.dtype} {tuple(tensor.shape[1:])}" for path, tensor in tree.tensors(parts.source.trial(2))),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]


def _structure(module: nn.Module) -> Iterator[str]:
    for name, part in module.named_modules():
        kind = type(part)
        # TorchScript's own code is a text; a container's has none. Its class has no forward to read.
        code = getattr(part, "code", "") if isinstance(part, torch.jit.ScriptModule) else _code(kind.forward)
        yield f"{name} {kind.__module__}.{kind.__qualname__} {part.extra_repr()} {code} {part.training}"
        tensors = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        yield " ".join(f"{key} {each.dtype} {tuple(each.shape)} {each.requires_grad}" for key, each in tensors)
        yield json.dumps({key: value for key, value in vars(part).items() if type(value) in (int, float, bool, str)})


def _code(function: Any) -> str:
    """The code of a user's function, so that an edit makes another training; the same in every process."""
    if function is None:  # the model returns its loss
        return "none"
    function = getattr(function, "__func__", function)
    if isinstance(function, functools.partial):
        given = [*function.args, *(value for pair in sorted(function.keywords.items()) for value in pair)]
        return f"{_code(function.func)} {[_told(value) for value in given]}"
    code = getattr(function, "__code__", None)
    if code is not None:
        return hashlib.sha256(code.co_code + repr(code.co_names).encode()).hexdigest()
    name = getattr(function, "__qualname__", None)
    if name is not None:  # a class, or what is written in C
        return f"{getattr(function, '__module__', None)}.{name}"
    kind = type(function)
    settings = {key: _told(value) for key, value in sorted(getattr(function, "__dict__", {}).items())}
    return f"{kind.__module__}.{kind.__qualname__} {settings} {_code(kind.__call__)}"


def _told(value: Any) -> Any:
    """A setting as a key can hold it: never an address, which is another one in each process."""
    return value if type(value) in (int, float, bool, str, type(None)) else type(value).__qualname__


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """What decides the memory of an optimizer's step: its flags, and whether numbers are zero (momentum)."""
    told = {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr", "param_names")}
    return {name: bool(value) if type(value) in (int, float) else _told(value) for name, value in told.items()}
