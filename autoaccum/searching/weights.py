"""The best trial's weights, kept as a file; those of all others are cleaned away.

A trial that beats the best so far writes its weights before it is told as complete: whenever a trial is the best of its
study, its file is whole. It is named after the trial's number and beginning, which no trial of another study shares:
what a kill leaves behind goes at the next cleaning, and no file of the user's ever does.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoaccum.files import whole_file

__all__ = ["best_trial", "clean", "path_of", "save_weights"]


def path_of(folder: Path, trial: Any) -> Path:
    """The file of the weights of a trial that has begun, whether it is there or not."""
    return folder / f"trial-{trial.number}-{trial.datetime_start:%Y%m%dT%H%M%S%f}.pt"


def save_weights(model: nn.Module, folder: Path, trial: Any) -> None:
    """The model's `state_dict()`, on the CPU: whole on the disk, or not there."""
    state = {
        name: value.detach().cpu() if isinstance(value, torch.Tensor) else value
        for name, value in model.state_dict().items()
    }
    with whole_file(path_of(folder, trial)) as file:
        torch.save(state, file)


def clean(folder: Path, study: Any) -> None:
    """Removes the weights of all trials that have ended but the best one's."""
    best = best_trial(study)
    for trial in study.get_trials(deepcopy=False):
        ended = trial.state.is_finished() and trial.datetime_start is not None
        if ended and (best is None or trial.number != best.number):
            path_of(folder, trial).unlink(missing_ok=True)


def best_trial(study: Any) -> Any:
    """The best complete trial, the first of equals; None while there is none."""
    sign = 1.0 if study.direction.name == "MINIMIZE" else -1.0
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    return min(done, key=lambda trial: (sign * trial.value, trial.number), default=None)
