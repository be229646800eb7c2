"""Every error the package raises on purpose.

Each says what failed, the numbers, and what to do next. The tree:

    AutoaccumError(Exception)
    ├ ProbeError                  the probe could not answer
    │ ├ NothingFitsError          not even one sample fits in the budget
    │ └ StateNotRestoredError     something a trial touched could not be put back
    ├ DeviceError                 the device is not there, or cannot be used so
    ├ PlanError     (ValueError)  arithmetic that has no answer; names the nearest target that has one
    ├ SetupError    (ValueError)  a model, an optimizer or a setting that cannot be trained with
    ├ LossError     (ValueError)  a loss that is not a finite scalar with a graph, or whose gradient check failed
    ├ DataError     (ValueError)  data that is empty, or whose parts disagree
    ├ CheckpointError             a checkpoint that is damaged or belongs to another training
    └ MissingExtraError (ImportError)  an optional package is not installed

`exit_code` is what the command line ends with. A message repeats at most the beginning of a value: `shown`.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "AutoaccumError",
    "CheckpointError",
    "DataError",
    "DeviceError",
    "LossError",
    "MissingExtraError",
    "NothingFitsError",
    "PlanError",
    "ProbeError",
    "SetupError",
    "StateNotRestoredError",
]


class AutoaccumError(Exception):
    """The base of all errors raised on purpose."""

    exit_code = 1


class ProbeError(AutoaccumError):
    """The probe could not answer."""


class NothingFitsError(ProbeError):
    """Not even a micro-batch of the smallest size fits in the budget.

    `savers` has a row for each memory saver that was looked at, as `ProbeReport.savers`.
    """

    exit_code = 3
    savers: Sequence[Mapping[str, Any]] = ()


class StateNotRestoredError(ProbeError):
    """Something that a trial touched could not be put back; the model must be made anew."""


class DeviceError(AutoaccumError):
    """The device is not there, or cannot do what was asked."""

    exit_code = 4


class PlanError(AutoaccumError, ValueError):
    """The arithmetic has no answer; the message names the nearest target batch that has one."""

    exit_code = 2


class SetupError(AutoaccumError, ValueError):
    """A model, an optimizer or a setting that cannot be trained with."""

    exit_code = 2


class LossError(AutoaccumError, ValueError):
    """The loss is not a finite scalar with a graph, or its accumulated gradient is not the large batch's."""


class DataError(AutoaccumError, ValueError):
    """The data is empty, or its parts disagree."""

    exit_code = 2


class CheckpointError(AutoaccumError):
    """The checkpoint is damaged, or belongs to another training."""


class MissingExtraError(AutoaccumError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs {package}, which is not installed: pip install "autoaccum[{extra}]"')


class TracebackText(Exception):
    """The cause of an error of another process: its traceback, since its own class need not survive the way."""

    def __init__(self, text: str) -> None:
        super().__init__(f"in another process:\n\n{text}")


_SHOWN = 80  # characters of a value that a message repeats


class _Beginning(reprlib.Repr):
    """The beginning of a value's repr, however large, deep or broken the value is."""

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write out an integer of more than some 4300 digits."""
        if abs(x) < 10**40:
            return repr(x)
        return f"an integer of {x.bit_length()} bits"


_BEGINNING = _Beginning()
_BEGINNING.maxstring = _BEGINNING.maxlong = _BEGINNING.maxother = _SHOWN
_BEGINNING.maxlevel = 3


def shown(value: Any) -> str:
    """A value for a message, in one line: its repr, of which at most the beginning stands."""
    text = " ".join(_BEGINNING.repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
