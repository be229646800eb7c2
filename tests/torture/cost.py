"""What checkpoints every fifty windows cost: of two like trainings one saves, and they run fifty windows in turn."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import autoaccum

__all__ = ["run"]

EVERY = 50


def _training(folder: str | None, width: int, windows: int) -> Iterator[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    x, y = torch.randn(256, 64), torch.randint(0, 10, (256,))
    return iter(autoaccum.prepare(
        model, (x, y), loss=nn.CrossEntropyLoss(), target_batch=128, micro_batch=64, max_steps=windows, seed=0,
        device="cpu", check=False, checkpoint=folder, checkpoint_every=None if folder is None else EVERY,
    ))  # fmt: skip


def _seconds(training: Iterator[Any]) -> float:
    began = time.perf_counter()
    for _ in itertools.islice(training, EVERY):
        pass
    return time.perf_counter() - began


def run(times: int = 15, width: int = 1024) -> dict[str, Any]:
    """The medians of fifty windows, and the median of each pair's ratio; a save is in each fifty of one of the two."""
    with tempfile.TemporaryDirectory(prefix="autoaccum-cost-") as folder:
        trainings = [_training(place, width, EVERY * (times + 2)) for place in (None, folder)]
        for training in trainings:
            _seconds(training)  # what is made once, the folder too
        pairs = [[_seconds(training) for training in trainings] for _ in range(times)]
        for training in trainings:
            training.close()  # type: ignore[attr-defined]  # a generator
    without, with_ = zip(*pairs)
    return {
        "parameters": 64 * width + width * width + 12 * width + 10,
        "windows": EVERY * times,
        "checkpoints": times,
        "ms a window without": round(1e3 * statistics.median(without) / EVERY, 2),
        "ms a window with": round(1e3 * statistics.median(with_) / EVERY, 2),
        "ratio": round(statistics.median(b / a for a, b in pairs), 4),
    }
