"""Trainers on two gloo ranks, started by torchrun: the whole batch's update, also when memory ran out on one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import trainers_ranks
from tests.trainer_models import by_hand, flat, moved
from tests.versions import peer

ROOT = Path(__file__).parents[1]
EXACT = 1e-10

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch is built without torch.distributed"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both ranks found, by trainer: torchrun is started once for all that are installed."""
    names = [name for name in trainers_ranks.TRAINERS if importlib.util.find_spec(name)]
    peer("transformers")
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "tests.trainers_ranks", folder, *names],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    files = {*names, *(path.name.split("-")[0] for path in folder.glob("refusals-*"))}
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)] for name in files}


def compare(found, weights, losses, replays):
    start = flat(trainers_ranks.net())
    for rank in found:
        assert moved(rank["weights"], start, weights) <= EXACT
        assert rank["steps"] == 6
        assert rank["replays"] == replays
    assert found[0]["losses"] == pytest.approx(losses, rel=1e-9)
    assert torch.equal(found[0]["weights"], found[1]["weights"])


@pytest.mark.parametrize("name", ["transformers", "lightning"])
def test_update_steps_and_losses_are_those_of_the_trainer_alone_at_the_whole_batch(name, found, tmp_path):
    peer(name)
    one = {"ranks": 1} if name == "lightning" else {}
    alone, losses, _ = trainers_ranks.TRAINERS[name](tmp_path, batch=trainers_ranks.TARGET, accumulated=1, **one)
    compare(found[name], flat(alone), losses, replays=1)


def test_the_update_in_a_loop_of_ones_own_is_the_whole_batchs(found):
    peer("accelerate")
    weights, losses = by_hand(trainers_ranks.net(), trainers_ranks.text(), 8, epochs=2, clip=0.5)
    compare(found["accelerate"], weights, losses, replays=0)


def test_what_cannot_be_shared_out_is_refused_before_anything_runs(found):
    if "refusals" not in found:
        pytest.skip("lightning or transformers is not installed: they are in the group peers")
    for said in found["refusals"]:
        for trainer in ("transformers", "lightning"):
            assert "target_batch=1 is less than the 2 ranks" in said[f"{trainer}, few"]
            assert "IterableDataset on 2 ranks" in said[f"{trainer}, stream"]
