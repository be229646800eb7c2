"""Ranks of which some train together, and one is killed: real processes over gloo."""

import pytest
import torch
import torch.distributed as dist

import autoaccum
from tests.ranks_lost import GROUP, settings, work
from tests.ranks_started import started
from tests.ranks_work import Net, data, state

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lost")
    started(work, 3, folder, killed=(1,))
    return {rank: torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 2)}


@pytest.mark.slow
def test_a_part_of_the_ranks_trains_as_one_process_does(found):
    ended, world, evaluations = found[2]["sub-group"]
    alone = autoaccum.fit(Net(), data()[:2], val_data=data(13)[:2], **settings())
    assert world == len(GROUP)
    for name, value in state(alone.model).items():
        torch.testing.assert_close(ended[name], value, rtol=1e-10, atol=1e-12)
    assert evaluations[0]["loss"] == pytest.approx(alone.evaluations[0]["loss"], rel=1e-12)


@pytest.mark.slow
def test_a_rank_that_is_not_of_the_group_is_told(found):
    assert "group= does not hold this process" in found[0]["not of it"]


@pytest.mark.slow
def test_the_others_say_which_rank_was_killed_and_where_the_training_can_go_on(found):
    for rank in (0, 2):
        assert found[rank]["kind"] == "LostRankError"
        assert "rank 1 of 3 ended or no longer answers" in found[rank]["lost"]
        assert "the last checkpoint is" in found[rank]["lost"]
        assert "step-0000000" in found[rank]["lost"]
