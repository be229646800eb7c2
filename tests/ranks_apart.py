"""What each of two ranks does for test_ranks_apart.py where they differ: it must be told on both."""

import functools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import autoaccum
from autoaccum.errors import AutoaccumError
from tests.ranks_work import Case, Net, data, plain_sgd, train

__all__ = ["DIFFERENT", "accuracy", "apart", "ended", "prepared", "validated"]


def ended(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except AutoaccumError as error:
        return f"{type(error).__name__}: {error}"
    return "ended well"


class Frozen(Net):
    """A part of it is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.last.weight.requires_grad_(False)


def used(rank: int) -> autoaccum.TrainingLoop:
    """With an optimizer that has stepped on rank 1 alone."""
    x, y, _ = data()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if rank == 1:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return prepared(model=model, optimizer=optimizer)


def prepared(**more: Any) -> autoaccum.TrainingLoop:
    settings: dict[str, Any] = {
        "model": None, "data": data()[:2], "loss": nn.CrossEntropyLoss(), "target_batch": 8, "micro_batch": 4,
        "optimizer": plain_sgd, "device": "cpu", "progress": False, **more,
    }  # fmt: skip
    model = settings.pop("model") or Net()
    lr = {} if isinstance(settings["optimizer"], torch.optim.Optimizer) else {"lr": settings.pop("lr", 0.1)}
    return autoaccum.prepare(model, settings.pop("data"), **settings, **lr)


def shard(rank: int) -> Any:
    pairs = list(zip(*data()[:2]))
    return DataLoader(Subset(pairs, list(range(rank, 40, 2))), batch_size=4)


# What differs: (the words that both ranks must say, what rank 0 and rank 1 do).
DIFFERENT: dict[str, tuple[str, Callable[[int, str], Any]]] = {
    "target_batch": ("target_batch: rank 0 has 8, rank 1 has 10", lambda r, _: prepared(target_batch=(8, 10)[r])),
    "epochs": ("epochs: rank 0 has 1, rank 1 has 2", lambda r, _: prepared(epochs=1 + r)),
    "max_steps": ("max_steps: rank 0 has none, rank 1 has 3", lambda r, _: prepared(max_steps=(None, 3)[r])),
    "shuffle": ("shuffle: rank 0 has true, rank 1 has false", lambda r, _: prepared(shuffle=r == 0)),
    "check": ("check: rank 0 has true, rank 1 has false", lambda r, _: prepared(check=r == 0)),
    "rate": ("the optimizer's lr: rank 0 has 0.1, rank 1 has 0.2", lambda r, _: prepared(lr=0.1 * (1 + r))),
    "clip": ("clip_norm: rank 0 has none, rank 1 has 1.0", lambda r, _: prepared(clip_norm=(None, 1.0)[r])),
    "validation": (
        "val_data: rank 0 has none, rank 1 has given",
        lambda r, _: prepared(val_data=data()[:2] if r else None),
    ),
    "folder": (
        "checkpoint: rank 0 has none, rank 1 has given",
        lambda r, path: prepared(checkpoint=f"{path}/run" if r else None),
    ),
    "length": ("data's length: rank 0 has 40, rank 1 has 39", lambda r, _: prepared(data=data(40 - r)[:2])),
    "shards": ("data's first samples: rank 0 has", lambda r, _: prepared(data=shard(r))),
    "labels": ("data's first samples: rank 0 has", lambda r, _: prepared(data=(data()[0], data()[1] + 2 * r))),
    "frozen": (
        "the parameter 'last.weight': rank 0 has float64 of shape (15, 12), trained, rank 1 has float64 of shape (15, "
        "12), frozen",
        lambda r, _: prepared(model=Frozen() if r else Net()),
    ),
    "optimizer's state": (
        "the optimizer's momentum_buffer of parameter 0: rank 0 has none, rank 1 has",
        lambda r, _: used(r),
    ),
    "another loop": (
        "rank 0 is in prepare, rank 1 is in a wish to stop",
        lambda r, _: prepared() if r == 0 else alone(r),
    ),
}


@functools.cache
def _loop() -> autoaccum.TrainingLoop:
    return prepared()


def alone(rank: int) -> Any:
    return next(iter(_loop()))


class Augmented(Dataset):
    """Draws from the global generators, and labels what it drew from a generator of its own."""

    def __init__(self, rank: int) -> None:
        self.tensors, self.own = data(), random.Random(rank)

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.tensors[0][index], self.tensors[1][index]
        return x + 0.01 * torch.rand(()).double() + 0.01 * self.own.random(), y


def accuracy(outputs: Tensor, targets: Tensor) -> autoaccum.Mean:
    right = (outputs.argmax(1) == targets)[targets >= 0]
    return autoaccum.Mean(right.sum(), right.numel())


def validated(rank: int = 0, size: int = 1) -> list[dict[str, float]]:
    """Three trainings whose micro-batches differ on the ranks, validated on 13 samples."""
    return [
        train(Case(target=target, limits=limits), rank, size, val_data=data(13)[:2], epochs=1,
              metrics={"accuracy": accuracy})[1].evaluations[0]
        for target, limits in ((10, (5, 2)), (11, (8, 1)), (7, (4, 3)))
    ]  # fmt: skip


def evaluated_alone(rank: int) -> None:
    """Rank 0 evaluates in mid-training, as people do who save on the first rank alone."""
    loop = prepared(val_data=data(13)[:2])
    for record in loop:
        if rank == 0 and record.step == 2:
            loop.evaluate()


def apart(rank: int, folder: str) -> dict[str, Any]:
    """What one of two ranks found."""
    _loop()
    found: dict[str, Any] = {
        "different": {
            name: ended(functools.partial(attempt, rank, folder)) for name, (_, attempt) in DIFFERENT.items()
        },
        "evaluated alone": ended(lambda: evaluated_alone(rank)),
        "validated": validated(rank, 2),
    }
    torch.manual_seed(rank)
    found["augmented"] = ended(lambda: prepared(data=Augmented(rank)))
    return found
