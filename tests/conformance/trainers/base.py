"""What an adapter is, and how a trainer that is not installed is left out."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from itertools import islice
from typing import Any

from tests.conformance.problems import Problem, Run

__all__ = ["NotOffered", "Trainer", "chunks"]


class NotOffered(Exception):
    """The trainer has nothing for such a case; the message says what a person does instead."""


class Trainer(ABC):
    """One trainer.

    Attributes:
        name: the column of the table.
        package: what must be importable, and is asked for its version.
        distribution: its name among the installed distributions.
        ours: autoaccum must pass; a peer's figure is recorded, whatever it is.
        of_pairs: it is no trainer of any model, and only asked by name.
    """

    name: str
    package: str
    distribution: str
    ours: bool = False
    of_pairs: bool = False

    @property
    def missing(self) -> str | None:
        """Why it cannot be measured here; None where it can."""
        if importlib.util.find_spec(self.package) is None:
            return f"{self.distribution} is not installed: `make conformance` installs the trainers to compare with"
        return None

    @property
    def version(self) -> str:
        """The version installed here."""
        return version(self.distribution)

    @abstractmethod
    def train(self, problem: Problem) -> Run:
        """Trains as a user would, in this process or as one of torchrun's ranks."""


def chunks(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to `size` batches."""
    iterator = iter(batches)
    while chunk := list(islice(iterator, size)):
        yield chunk
