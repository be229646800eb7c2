"""Errors injected at random into the passes of sharded trainings, on real gloo ranks that live through all of them.

Each injection is a training of its own: on one rank, memory runs out or another error is raised as a block begins,
forward or backward, as a collective's memory is allocated, or as it is to be issued. All ranks must end soon: where the
whole batch in one process does, or each with an error that names the rank or the cause. What processes and tensors take
is read after the first few and at the end.
"""

import dataclasses
import gc
import json
import random
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

import autoaccum
from autoaccum.errors import AutoaccumError
from autoaccum.ranks import collectives
from tests.ranks_started import started
from tests.shards_work import Case, Inject, by_hand, grouped, mesh_of, off, sharded, tokens

__all__ = ["KINDS", "Ended", "at_collectives", "run", "train"]

KINDS = ("forward", "backward", "allocation", "collective")
ERRORS = {"memory": torch.OutOfMemoryError, "key": KeyError}
EXACT = 1e-10
SOON, HUNG = 10.0, 60.0  # seconds in which a training should end, and which no load of the machine explains
SETTLED = 30  # injections after which memory is read first: allocators and caches have what they keep by then
# More than this would be something kept from each injection: the model's states take 40 kB on each rank.
GROWTH_BYTES, GROWTH_LIVE = 24 * 2**20, 64 * 2**10


@contextmanager
def at_collectives() -> Iterator[None]:
    """Inside, `Inject` also sees where collectives' memory is allocated, and where they are issued."""
    places = (
        (collectives._Allocating, "allocate", "allocation"),
        (collectives.Collectives, "takes_turn", "collective"),
    )
    before = [getattr(owner, name) for owner, name, _ in places]

    def hitting(function: Any, kind: str) -> Any:
        def called(*arguments: Any, **keywords: Any) -> Any:
            Inject.hit(kind)
            return function(*arguments, **keywords)

        return called

    for (owner, name, kind), function in zip(places, before):
        setattr(owner, name, hitting(function, kind))
    try:
        yield
    finally:
        for (owner, name, _), function in zip(places, before):
            setattr(owner, name, function)


@dataclasses.dataclass
class Ended:
    """How a training ended on one rank: what was said, how far off its weights are, and after how many seconds."""

    said: str
    off: float
    seconds: float


