"""A search as every one of its workers gets it, the study that belongs to it, and one training of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from autoaccum.ranks import here
from autoaccum.searching.recipe import Recipe
from autoaccum.searching.samplers import make_pruner
from autoaccum.searching.space import Space
from autoaccum.searching.storage import open_storage, place_of
from autoaccum.searching.study import open_study
from autoaccum.searching.study_trial import Trainer
from autoaccum.searching.terms import Terms

__all__ = ["Job", "tell"]


@dataclass(frozen=True)
class Job:
    """A search; can be pickled where the setup can.

    Attributes:
        recipe, space, terms: what is called, what is drawn, and what all trials have in common.
        n_trials, storage, study_name, sampler, pruner: as `search` got them.
        folder: of the run.
        first: the setup's own values of what is searched: the first trial has them.
        device: of this worker, where the setup says nothing.
        memory: this worker's part of the memory that is free, in bytes, where the setup says nothing.
        workers: how many share that memory.
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
    device: str | None = None
    memory: int | None = None
    workers: int = 1

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

    def train(self, trainer: Trainer, params: dict[str, Any], **listeners: Any) -> tuple[float, dict[str, Any], Any]:
        """What `Trainer.train` gives for one trial, on each rank of a group alike."""
        self.recipe.check_names(params)
        arguments = self.recipe.build(params)
        for name in ("device", "memory"):
            if arguments.get(name) is None and getattr(self, name) is not None:
                arguments[name] = getattr(self, name)
        return trainer.train(arguments, **listeners)


def tell(message: Any = None) -> Any:
    """Rank 0's message, on every rank of the group that trains a trial together; plain values.

    Only rank 0 knows the study. It tells the others each trial's parameters and, at the end, the result.
    """
    box = [message]
    if here().size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]
