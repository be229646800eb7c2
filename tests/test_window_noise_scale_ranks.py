"""The gradient noise scale over ranks: what one process measures in the same micro-batches, replicated and sharded."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

import autoaccum
from autoaccum.loss.objective import Objective
from autoaccum.planning.plan import plan
from autoaccum.window.accumulate import Accumulator
from tests.ranks_started import started
from tests.shards_work import Case, Net, grouped, sgd, sharded, windows

fsdp = pytest.importorskip("torch.distributed.fsdp")
SHARDS = pytest.mark.skipif(
    not hasattr(getattr(fsdp, "FSDPModule", None), "reset_iter_state"), reason="this torch's FSDP cannot be replayed"
)

# The tail of one sample leaves rank 1 without any, who then runs a pass that counts nothing.
CASE = Case(limits=(3, 2), count=31)


def plans():
    return [plan(CASE.limits, CASE.target, world_size=2, rank=rank, optimizer="sgd") for rank in range(2)]


def measured(model, made, pieces, *, late=False, by_hand=False):
    """The averages after windows that are all measured."""
    objective = None if by_hand else Objective(model, loss=nn.CrossEntropyLoss(), reduction="token_mean")
    accumulator = Accumulator(model, sgd(model.parameters()), made, objective=objective)
    found = []
    for batches in pieces:
        accumulator.noise_scale._windows = 0
        if late:
            accumulator.plan = dataclasses.replace(made, gradient_sync="window")
        if by_hand:
            for ids, labels in accumulator.window(batches):
                loss = functional.cross_entropy(model(ids), labels, reduction="sum")
                accumulator.backward(autoaccum.Mean(loss, int((labels >= 0).sum())))
        else:
            accumulator.open(batches)
            accumulator.run(batches)
            accumulator.finish()
        found.append(accumulator.noise_scale.state_dict())
    accumulator.close()
    return found


def whole(rank, folder):
    with grouped(rank, 2, folder):
        made = plans()[rank]
        found = {
            "replicated": measured(Net(), made, windows(CASE, made)),
            "by hand": measured(Net(), made, windows(CASE, made), by_hand=True),
        }
        torch.save(found, f"{folder}/{rank}.pt")


def in_shards(rank, folder):
    with grouped(rank, 2, folder):
        made = plans()[rank]
        late = measured(sharded(Net()), made, windows(CASE, made), late=True)
        found = {"sharded": measured(sharded(Net()), made, windows(CASE, made)), "sharded, summed at the end": late}
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def alone():
    pieces = [[*first, *second] for first, second in zip(*(windows(CASE, made) for made in plans()))]
    return measured(Net(), plan(3, CASE.target, optimizer="sgd"), pieces)


@pytest.mark.parametrize(
    ("work", "ways"),
    [
        (whole, ("replicated", "by hand")),
        pytest.param(in_shards, ("sharded", "sharded, summed at the end"), marks=[pytest.mark.slow, SHARDS]),
    ],
    ids=["whole", "sharded"],
)
def test_two_ranks_measure_what_one_process_does_in_the_same_micro_batches(tmp_path, alone, work, ways):
    started(work, 2, tmp_path)
    assert len(alone) == 4
    for each in (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)):
        for way in ways:
            for got, want in zip(each[way], alone, strict=True):
                assert got["weight"] == want["weight"] > 0, way
                assert got["noise"] == pytest.approx(want["noise"], rel=1e-10), way
                assert got["signal"] == pytest.approx(want["signal"], rel=1e-10), way
