"""Many windows with everything that may leak: replays, skipped windows, checkpoints, the record, evaluations.

What is looked at is the slope of the process's resident memory over windows. The history of records is meant to grow,
by about a hundred bytes a window; the rest must not.
"""

import gc
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor, nn

import autoaccum
from autoaccum.training.events import TrainingWarning

__all__ = ["Result", "run"]

REPLAYS_EVERY, SKIPS_EVERY, CHECKPOINT_EVERY = 97, 89, 50


class Rough(nn.Module):
    """Runs out of memory now and then, and gives a loss that is not a number now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.training and self.calls % (4 * REPLAYS_EVERY) == 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (not really)")
        out: Tensor = self.body(x)
        return out * float("nan") if self.training and self.calls % (4 * SKIPS_EVERY) == 0 else out


@dataclass
class Result:
    """Resident memory over windows, in bytes."""

    windows: int = 0
    seconds: float = 0.0
    replays: int = 0
    skipped: int = 0
    checkpoints: int = 0
    points: list[tuple[int, int]] = field(default_factory=list)

    @property
    def slope(self) -> float:
        """Bytes a window, by least squares over the second half: the first fills caches and pools."""
        points = self.points[len(self.points) // 2 :]
        mean_x = sum(x for x, _ in points) / len(points)
        mean_y = sum(y for _, y in points) / len(points)
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"windows": self.windows, "seconds": round(self.seconds, 1), "replays": self.replays,
                "skipped": self.skipped, "checkpoints": self.checkpoints,
                "first MiB": round(self.points[0][1] / 2**20, 1), "last MiB": round(self.points[-1][1] / 2**20, 1),
                "bytes a window": round(self.slope, 1)}  # fmt: skip


def run(windows: int) -> Result:
    """Trains so many windows of two small micro-batches."""
    gc.freeze()  # every replay collects garbage, and need not look at all of torch each time
    torch.manual_seed(0)
    x, y = torch.randn(3200, 16), torch.randint(0, 4, (3200,))
    result, process, began = Result(), psutil.Process(), time.perf_counter()

    def listen(event: Any) -> None:
        result.replays += event.name == "replay"
        result.checkpoints += event.name == "checkpoint"

    with tempfile.TemporaryDirectory(prefix="autoaccum-soak-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)
        loop = autoaccum.prepare(
            Rough(), (x, y), loss=nn.CrossEntropyLoss(), target_batch=32, micro_batch=16, max_steps=windows, seed=0,
            device="cpu", check=False, checkpoint=folder, checkpoint_every=CHECKPOINT_EVERY, regrow_after=10,
            on_nonfinite="skip", val_data=(x[:64], y[:64]), callbacks=[listen],
        )  # fmt: skip
        for record in loop:
            result.windows += 1
            result.skipped += record.skipped is not None
            if result.windows % max(1, windows // 100) == 0:
                gc.collect()
                result.points.append((result.windows, process.memory_info().rss))
    result.seconds = time.perf_counter() - began
    return result
