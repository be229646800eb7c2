"""What is searched, in plain terms: ranges as tuples, choices as lists; or a function of Optuna's trial.

    {"lr": (1e-4, 1e-1, "log"), "weight_decay": [0, 1e-4, 1e-2], "layers": (2, 6)}

A tuple of two integers is a range of integers, both ends included; with a float in it, of floats. A list is a set of
choices. Everything is checked before the first trial, with the name of the parameter in each error.

On the command line the same is written as text: lr=1e-4:1e-1:log, weight_decay=0,1e-4,1e-2, layers=2:6. A comma makes
choices, a colon a range, neither of them one fixed value.
"""

import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autoaccum.errors import SetupError, shown

__all__ = ["Choices", "Range", "Space", "read_space", "space_of_texts"]

WRITTEN = "write NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=CHOICE,CHOICE,..., such as lr=1e-4:1e-1:log"
EXAMPLE = 'write (low, high), (low, high, "log") or a list of choices, such as {"lr": (1e-4, 1e-1, "log")}'


COUNTS = {"target_batch", "micro_batch", "max_batch"}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; evenly over their logarithms where `log`."""

    low: float
    high: float
    log: bool

    def suggest(self, trial: Any, name: str) -> Any:
        """A number of the trial's choice; an integer where both ends are."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        """Whether a trial could be given this value."""
        kind = int if isinstance(self.low, int) and isinstance(self.high, int) else (int, float)
        return isinstance(value, kind) and not isinstance(value, bool) and self.low <= value <= self.high

    def describe(self) -> list[Any]:
        """Plain values, for comparing with another search's."""
        return [self.low, self.high, *(["log"] if self.log else [])]


@dataclass(frozen=True)
class Choices:
    """One of `values`."""

    values: tuple[Any, ...]

    def suggest(self, trial: Any, name: str) -> Any:
        """A value of the trial's choice."""
        return trial.suggest_categorical(name, list(self.values))

    def holds(self, value: Any) -> bool:
        """Whether a trial could be given this value."""
        return any(type(value) is type(choice) and value == choice for choice in self.values)

    def describe(self) -> dict[str, Any]:
        """Plain values, for comparing with another search's."""
        return {"choices": list(self.values)}


