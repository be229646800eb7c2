"""Several optimizers on two ranks with unequal shares: each phase is a window of the samples of both."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist

import autoaccum
from tests.ranks_started import started
from tests.test_loss_coupled import error, moved
from tests.test_training_turns import NOISE, REAL, Gan, by_hand, phases

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed"),
]


def work(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = Gan()
    before = copy.deepcopy(list(model.parameters()))
    running = autoaccum.prepare(
        model, (REAL, NOISE), phases=phases(model, every=2), target_batch=23, micro_batch=(9, 4)[rank], shuffle=False,
        lr_rule="none", device="cpu", epochs=2,
    )  # fmt: skip
    records = [(record.phase, record.samples) for record in running]
    torch.save({"moved": moved(before, model.parameters()), "records": records}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_take_turns_as_one_process_with_the_whole_batch(tmp_path):
    started(work, 2, tmp_path)
    model = Gan()
    before = copy.deepcopy(list(model.parameters()))
    by_hand(model, 4, every=2)
    reference = moved(before, model.parameters())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert error(found["moved"], reference) < 1e-11
        assert found["records"] == [("judging", 23), ("painting", 23), ("judging", 23)] * 2
