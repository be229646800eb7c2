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

from autoaccum.errors import PlanError
from autoaccum.files import read_json
from autoaccum.searching.recipe import FIT, Recipe

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
    params, fit = _settings(path, values, "params"), _settings(path, values, "fit")
    for name in fit:
        if name not in FIT:
            raise _damaged(path, f"fit has {name!r}, which no search saves")
    for name in ("lr_batch", "max_steps", "epochs"):
        _whole(path, fit, name, 1, 2**53)
    _whole(path, fit, "seed", -(2**63), 2**64 - 1)
    rate = fit.get("lr", 1.0)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
        raise _damaged(path, f"fit has lr={rate!r:.40}")
    missing = [name for name in ("seed", "threads") if name not in values]
    if missing:
        raise _damaged(path, f"it lacks {' and '.join(missing)}")
    _whole(path, values, "seed", 0, 2**64 - 1)
    _whole(path, values, "threads", 1, MOST_THREADS)
    return Best(os.fspath(path), params, fit, values["seed"], values["threads"])


def _settings(path: str | os.PathLike[str], values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object of plain values, by name."""
    found = values.get(name)
    if not isinstance(found, dict):
        raise _damaged(path, f"its {name} are {found!r:.40}")
    for key, value in found.items():
        if not key.isidentifier() or not isinstance(value, (bool, int, float, str, type(None))):
            raise _damaged(path, f"its {name} have {key[:40]}={value!r:.40}")
    return dict(found)


def _whole(path: str | os.PathLike[str], values: Mapping[str, Any], name: str, least: int, most: int) -> None:
    value = values.get(name, least)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _damaged(path, f"{name} is {value!r:.40}, not a whole number from {least} to {most}")


def _damaged(path: str | os.PathLike[str], what: str) -> PlanError:
    return PlanError(f"{path}: the search's result is damaged: {what}; save it anew (SearchResult.save, search --save)")
