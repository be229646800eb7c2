"""The global random generators at one moment: torch's, the device's, Python's and numpy's; also as plain values.

They are captured at every window, for the rare one that has to be run again. numpy takes as long to copy its state as
a short window's own overhead may be, Python makes 625 numbers of its own, and most trainings draw nothing from either:
a quick capture compares their raw bytes with those seen last, and copies only a change. That is exact for Python's; for
numpy's unless the user's code seeds it with the same number again in between and draws one normal value more or less,
since the one that numpy keeps for later is not in those bytes. What goes into a checkpoint is captured in full.
"""

import _random
import ctypes
import random
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["RandomState", "numpy_random", "seed_everything"]

_MT19937_BYTES = 624 * 4 + 4  # the key, and the place in it, as in numpy's struct and in Python's


class RandomState:
    """The state of all global generators when this was made."""

    def __init__(self, device: torch.device, *, quick: bool = False) -> None:
        """Captures; `quick` as this file's beginning says."""
        self._device = device
        self._cpu = torch.get_rng_state()
        self._accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        self._python = _python_seen.state_of(_raw_python() if quick else None, random.getstate)
        numpy = numpy_random()
        self._numpy = None
        if numpy is not None:
            state = _numpy_seen.state_of(_raw_numpy(numpy) if quick else None, numpy.get_state)
            # Of a bit generator other than numpy's standard one a dict is returned; it is the user's to keep.
            self._numpy = state if isinstance(state, tuple) else None
            if self._numpy is not None and self._numpy[3]:
                _numpy_seen.raw = None  # a normal value kept for later may be used up without a change of the bytes

    @property
    def has_numpy(self) -> bool:
        """Whether numpy was loaded when this was made."""
        return self._numpy is not None

    def restore(self) -> None:
        """Sets every generator back."""
        torch.set_rng_state(self._cpu)
        if self._accelerator is not None:
            torch.get_device_module(self._device).set_rng_state(self._accelerator, self._device)
        random.setstate(self._python)
        numpy = numpy_random()
        if numpy is not None and self._numpy is not None:
            numpy.set_state(self._numpy)
            _numpy_seen.raw = None  # it may have the same bytes by another way: look at it in full the next time

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        version, words, gauss = self._python
        numpy: dict[str, Any] | None = None
        if self._numpy is not None:
            kind, key, place, has_gauss, cached = self._numpy
            numpy = {
                "kind": str(kind),
                "key": torch.tensor([int(word) for word in key]),
                "place": int(place),
                "has_gauss": int(has_gauss),
                "cached": float(cached),
            }
        return {
            "torch": self._cpu,
            "device": str(self._device.type),
            "accelerator": self._accelerator,
            "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
            "numpy": numpy,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> "RandomState":
        """The generators that gave `state`; that of another kind of device cannot go on here, and is left as it is."""
        made = cls.__new__(cls)
        made._device, made._cpu = device, state["torch"]
        made._accelerator = state["accelerator"] if state["device"] == device.type else None
        python, numpy = state["python"], state["numpy"]
        made._python = (python["version"], tuple(python["words"].tolist()), python["gauss"])
        made._numpy = None
        if numpy is not None:
            key = numpy["key"].tolist()
            made._numpy = (numpy["kind"], key, numpy["place"], numpy["has_gauss"], numpy["cached"])
        return made


class _Seen:
    """A generator's state as it was copied last, and the bytes that it was copied from."""

    def __init__(self) -> None:
        self.raw: Any = None
        self._state: Any = None

    def state_of(self, raw: Any, copy: Callable[[], Any]) -> Any:
        """The state; copied anew unless `raw` is what it was. None: nobody knows whether it has changed."""
        if raw is None or raw != self.raw:
            self.raw, self._state = raw, copy()
        return self._state


_python_seen, _numpy_seen = _Seen(), _Seen()
_INSIDE = object.__basicsize__  # where CPython's own generator keeps its words
_KEPT_INSIDE = sys.implementation.name == "cpython" and _random.Random.__basicsize__ >= _INSIDE + _MT19937_BYTES


def _raw_python() -> Any:
    generator: Any = getattr(random.getstate, "__self__", None)
    if not _KEPT_INSIDE or type(generator) is not random.Random:
        return None
    inside = ctypes.string_at(id(generator) + _INSIDE, _random.Random.__basicsize__ - _INSIDE)
    return vars(generator)["gauss_next"], inside


def _raw_numpy(numpy: Any) -> bytes | None:
    generator: Any = getattr(getattr(numpy.mtrand, "_rand", None), "_bit_generator", None)
    if type(generator).__name__ != "MT19937":
        return None
    return ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)


def numpy_random() -> Any:
    """numpy.random, where something has loaded numpy, which loads that part of itself only when it is asked for."""
    return getattr(sys.modules.get("numpy"), "random", None)


def seed_everything(seed: int, *, cpu_only: bool = False) -> None:
    """Seeds torch on every device (or on the CPU alone), Python, and numpy where it is loaded."""
    if cpu_only:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every accelerator too
    else:
        torch.manual_seed(seed)
    random.seed(seed)
    numpy = numpy_random()
    if numpy is not None:
        numpy.seed(seed % 2**32)
        _numpy_seen.raw = None
