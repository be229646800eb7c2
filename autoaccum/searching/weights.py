"""The best trial's weights, kept as a file; those of all others are cleaned away.

A trial that beats the best so far writes its weights before it is told as complete: whenever a trial is the best of its
study, its file is whole. What is left over by a kill is no best trial's, and goes at the next cleaning.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoaccum.files import whole_file

__all__ = ["best_trial", "clean", "path_of", "save_weights"]


def path_of(folder: Path, number: int) -> Path:
    """The file of a trial's weights."""
    return folder / f"trial-{number}.pt"


def save_weights(model: nn.Module, path: Path) -> None:
    """The model's `state_dict()`, on the CPU: whole on the disk, or not there."""
    state = {
        name: value.detach().cpu() if isinstance(value, torch.Tensor) else value
        for name, value in model.state_dict().items()
    }
    with whole_file(path) as file:
        torch.save(state, file)


def clean(folder: Path, kept: set[int]) -> None:
    """Removes the weights of all trials but those of these numbers."""
    for path in folder.glob("trial-*.pt"):
        match = re.fullmatch(r"trial-(\d+)\.pt", path.name)
        if match and int(match[1]) not in kept:
            path.unlink(missing_ok=True)


def best_trial(study: Any) -> Any:
    """The best complete trial, the first of equals; None while there is none."""
    sign = 1.0 if study.direction.name == "MINIMIZE" else -1.0
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    return min(done, key=lambda trial: (sign * trial.value, trial.number), default=None)