def train(case: Case, rank: int, size: int, reference: nn.Module | None) -> Ended:
    """One training, into which an error may be armed; it is as far off as from the `reference`, where it ends well."""
    model = sharded(case.model(), mesh=mesh_of(case.replicas, size))
    loop = autoaccum.prepare(
        model, tokens(case.count), plan=case.plan(rank, size), loss=nn.CrossEntropyLoss(), shuffle=False,
        optimizer=case.optimizer(model.parameters()), progress=False, check=False,
    )  # fmt: skip
    began, said = time.monotonic(), "ended well"
    try:
        loop.run()
    except (AutoaccumError, KeyError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - began
    Inject.kind = None  # what was armed, and not come to
    well = said == "ended well" and reference is not None
    return Ended(said, off(model, reference, case.model()) if well else 0.0, seconds)  # type: ignore[arg-type]


def _places(seen: list[dict[str, int]], size: int, count: int, every: int, seed: int) -> Iterator[tuple[Any, ...]]:
    """(case, kind, place, rank, error) of each injection: `count` at random, or each `every`-th that there is."""
    if every:
        each = [(0, kind, at, bad, error) for kind in KINDS for error in ERRORS for at in range(1, seen[0][kind] + 1)
                for bad in range(size) if error == "memory" or kind in ("forward", "backward")]  # fmt: skip
        yield from each[seed % every :: every]
        return
    chance = random.Random(seed)  # the same draws on all ranks
    for _ in range(count):
        which, kind = chance.randrange(len(seen)), chance.choice(KINDS)
        yield which, kind, chance.randint(1, seen[which][kind]), chance.randrange(size), chance.choice(list(ERRORS))


def work(rank: int, folder: str, *, count: int, every: int, size: int, seed: int, replicas: int) -> None:
    warnings.simplefilter("ignore")
    cases = [Case(limits=(4, 2, 3, 1)[:size], count=11, late=late, replicas=replicas) for late in (False, True)]
    with grouped(rank, size, folder), at_collectives():
        places, references = [], []
        for case in cases:
            Inject.arm(None)
            train(case, rank, size, None)
            seen = torch.tensor([Inject.seen[kind] for kind in KINDS])
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MIN)  # places that every rank comes to
            places.append(dict(zip(KINDS, seen.tolist())))
            references.append(by_hand(case))
        ends, memory = [], []
        injections = list(_places(places, size, count, every, seed))
        for number, (which, kind, at, bad, error) in enumerate(injections):
            Inject.arm(kind if rank == bad else None, at, ERRORS[error])
            end = train(cases[which], rank, size, references[which])
            ends.append({"place": f"{error} at {kind} {at} on rank {bad}, late {cases[which].late}", "bad": bad,
                         **dataclasses.asdict(end)})  # fmt: skip
            if number + 1 in (min(SETTLED, len(injections) // 2), len(injections)):
                memory.append(_held())
        Path(folder, f"{rank}.json").write_text(json.dumps({"ends": ends, "memory": memory}))


def _held() -> tuple[int, int]:
    """(the process's resident bytes, bytes of all tensors that live)."""
    gc.collect()
    storages = {
        storage.data_ptr(): storage.nbytes()
        for each in gc.get_objects()
        if isinstance(each, torch.Tensor) and type(each) in (torch.Tensor, nn.Parameter)
        for storage in (each.untyped_storage(),)
    }
    return psutil.Process().memory_info().rss, sum(storages.values())


def run(count: int, seed: int = 0, size: int = 2, every: int = 0, replicas: int = 1) -> dict[str, Any]:
    """Figures of `count` injections on `size` ranks, or of each `every`-th place from `seed` on.

    "failures" is what was not survived.
    """
    with tempfile.TemporaryDirectory(prefix="autoaccum-sharded-") as folder:
        how = partial(work, count=count, every=every, size=size, seed=seed, replicas=replicas)
        started(how, size, Path(folder), seconds=60 + 20 * (count or 100))
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
    ends = list(zip(*(each["ends"] for each in found)))
    failures = [failure for each in ends if (failure := _failure(each))]
    growth = [[last - first for first, last in zip(*each["memory"])] for each in found]
    failures += [f"rank {rank} holds {rss} bytes more in its process, and {live} in tensors"
                 for rank, (rss, live) in enumerate(growth) if rss > GROWTH_BYTES or live > GROWTH_LIVE]  # fmt: skip
    return {
        "injections": len(ends), "ranks": size, "ended well": sum(each[0]["said"] == "ended well" for each in ends),
        "worst relative difference": max(end["off"] for each in ends for end in each),
        "longest, s": max(end["seconds"] for each in ends for end in each),
        "longer than 10 s": sum(max(end["seconds"] for end in each) > SOON for each in ends),
        "growth of processes, bytes": [rss for rss, _ in growth],
        "growth of tensors, bytes": [live for _, live in growth], "failures": failures,
    }  # fmt: skip


def _failure(ends: tuple[dict[str, Any], ...]) -> str | None:
    """What is wrong with how the ranks ended."""
    place, bad = ends[0]["place"], ends[0]["bad"]
    said = [end["said"] for end in ends]
    if max(end["seconds"] for end in ends) > HUNG or max(end["off"] for end in ends) > EXACT:
        return f"{place}: {ends}"
    if len({each == "ended well" for each in said}) > 1:
        return f"{place}: not all ranks ended alike: {said}"
    named = all(f"rank {bad} of {len(ends)} failed" in each for rank, each in enumerate(said) if rank != bad)
    own = "injected" in said[bad] or said[bad].startswith("NothingFitsError")  # one sample's memory ran out
    return None if said[bad] == "ended well" or (named and own) else f"{place}: {said}"
