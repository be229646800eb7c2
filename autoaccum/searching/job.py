"""A search as every one of its workers gets it, and the study that belongs to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoaccum.searching.recipe import Recipe
from autoaccum.searching.samplers import make_pruner
from autoaccum.searching.space import Space
from autoaccum.searching.storage import open_storage, place_of
from autoaccum.searching.study import open_study
from autoaccum.searching.terms import Terms

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """A search; can be pickled where the setup can.

    Attributes:
        recipe, space, terms: what is called, what is drawn, and what all trials have in common.
        n_trials, storage, study_name, sampler, pruner: as `search` got them.
        folder: of the run.
        first: the setup's own values of what is searched: the first trial has them.
        workers: how many share the machine.
        threads, device, memory: a worker's part of it; the last (bytes) two where the setup says nothing.
    """

    recipe: Recipe
    space: Space
    terms: Terms
    n_trials: int
    storage: Any
    study_name: str
    folder: Path
    sampler: Any
    pruner: Any
    first: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1
    threads: int = 1
    device: str | None = None
    memory: int | None = None

    @property
    def place(self) -> str:
        """Where the study is, for messages."""
        return place_of(self.storage, self.folder)

    def open(self, *, resume: bool = True) -> Any:
        """The study, with its pruner."""
        storage = open_storage(self.storage, self.folder)
        study = open_study(storage, self.study_name, self.space, self.terms, shown=self.place, resume=resume)
        study.pruner = make_pruner(self.pruner, self.terms.amount)
        return study