@dataclass(frozen=True)
class Space:
    """The parameters by name, or a function that draws them.

    Attributes:
        parts: empty where there is a function.
        function: `f(trial) -> dict`; None where there are parts.
    """

    parts: Mapping[str, Range | Choices]
    function: Callable[[Any], Mapping[str, Any]] | None = None

    def suggest(self, trial: Any) -> dict[str, Any]:
        """The parameters of one trial.

        Raises:
            SetupError: the user's function returned something other than a dict.
        """
        if self.function is None:
            return {name: part.suggest(trial, name) for name, part in self.parts.items()}
        found = self.function(trial)
        if not isinstance(found, Mapping):
            raise SetupError(
                f"space returned {type(found).__name__}: a function of Optuna's trial returns a dict of parameters, "
                'such as {"lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True)}'
            )
        return dict(found)

    def describe(self) -> Any:
        """Plain values, by which two searches are seen to have the same space."""
        if self.function is not None:
            return f"function {getattr(self.function, '__qualname__', type(self.function).__name__)}"
        return {name: part.describe() for name, part in self.parts.items()}

    def within(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `values` that a trial could be given, by the name of their parameter."""
        return {name: values[name] for name, part in self.parts.items() if name in values and part.holds(values[name])}

    def largest(self, name: str) -> Any:
        """The largest number that a parameter can be; None where it is not searched, or by a function."""
        part = self.parts.get(name)
        if part is None:
            return None
        return part.high if isinstance(part, Range) else max(part.values)


def read_space(space: Any) -> Space:
    """The space that the user wrote.

    Raises:
        SetupError: an empty range, a logarithmic one that does not stay above 0, or something that is neither a range
            nor choices; the parameter is named.
    """
    if callable(space):
        return Space({}, space)
    if not isinstance(space, Mapping) or not space:
        raise SetupError(f"space={shown(space)} has no parameters: {EXAMPLE}")
    parts = {_name(name): _part(name, value) for name, value in space.items()}
    for name in COUNTS & parts.keys():
        _check_counts(name, parts[name])
    return Space(parts)


def _check_counts(name: str, part: Range | Choices) -> None:
    ends = (part.low, part.high) if isinstance(part, Range) else part.values
    for value in ends:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SetupError(f"space has {name}={shown(value)}: it counts samples, so give whole numbers of 1 or more")


def space_of_texts(texts: Iterable[str]) -> dict[str, Any]:
    """The space as it is written on the command line, in the terms of `read_space`, which has checked it.

    Args:
        texts: one a parameter, NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=CHOICE,CHOICE,...

    Raises:
        SetupError: not of these forms, a parameter given twice, or what `read_space` refuses.
    """
    space: dict[str, Any] = {}
    for text in texts:
        name, equals, written = text.partition("=")
        name = name.strip()
        if not equals or not name or not written.strip():
            raise SetupError(f"{text!r} says no values for a parameter: {WRITTEN}")
        if name in space:
            raise SetupError(f"{text!r}: the parameter {name!r} is given twice; leave one out")
        space[name] = _written(text, written)
    read_space(space)
    return space


def _written(text: str, written: str) -> tuple[Any, ...] | list[Any]:
    """A range or choices, from what stands behind the equals sign."""
    ends = [part.strip() for part in written.split(":")]
    is_range = "," not in written and len(ends) > 1
    parts = ends if is_range else [part.strip() for part in written.split(",")]
    if "" in parts or (is_range and len(parts) > 3):
        raise SetupError(f"{text!r} is neither a range nor choices: {WRITTEN}")
    if not is_range:
        return [_value(part) for part in parts]
    return (*map(_value, parts[:2]), *parts[2:])


def _value(text: str) -> Any:
    """A whole number, a number, a truth value, None, or the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise SetupError(f"space has a parameter {name!r}: names are keywords of fit or of the setup, such as 'lr'")
    return name


def _part(name: str, value: Any) -> Range | Choices:
    if isinstance(value, list):
        return _choices(name, value)
    if isinstance(value, tuple) and len(value) in (2, 3):
        return _range(name, value)
    raise SetupError(f"space[{name!r}]={shown(value)} is neither a range nor choices: {EXAMPLE}")


def _choices(name: str, values: list[Any]) -> Choices:
    if not values:
        raise SetupError(f"space[{name!r}] has no choices: give at least one, such as [0, 1e-4]")
    values = [_plain(value) for value in values]
    for value in values:
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise SetupError(
                f"space[{name!r}] has the choice {value!r}: choices are kept in the study as numbers, texts, True, "
                "False or None; give a name there, and look it up in the setup"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise SetupError(f"space[{name!r}] has the choice {value!r}: numbers must be finite")
    if len(set(values)) < len(values):
        raise SetupError(
            f"space[{name!r}]={shown(values)} has a choice twice (1, 1.0 and True are equal): leave one out"
        )
    return Choices(tuple(values))


def _plain(value: Any) -> Any:
    """Numbers of NumPy and other packages as Python's own; all else as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _is_finite(value: float) -> bool:
    return abs(value) <= sys.float_info.max  # unlike math.isfinite, for whole numbers of any length


def _range(name: str, value: tuple[Any, ...]) -> Range:
    low, high, *word = map(_plain, value)
    for end in (low, high):
        if isinstance(end, bool) or not isinstance(end, (int, float)) or not _is_finite(end):
            raise SetupError(
                f"space[{name!r}]={shown(value)}: {end!r} is not a finite number; for choices write a list"
            )
    if word not in ([], ["log"]):
        raise SetupError(f'space[{name!r}]={shown(value)}: the third entry of a range can only be "log"')
    if low >= high:
        raise SetupError(
            f"space[{name!r}]={shown(value)} is an empty range: {low} is not below {high}; write (low, high)"
        )
    if word and low <= 0:
        raise SetupError(
            f"space[{name!r}]={shown(value)} is logarithmic and goes down to {low}: give a low end above 0, such as "
            f"{high / 1e4:g}, or leave out the word log"
        )
    return Range(low, high, bool(word))
