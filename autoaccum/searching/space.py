"""What is searched, in plain terms: ranges as tuples, choices as lists; or a function of Optuna's trial.

    {"lr": (1e-4, 1e-1, "log"), "weight_decay": [0, 1e-4, 1e-2], "layers": (2, 6)}

A tuple of two integers is a range of integers, both ends included; with a float in it, of floats. A list is a set of
choices. Everything is checked before the first trial, with the name of the parameter in each error.

On the command line the same is written as text: lr=1e-4:1e-1:log, weight_decay=0,1e-4,1e-2, layers=2:6. A comma makes
choices, a colon a range, neither of them one fixed value.
"""

import json
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from autoaccum.checks import check_kind
from autoaccum.errors import PlanError, SetupError, shown
from autoaccum.planning.split import whole
from autoaccum.searching.extra import optuna

__all__ = ["Space", "read_space", "samples_in", "space_of_texts"]

WRITTEN = "write NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=CHOICE,CHOICE,..., such as lr=1e-4:1e-1:log"
EXAMPLE = 'write (low, high), (low, high, "log") or a list of choices, such as {"lr": (1e-4, 1e-1, "log")}'
COUNTS = {"target_batch", "micro_batch", "max_batch"}


@dataclass(frozen=True)
class Space:
    """The parameters by name, or a function that draws them.

    Attributes:
        parts: Optuna's distributions; empty where there is a function.
        function: `f(trial) -> dict`; None where there are parts.
    """

    parts: Mapping[str, Any]
    function: Callable[[Any], Mapping[str, Any]] | None = None

    def suggest(self, trial: Any) -> dict[str, Any]:
        """The parameters of one trial."""
        if self.function is None:
            return {name: _suggest(trial, name, part) for name, part in self.parts.items()}
        found = self.function(trial)
        example = '{"lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True)}'
        check_kind("what space returned", found, Mapping, f"a dict of parameters, such as {example}")
        return dict(found)

    def describe(self) -> Any:
        """Plain values, by which two searches are seen to have the same space."""
        if self.function is not None:
            return f"function {getattr(self.function, '__qualname__', type(self.function).__name__)}"
        to_json = optuna.distributions.distribution_to_json
        return {name: json.loads(to_json(part))["attributes"] for name, part in self.parts.items()}

    def within(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `values` that a trial could be given, by the name of their parameter."""
        return {
            name: values[name] for name, part in self.parts.items() if name in values and _holds(part, values[name])
        }

    def largest(self, name: str) -> Any:
        """The largest number that a parameter can be; None where it is not searched, or by a function."""
        return max(_ends(self.parts[name])) if name in self.parts else None


def _suggest(trial: Any, name: str, part: Any) -> Any:
    if hasattr(part, "choices"):
        return trial.suggest_categorical(name, part.choices)
    kind = trial.suggest_int if isinstance(part.low, int) else trial.suggest_float
    return kind(name, part.low, part.high, log=part.log)


def _ends(part: Any) -> tuple[Any, ...]:
    """The choices, or the ends of the range."""
    return tuple(part.choices) if hasattr(part, "choices") else (part.low, part.high)


def _holds(part: Any, value: Any) -> bool:
    if hasattr(part, "choices"):
        return any(type(value) is type(choice) and value == choice for choice in part.choices)
    kind = int if isinstance(part.low, int) else (int, float)
    return isinstance(value, kind) and not isinstance(value, bool) and part.low <= value <= part.high


def read_space(space: Any) -> Space:
    """The space that the user wrote; a SetupError names the parameter that is neither a range nor choices, and why."""
    if callable(space):
        return Space({}, space)
    if not isinstance(space, Mapping) or not space:
        raise SetupError(f"space={shown(space)} has no parameters: {EXAMPLE}")
    parts = {name: _part(name, value) for name, value in space.items()}
    for name in COUNTS & parts.keys():
        for value in _ends(parts[name]):
            samples_in(f"space's {name}", value)
    return Space(parts)


def samples_in(name: str, value: Any) -> int:
    """A number of samples; a SetupError where it is not a whole one above 0."""
    try:
        return whole(name, value, 1)
    except PlanError as error:
        raise SetupError(str(error)) from None


def _part(name: Any, value: Any) -> Any:
    """The distribution of one parameter."""
    if not isinstance(name, str) or not name.isidentifier():
        raise SetupError(f"space has a parameter {name!r}: names are keywords of fit or of the setup, such as 'lr'")
    try:
        if isinstance(value, list):
            return _choices(list(map(_number, value)))
        if isinstance(value, tuple) and len(value) in (2, 3):
            return _range(*map(_number, value))
    except ValueError as error:  # also Optuna's own: no choices, or the logarithm of what is not above 0
        raise SetupError(f"space[{name!r}]={shown(value)}: {error}") from error
    raise SetupError(f"space[{name!r}]={shown(value)} is neither a range nor choices: {EXAMPLE}")


def _number(value: Any) -> Any:
    """Numbers of NumPy and other packages as Python's own, which must be finite; all else as it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    if not abs(number) <= sys.float_info.max:  # unlike math.isfinite, for whole numbers of any length
        raise ValueError(f"{shown(number)} is not a finite number")
    return number


def _choices(values: list[Any]) -> Any:
    for value in values:
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise ValueError(
                f"{value!r} is no choice: choices are kept in the study as numbers, texts, True, False or None; give a "
                "name there, and look it up in the setup"
            )
    if len(set(values)) < len(values):
        raise ValueError("a choice twice (1, 1.0 and True are equal): leave one out")
    return optuna.distributions.CategoricalDistribution(values)


def _range(low: Any, high: Any, *word: Any) -> Any:
    for end in (low, high):
        if isinstance(end, bool) or not isinstance(end, (int, float)):
            raise ValueError(f"{end!r} is not a number; for choices write a list")
    if word not in ((), ("log",)):
        raise ValueError('the third entry of a range can only be "log"')
    if low >= high:
        raise ValueError(f"an empty range: {low} is not below {high}; write (low, high)")
    distributions = optuna.distributions
    are_whole = isinstance(low, int) and isinstance(high, int)
    kind = distributions.IntDistribution if are_whole else distributions.FloatDistribution
    return kind(low, high, log=bool(word))


def space_of_texts(texts: Iterable[str]) -> dict[str, Any]:
    """The space as the command line has it, one text a parameter, in the terms of `read_space`, which checks it."""
    space: dict[str, Any] = {}
    for text in texts:
        name, _, written = (part.strip() for part in text.partition("="))
        if name in space:
            raise SetupError(f"{text!r}: the parameter {name!r} is given twice; leave one out")
        is_range = ":" in written and "," not in written
        parts = [part.strip() for part in written.split(":" if is_range else ",")]
        if not name or "" in parts or (is_range and len(parts) > 3):
            raise SetupError(f"{text!r} is neither a range nor choices: {WRITTEN}")
        space[name] = (*map(_value, parts[:2]), *parts[2:]) if is_range else [_value(part) for part in parts]
    read_space(space)
    return space


def _value(text: str) -> Any:
    """A whole number, a number, a truth value, None, or the text itself."""
    words = {"true": True, "false": False, "none": None}
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return words.get(text.lower(), text)
