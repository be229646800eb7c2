"""Values out of a checkpoint, each checked where it is read: a right checksum says nothing of what was saved."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from autoaccum.errors import CheckpointError

__all__ = ["Fields", "loading"]

_REMEDY = "it is not of this program, or of another version: go on from another checkpoint, or resume=False"


class Fields:
    """A mapping in a checkpoint."""

    def __init__(self, values: Any, where: str = "the checkpoint") -> None:
        """`where` names it in messages; a CheckpointError where it is no mapping."""
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{where} is a {type(values).__name__} and not a dict: {_REMEDY}")
        self._values, self._where = values, where

    def get(self, name: str, *kinds: type) -> Any:
        """The value of this name, of one of these types, else a CheckpointError; None only where `NoneType` is among
        them.
        """
        if name not in self._values:
            raise CheckpointError(f"{self._where} has no {name!r}: {_REMEDY}")
        value = self._values[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise CheckpointError(f"{self._where} has {name}={value!r:.40}, not {wanted}: {_REMEDY}")
        return value

    def count(self, name: str) -> int:
        """A whole number from 0 to 2**62, else a CheckpointError."""
        value: int = self.get(name, int)
        if not 0 <= value < 2**62:
            raise CheckpointError(f"{self._where} has {name}={value!r:.40}, which counts nothing: {_REMEDY}")
        return value

    def inner(self, name: str) -> "Fields":
        """The mapping of this name, else a CheckpointError."""
        return Fields(self.get(name, Mapping), f"{self._where}'s {name}")


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
        raise CheckpointError(f"the checkpoint's {what} cannot be put back ({short}): {_REMEDY}") from error
