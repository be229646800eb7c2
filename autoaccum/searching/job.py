"""A search as each of its workers gets it: what all trials have in common, and the worker's part of the machine.

Trials are compared at the same number of samples seen, whatever their batch. So a budget is counted in samples: given
as such, or what the setup's own epochs come to. A budget in seconds compares at equal time instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoaccum.searching.recipe import Recipe
from autoaccum.searching.space import Space
from autoaccum.searching.storage import place_of

__all__ = ["TRAIN_LOSS", "Job"]

TRAIN_LOSS = "train_loss"


@dataclass(frozen=True)
class Job:
    """A search; can be pickled where the setup can.

    Attributes:
        recipe, space: what is called, and what is drawn.
        metric, direction: the evaluation's name that is searched on, or "train_loss"; "minimize" or "maximize".
        amount, unit: what a whole trial takes, in "samples" or "ms".
        given: whether the budget was given, instead of following from the setup.
        ceiling: the largest target batch, up to which the probe looks.
        lr_batch: the batch that learning rates are for, where the setup does not say.
        n_trials, storage, study_name, sampler, pruner: as `search` got them.
        folder: of the run.
        first: the setup's own values of what is searched: the first trial has them.
        workers: how many share the machine.
        threads, device, memory: a worker's part of it; the last (bytes) two where the setup says nothing.
    """

    recipe: Recipe
    space: Space
    metric: str
    direction: str
    amount: int
    unit: str
    given: bool
    ceiling: int
    lr_batch: int | None
    n_trials: int
    storage: Any
    study_name: str
    sampler: Any
    pruner: Any
    folder: Path
    first: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1
    threads: int = 1
    device: str | None = None
    memory: int | None = None

    @property
    def place(self) -> str:
        """Where the study is, for messages."""
        return place_of(self.storage, self.folder)

    def comparable(self) -> dict[str, Any]:
        """What two searches must agree in for their values to be comparable."""
        names = ("direction", "metric", "amount", "unit")
        return {
            "space": self.space.describe(),
            "seed": self.recipe.seed,
            **{name: getattr(self, name) for name in names},
        }
