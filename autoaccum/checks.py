"""Values that users give, refused in one way: the name, the value, and what to give instead."""

from collections.abc import Sequence
from typing import Any

from autoaccum.errors import PlanError, SetupError

__all__ = ["check_counts", "one_of"]


def check_counts(**counts: Any) -> None:
    """Refuses anything but None or a whole number of 1 or more, whatever the name.

    Raises:
        PlanError: naming the value.
    """
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise PlanError(f"{name}={value!r}: give a whole number of 1 or more, such as 256")


def one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuses a value that is none of the choices.

    Raises:
        SetupError: naming the value and the choices.
    """
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise SetupError(f"{name}={value!r}: choose {', '.join(map(repr, choices))}")
