"""best.json read again: from the file that a search saved, and the setup, to the training that was the best.

The value comes out the same to the last digit where hardware and versions are the same: the generators are seeded
before the setup as in the search, and on a CPU as many threads add up the numbers.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from autoaccum.errors import PlanError, shown
from autoaccum.files import read_json
from autoaccum.searching.recipe import Recipe
from autoaccum.searching.study_trial import FIT

__all__ = ["best_arguments"]

MOST_THREADS = 1024  # PyTorch dies of many more, without a word


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


def best_arguments(path: str | os.PathLike[str], setup: Callable[..., Mapping[str, Any]]) -> dict[str, Any] | None:
    """fit's arguments for the training that a search found best; sets the number of threads where it runs on a CPU.

    None where the file is a plan alone, or cannot be read, which `fit` will say.

    Raises:
        PlanError: it was saved by a search, and is damaged.
        SetupError: the setup does not take the parameters, or does not return fit's arguments.
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
    recipe = Recipe(setup, values["seed"])
    recipe.check_names(values["params"])
    arguments = recipe.build(values["params"], whole=True)
    if not torch.cuda.is_available():
        torch.set_num_threads(values["threads"])
    arguments.pop("target_batch", None)  # the plan's
    if "max_steps" in values["fit"]:
        arguments.pop("epochs", None)
    return {**arguments, **values["fit"], "plan": os.fspath(path)}
