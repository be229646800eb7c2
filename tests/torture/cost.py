"""What checkpoints every fifty windows cost: the same training with and without them, in turn, several times."""

import statistics
import tempfile
import time
from typing import Any

import torch
from torch import nn

import autoaccum

__all__ = ["run"]

WINDOWS, EVERY = 150, 50


def _seconds(folder: str | None, width: int) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    x, y = torch.randn(256, 64), torch.randint(0, 10, (256,))
    loop = autoaccum.prepare(
        model, (x, y), loss=nn.CrossEntropyLoss(), target_batch=128, micro_batch=64, max_steps=WINDOWS, seed=0,
        device="cpu", check=False, checkpoint=folder, checkpoint_every=None if folder is None else EVERY,
    )  # fmt: skip
    records = iter(loop)
    next(records)  # what is made once, the folder too
    began = time.perf_counter()
    for _ in records:
        pass
    return time.perf_counter() - began


def run(times: int = 5, width: int = 512) -> dict[str, Any]:
    """The medians, and the median of each pair's ratio."""
    without, with_, parameters = [], [], 64 * width + width * width + 12 * width + 10
    for _ in range(times):
        without.append(_seconds(None, width))
        with tempfile.TemporaryDirectory(prefix="autoaccum-cost-") as folder:
            with_.append(_seconds(folder, width))
    ratio = statistics.median(b / a for a, b in zip(without, with_))
    return {
        "parameters": parameters,
        "windows": WINDOWS,
        "checkpoints": WINDOWS // EVERY,
        "ms a window without": round(1e3 * statistics.median(without) / WINDOWS, 2),
        "ms a window with": round(1e3 * statistics.median(with_) / WINDOWS, 2),
        "ratio": round(ratio, 4),
    }
