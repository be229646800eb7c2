"""Values that users give, refused in one way, as a SetupError: the name, the value, and what to give instead.

Counts are refused with a PlanError, as the arithmetic does.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from types import UnionType
from typing import Any, get_args, get_origin

from autoaccum.errors import AutoaccumError, PlanError, SetupError, shown

__all__ = [
    "check_call",
    "check_counts",
    "check_kind",
    "check_seed",
    "check_switches",
    "is_positive",
    "listed",
    "misfit",
    "one_of",
    "plain",
    "refuse_any",
    "typed",
]


def check_counts(**counts: Any) -> None:
    """Refuses anything but None or a whole number of 1 or more, whatever the name."""
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**63):
            raise PlanError(f"{name}={shown(value)}: give a whole number of 1 or more, such as 256")


def check_switches(**switches: Any) -> None:
    """Refuses anything but True and False, whatever the name: a word would be taken for True."""
    for name, value in switches.items():
        one_of(name, value, (True, False))


def refuse_any(reasons: Mapping[str, bool]) -> None:
    """Refuses for the first of the reasons that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise SetupError(reason)


def check_call(name: str, function: Any, arguments: Sequence[str]) -> None:
    """Refuses a function that cannot be called with so many arguments (each in words), before anything runs."""
    error = misfit(function, *arguments)
    if error is not None:
        raise SetupError(
            f"{name}={shown(function)} is called as f({', '.join(arguments)}), which it does not take: {error}"
        ) from error


def misfit(function: Any, *args: Any, **kwargs: Any) -> TypeError | None:
    """Why a function cannot be called so; None where it can, or has no signature to be had: calling it will tell."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        return error
    except ValueError:
        return None
    return None


def is_positive(value: Any) -> bool:
    """Whether it is a number above 0, of any of Python's kinds, that a float can hold; infinity is one, True is not."""
    if isinstance(value, bool) or not isinstance(value, Real) or not value > 0:  # type: ignore[operator]
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def check_seed(seed: Any) -> None:
    """Refuses anything but None or a whole number that torch's generators take: from −2**63 to 2**64 − 1."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64):
        raise SetupError(f"seed={shown(seed)}: give a whole number of at most 64 bits, such as 0")


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Refuses a value of another type; `wanted` says in words what to give."""
    if not isinstance(value, kinds):
        raise SetupError(f"{name}={shown(value)} is of type {type(value).__name__}: give {wanted}")


def listed(name: str, functions: Any) -> list[Callable[..., Any]]:
    """The functions of an event that were given, in a list; a SetupError names what is none."""
    wanted = f"functions of an event in a list, such as {name}=[print]"
    check_kind(name, functions, Iterable, wanted)
    try:
        found = list(functions)
    except TypeError as error:  # a tensor without dimensions says that it can be iterated
        raise SetupError(f"{name}={shown(functions)} cannot be iterated: give {wanted}") from error
    for each in found:
        if not callable(each):
            raise SetupError(f"{name} has {shown(each)} in it, which cannot be called: give {wanted}")
    return found


def one_of(name: str, value: Any, choices: Sequence[Any], kind: type[AutoaccumError] = SetupError) -> None:
    """Refuses a value that is none of the choices, which are named, with an error of a `kind`."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise kind(f"{name}={shown(value)}: choose {', '.join(map(repr, choices))}")


_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("an integer from 0 to 2**53", lambda value: type(value) is int and 0 <= value < 2**53),
    float: ("a finite number", lambda value: type(value) in (int, float) and math.isfinite(value)),
    str: ("a text", lambda value: isinstance(value, str)),
    type(None): ("null", lambda value: value is None),
    tuple: ("a list", lambda value: isinstance(value, (list, tuple))),
    dict: ("an object", lambda value: isinstance(value, Mapping)),
}


def plain(value: Any) -> Any:
    """The value as JSON has it: tuples as lists, results as their `to_dict()`, at any depth."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value.to_dict() if hasattr(value, "to_dict") else value


def typed(value: Any, kind: Any) -> Any:
    """A value that was JSON as its annotation `kind` says: counts, finite floats, texts, None; tuples, dicts, unions.

    Raises:
        TypeError: it is not; its text is what it should be. An OverflowError where it is too large for a float.
    """
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is UnionType:
        for each in inner[1:]:
            with suppress(TypeError):
                return typed(value, each)
        return typed(value, inner[0])
    said, holds = _KINDS[origin]
    if not holds(value):
        raise TypeError(said)
    if not inner:
        return float(value) if origin is float else value
    if origin is dict:
        return {typed(key, inner[0]): typed(part, inner[1]) for key, part in value.items()}
    kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
    if len(kinds) != len(value):
        raise TypeError(f"a list of {len(kinds)}")
    return tuple(map(typed, value, kinds))
