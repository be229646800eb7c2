"""The best trial's weights, kept as a file; those of all others are cleaned away.

A trial that beats the best so far writes its weights before it is told as complete: whenever a trial is the best of its
study, its file is whole. The file's name stands in its trial before the file is there, with a part that nobody guesses:
what a kill leaves behind goes at the next cleaning, and no file of the user's ever does.
"""

import re
import secrets
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoaccum.files import whole_file

__all__ = ["best_trial", "clean", "path_of", "save_weights"]

_ATTRIBUTE = "autoaccum.weights"
_NAME = re.compile(r"trial-[0-9]+-[0-9a-f]{16}\.pt")  # others may write to the study: it leads to no other file


def path_of(folder: Path, trial: Any) -> Path | None:
    """The file of a trial's weights; None where there never was one."""
    name = trial.user_attrs.get(_ATTRIBUTE)
    return folder / name if isinstance(name, str) and _NAME.fullmatch(name) else None


def save_weights(model: nn.Module, folder: Path, trial: Any) -> None:
    """The model's `state_dict()`, on the CPU: whole on the disk, or not there."""
    state = {
        name: value.detach().cpu() if isinstance(value, torch.Tensor) else value
        for name, value in model.state_dict().items()
    }
    name = f"trial-{trial.number}-{secrets.token_hex(8)}.pt"
    trial.set_user_attr(_ATTRIBUTE, name)
    with whole_file(folder / name) as file:
        torch.save(state, file)


def clean(folder: Path, study: Any) -> None:
    """Removes the weights of all trials that have ended but the best one's."""
    best = best_trial(study)
    for trial in study.get_trials(deepcopy=False):
        path = path_of(folder, trial)
        if path is not None and trial.state.is_finished() and (best is None or trial.number != best.number):
            path.unlink(missing_ok=True)


def best_trial(study: Any) -> Any:
    """The best complete trial, the first of equals; None while there is none."""
    sign = 1.0 if study.direction.name == "MINIMIZE" else -1.0
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    return min(done, key=lambda trial: (sign * trial.value, trial.number), default=None)
