"""A search as every one of its workers gets it, the study that belongs to it, and one training of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoaccum.searching.extra import make_pruner
from autoaccum.searching.recipe import Recipe
from autoaccum.searching.samplers import make_sampler
from autoaccum.searching.space import Space
from autoaccum.searching.storage import open_storage, without_password
from autoaccum.searching.study import open_study
from autoaccum.searching.study_trial import Finished, Trainer
from autoaccum.searching.terms import Terms

__all__ = ["Job", "open_job", "train_once"]


@dataclass(frozen=True)
class Job:
    """A search, as every one of its workers gets it; can be pickled where the setup can."""

    recipe: Recipe
    space: Space
    terms: Terms
    n_trials: int
    storage: Any
    study_name: str
    folder: Path
    sampler: Any
    pruner: Any
    defaults: dict[str, Any]
    """Of fit's arguments, such as the device of this worker, where the setup says nothing."""
    first: Mapping[str, Any] = field(default_factory=dict)
    """The setup's own values of what is searched: the first trial has them."""
    sharing: int = 1
    """Workers that have shared out the free memory."""

    @property
    def share(self) -> str | None:
        """Where a memory budget comes from that is among the defaults."""
        return None if "memory" not in self.defaults else f"what is free, shared out over {self.sharing} workers"

    @property
    def storage_name(self) -> str:
        """For messages."""
        return without_password(str(self.storage)) if self.storage is not None else str(self.folder / "journal.log")


def open_job(job: Job, *, resume: bool = True) -> Any:
    """The job's study, with its pruner and sampler."""
    storage = open_storage(job.storage, job.folder)
    study = open_study(storage, job.study_name, job.space, job.terms, shown=job.storage_name, resume=resume)
    study.pruner = make_pruner(job.pruner, job.terms.amount)
    study.sampler = make_sampler(job.sampler, seed=job.terms.seed, n_trials=job.n_trials, first=job.first)
    return study


def train_once(job: Job, trainer: Trainer, params: dict[str, Any], **listeners: Any) -> Finished:
    """Builds and trains one trial's model, on each rank of a group alike."""
    job.recipe.check_names(params)
    arguments = job.recipe.build(params)
    given = {name: value for name, value in job.defaults.items() if arguments.get(name) is None}
    return trainer.train({**arguments, **given}, **listeners)
