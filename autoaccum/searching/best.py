"""best.json read again: from the file that a search saved, and the setup, to the training that was the best.

The value comes out the same to the last digit where hardware and versions are the same: the generators are seeded
before the setup as in the search, and on a CPU as many threads add up the numbers.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoaccum.errors import PlanError, shown
from autoaccum.files import read_json
from autoaccum.searching.recipe import Recipe
from autoaccum.searching.study_trial import FIT

__all__ = ["Best", "read_best"]

MOST_THREADS = 1024  # PyTorch dies of many more, without a word


@dataclass(frozen=True)
class Best:
    """What a search saved beside the plan.

    Attributes:
        path: the file, which is a plan's file as well.
        params: of the best trial.
        fit: other arguments of its training: lr, seed, epochs or max_steps.
        seed: that was set before the setup was called.
        threads: that PyTorch used.
    """

    path: str
    params: dict[str, Any]
    fit: dict[str, Any]
    seed: int
    threads: int

    def arguments(self, setup: Callable[..., Mapping[str, Any]]) -> dict[str, Any]:
        """fit's arguments for the same training; sets the number of threads where it runs on a CPU.

        Raises:
            SetupError: the setup does not take the parameters, or does not return fit's arguments.
        """
        recipe = Recipe(setup, self.seed)
        recipe.check_names(self.params)
        arguments = recipe.build(self.params, whole=True)
        if not torch.cuda.is_available():
            torch.set_num_threads(self.threads)
        arguments.pop("target_batch", None)  # the plan's
        if "max_steps" in self.fit:
            arguments.pop("epochs", None)
        return {**arguments, **self.fit, "plan": self.path}


def _are_plain(values: Any) -> bool:
    """Whether these are plain values by the names of arguments."""
    kinds = (bool, int, float, str, type(None))
    return isinstance(values, dict) and all(
        name.isidentifier() and isinstance(value, kinds) for name, value in values.items()
    )


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


_HOLDS: dict[str, Callable[[Any], bool]] = {
    "params": _are_plain,
    "fit": lambda values: _are_plain(values) and set(values) <= set(FIT),  # whose values `fit` itself looks at
    "seed": lambda value: _is_whole(value, 0, 2**64 - 1),
    "threads": lambda value: _is_whole(value, 1, MOST_THREADS),
}


def read_best(path: str | os.PathLike[str]) -> Best | None:
    """What the file has beside a plan; None where it is a plan alone, or cannot be read, which `fit` will say.

    Raises:
        PlanError: it was saved by a search, and is damaged.
    """
    try:
        values = read_json(Path(path))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or "params" not in values:
        return None
    for name, holds in _HOLDS.items():
        if not holds(values.get(name)):
            raise PlanError(
                f"{path}: the search's result is damaged: its {name} cannot be {shown(values.get(name))}; save it anew "
                "(SearchResult.save, search --save)"
            )
    return Best(os.fspath(path), **{name: values[name] for name in _HOLDS})
