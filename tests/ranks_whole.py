"""What each of two ranks does for test_ranks_apart.py: memory that runs out or differs, own loops, resuming."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import autoaccum
from autoaccum.window.rank_sum import RankSum
from tests.ranks_apart import apart, ended, prepared
from tests.ranks_work import CASES, Case, Net, data, plain_sgd, state, train

__all__ = ["by_window", "work"]


def once(name: str, bad: bool) -> Callable[[], None]:
    """Has memory run out at the next call of a function of the sum's, on a rank that is bad; gives what undoes it."""
    real = getattr(RankSum, name)

    def failing(*args: Any) -> Any:
        setattr(RankSum, name, real)
        raise torch.OutOfMemoryError("out of memory, as injected")

    if bad:
        setattr(RankSum, name, failing)
    return lambda: setattr(RankSum, name, real)


def replayed(case: Case, name: str, rank: int) -> tuple[dict[str, Tensor], list[str]]:
    """A training in which memory runs out on rank 1 between its micro-batches and the sum over the ranks."""
    said: list[str] = []
    back = once(name, rank == 1)
    model, _ = train(case, rank, 2, check=False, callbacks=[lambda event: said.append(event.name)])
    back()
    return state(model), [name for name in said if name == "replay"]


def limited(rank: int) -> dict[str, Any]:
    """A probe on ranks with room for 140 and for 46 samples, by a forecast of this machine's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 4))
    rows = torch.randn(400, 32), torch.randint(0, 4, (400,))
    asked = {"loss": nn.CrossEntropyLoss(), "cache": False, "device": "cpu", "optimizer": "sgd"}
    memory = autoaccum.probe(model, rows, max_batch=64, **asked).forecast((140, 46)[rank])
    report = autoaccum.probe(model, rows, memory=memory, target_batch=120, **asked)
    fits = [trial.batch for trial in report.trials if trial.fits]
    assert report.plan is not None
    return {"limit": report.limit, "sizes": report.plan.micro_batches, "fits": fits}


def own_loop(rank: int) -> dict[str, Tensor]:
    """A wrapped model with buffers, in a loop of one's own whose first window leaves rank 1 without samples."""
    model = DistributedDataParallel(Net(norm=True))
    optimizer = plain_sgd(model.parameters(), lr=0.1)
    accumulator = autoaccum.Accumulator(model, optimizer, autoaccum.plan(4, 8, world_size=2, rank=rank))
    x, y, _ = data()
    for start, middle, stop in ((0, 8, 8), (8, 13, 16)):
        own = slice(start, middle) if rank == 0 else slice(middle, stop)
        batch: Any = (x[own], y[own]) if own.start < own.stop else []
        for micro_x, micro_y in accumulator.window(batch):
            count = (micro_y >= 0).sum()
            loss = nn.functional.cross_entropy(model(micro_x), micro_y, reduction="sum") / count.clamp(min=1)
            accumulator.backward(loss, count)
    return state(model.module)


def by_window() -> dict[str, Tensor]:
    """The same two windows whole, in a single process."""
    model = Net(norm=True)
    optimizer = plain_sgd(model.parameters(), lr=0.1)
    x, y, _ = data()
    for start in (0, 8):
        nn.functional.cross_entropy(model(x[start : start + 8]), y[start : start + 8]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state(model)


def unlike(rank: int) -> None:
    """A loop of one's own on models that nobody gave the same weights."""
    model = Net(seed=rank)
    accumulator = autoaccum.Accumulator(
        model, plain_sgd(model.parameters(), lr=0.1), autoaccum.plan(4, 8, world_size=2, rank=rank)
    )
    next(accumulator.window(tuple(data(4)[:2])))


class Synchronised(nn.Module):
    """As far as the ranks' micro-batches go: a layer that meets the other ranks, which a CPU cannot run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.SyncBatchNorm(6), nn.Linear(6, 15)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x).unflatten(1, (5, 3))


def resumed(rank: int, folder: str) -> tuple[dict[str, Tensor], int]:
    """Two machines without a shared disk: each rank has a folder of its own, of which only the first is written to."""
    path = f"{folder}/disk {rank}"
    autoaccum.fit(Net(), data()[:2], **_settings(path, 3))
    result = autoaccum.fit(Net(), data()[:2], **_settings(path, 6))
    return state(result.model), result.history[0].step


def _settings(path: str | None, steps: int) -> dict[str, Any]:
    return {
        "loss": nn.CrossEntropyLoss(), "target_batch": 8, "micro_batch": 4, "optimizer": plain_sgd, "lr": 0.1,
        "device": "cpu", "progress": False, "max_steps": steps, "checkpoint": path, "check": False, "seed": 3,
    }  # fmt: skip


def interrupted_only(rank: int) -> dict[str, Tensor]:
    """The same training in one go."""
    return state(autoaccum.fit(Net(), data()[:2], **_settings(None, 6)).model)


def work(rank: int, folder: str) -> None:
    """One of two ranks; writes what it found to a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found: dict[str, Any] = {
        **apart(rank, folder),
        "before the sum": replayed(Case(), "ready", rank),
        "levelling": replayed(CASES["a branch in one micro-batch"], "_allocate", rank),
        "limited": limited(rank),
        "own loop": own_loop(rank),
        "unlike": ended(functools.partial(unlike, rank)),
        "unequal counts": ended(
            lambda: prepared(model=Synchronised(), target_batch=11, micro_batch=(8, 1)[rank], check=False)
        ),
        "resumed": resumed(rank, folder),
        "in one go": interrupted_only(rank),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
