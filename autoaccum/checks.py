"""Values that users give, refused in one way: the name, the value, and what to give instead."""

import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from autoaccum.errors import PlanError, SetupError

__all__ = ["check_counts", "check_kind", "check_seed", "check_switches", "listed", "one_of", "shown"]


_SHOWN = 80  # characters of a value that a message repeats


class _Beginning(reprlib.Repr):
    """The beginning of a value's repr, however large, deep or broken the value is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = _SHOWN
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write out an integer of more than some 4300 digits."""
        if abs(x) < 10**40:
            return repr(x)
        return f"an integer of {x.bit_length()} bits"


_BEGINNING = _Beginning()


def shown(value: Any) -> str:
    """A value for a message, in one line: its repr, of which at most the beginning stands."""
    text = " ".join(_BEGINNING.repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def check_counts(**counts: Any) -> None:
    """Refuses anything but None or a whole number of 1 or more, whatever the name.

    Raises:
        PlanError: naming the value.
    """
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise PlanError(f"{name}={value!r}: give a whole number of 1 or more, such as 256")


def check_switches(**switches: Any) -> None:
    """Refuses anything but True and False, whatever the name: a word would be taken for True.

    Raises:
        SetupError: naming the value.
    """
    for name, value in switches.items():
        one_of(name, value, (True, False))


def check_seed(seed: Any) -> None:
    """Refuses anything but None or a whole number that torch's generators take: from −2**63 to 2**64 − 1.

    Raises:
        SetupError: naming the value.
    """
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64):
        raise SetupError(f"seed={seed!r}: give a whole number of at most 64 bits, such as 0")


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Refuses a value of another type; `wanted` says in words what to give.

    Raises:
        SetupError: naming the value.
    """
    if not isinstance(value, kinds):
        raise SetupError(f"{name}={value!r} is of type {type(value).__name__}: give {wanted}")


def listed(name: str, functions: Any) -> list[Callable[..., Any]]:
    """The functions of an event that were given, in a list.

    Raises:
        SetupError: not an iterable, or something in it cannot be called; it is named.
    """
    wanted = f"functions of an event in a list, such as {name}=[print]"
    check_kind(name, functions, Iterable, wanted)
    found = list(functions)
    for each in found:
        if not callable(each):
            raise SetupError(f"{name} has {each!r} in it, which cannot be called: give {wanted}")
    return found


def one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuses a value that is none of the choices.

    Raises:
        SetupError: naming the value and the choices.
    """
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise SetupError(f"{name}={value!r}: choose {', '.join(map(repr, choices))}")
