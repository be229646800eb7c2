"""SIGKILL at random moments, then the same call again: the end must be bit for bit that of a training left in peace.

Each trial is one training in a forked child that is killed at a random moment of its life, and as often as not killed
again after it was resumed; then it is left to come to its end. The trainings save all the time, so that many kills fall
into a save. Compared are all parameters and buffers, the optimizer's state, every record and every evaluation, by their
bytes.
"""

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import autoaccum

__all__ = ["Result", "run"]


class Noisy(Dataset):
    """Samples that every look draws anew, from all three generators."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randn(6) + random.random() + numpy.random.rand() + index % 3, index % 3


def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def tensors() -> dict[str, Any]:
    """Shuffled rows, dropout, pooled BatchNorm, warm-up and cosine, clipping, validation."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(52, 6, generator=generator), torch.arange(52) % 3
    return {"data": (x, y), "val_data": (x[:10], y[:10]), "schedule": "cosine", "warmup_steps": 3, "clip_norm": 1.0}


def augmented() -> dict[str, Any]:
    """A dataset that draws in this process; no seed but the state of the generators."""
    return {"data": Noisy(), "seed": None, "optimizer": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)}


def loader() -> dict[str, Any]:
    """A DataLoader with a generator of its own."""
    generator = torch.Generator().manual_seed(5)
    return {"data": DataLoader(Noisy(), batch_size=4, shuffle=True, generator=generator), "lr_batch": 12}


def workers() -> dict[str, Any]:
    """Augmentation in a worker process."""
    return {"data": DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=1), "lr_batch": 12, "epochs": 3}


def scaled() -> dict[str, Any]:
    """fp16 with a loss scaler that first has to find its scale."""
    return {**tensors(), "precision": "fp16", "schedule": "constant", "warmup_steps": 0}


TRAININGS: dict[str, Callable[[], dict[str, Any]]] = {
    "tensors": tensors, "augmented": augmented, "loader": loader, "workers": workers, "scaled": scaled,
}  # fmt: skip


def _train(name: str, folder: Path | None) -> str:
    """One training from where it stands to its end: a digest of all that it came to."""
    torch.manual_seed(11)
    random.seed(11)
    numpy.random.seed(11)
    arguments = {"epochs": 6, "seed": 3, **TRAININGS[name]()}
    loop = autoaccum.prepare(
        _model(), arguments.pop("data"), target_batch=12, micro_batch=5, loss=nn.CrossEntropyLoss(), check=False,
        device="cpu", checkpoint=folder, checkpoint_every=None if folder is None else 1, **arguments,
    )  # fmt: skip
    result = loop.run()
    records = [{**record.to_dict(), "seconds": 0, "samples_per_second": 0} for record in result.history]
    digest = hashlib.sha256(json.dumps([records, result.evaluations]).encode())
    for tensor in loop.model.state_dict().values():
        digest.update(pickle.dumps(tensor.tolist()))
    for state in loop.optimizer.state_dict()["state"].values():
        digest.update(pickle.dumps([value.tolist() for value in state.values() if value is not None]))
    return digest.hexdigest()


@dataclass
class Result:
    """How many killed trainings came to the same end."""

    trials: int = 0
    same: int = 0
    kills: int = 0
    in_a_save: int = 0
    before_the_first: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "trainings": self.trials, "bit-identical": self.same, "kills": self.kills,
            "kills in the middle of a save": self.in_a_save, "kills before the first checkpoint": self.before_the_first,
            "seconds": round(self.seconds, 1), "failures": self.failures[:10],
        }  # fmt: skip


def run(count: int, seed: int = 0) -> Result:
    """`count` trainings, one after another, each killed at least once."""
    chance, result, began = random.Random(seed), Result(), time.perf_counter()
    torch.set_num_threads(1)
    _train("tensors", None)  # here too, so that each child finds loaded what torch loads on first use
    wanted: dict[str, tuple[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="autoaccum-kills-") as place:
        while result.trials < count:
            name = list(TRAININGS)[result.trials % len(TRAININGS)]
            if name not in wanted:
                undisturbed = _left_alone(name, None, Path(place))
                started = time.perf_counter()
                saved = _left_alone(name, Path(place, "saved"), Path(place))
                wanted[name] = undisturbed, time.perf_counter() - started
                shutil.rmtree(Path(place, "saved"))
                if saved != undisturbed:
                    result.failures.append(f"{name}: saving changes the training")
            _trial(name, *wanted[name], Path(place), chance, result)
    result.seconds = time.perf_counter() - began
    return result


def _trial(name: str, want: str, seconds: float, place: Path, chance: random.Random, result: Result) -> None:
    folder = place / f"run-{result.trials}"
    killed = 0
    while killed == 0 or (killed < 3 and chance.random() < 0.5):
        child = _fork(name, folder, place / "digest")
        time.sleep(chance.uniform(0.0, seconds))
        os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            killed += 1
            result.in_a_save += any(folder.glob(".*.tmp"))
            result.before_the_first += not any(folder.glob("step-*"))
        else:
            shutil.rmtree(folder)  # it came to its end before that: begin again, so that something is left to kill
    result.trials += 1
    result.kills += killed
    got = _left_alone(name, folder, place)
    if got == want:
        result.same += 1
    else:
        result.failures.append(f"{name}, killed {killed} times: another end ({got[:200]})")
    shutil.rmtree(folder)


def _left_alone(name: str, folder: Path | None, place: Path) -> str:
    """The digest of a training that nobody disturbs."""
    child = _fork(name, folder, place / "digest")
    os.waitpid(child, 0)
    text = (place / "digest").read_text()
    (place / "digest").unlink()
    return text


def _fork(name: str, folder: Path | None, answer: Path) -> int:
    """A child that trains, so that a kill costs no time for loading torch again."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        text = _train(name, folder)
    except BaseException:  # the child's end: what went wrong is its answer
        text = traceback.format_exc()
    answer.write_text(text)
    sys.stderr.flush()
    os._exit(0)
