"""Ranks that differ in what they must share, or are at different places: both say so, and nobody waits."""

import pytest
import torch
import torch.distributed as dist

from tests.ranks_apart import DIFFERENT, validated, work
from tests.ranks_started import started

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("apart")
    started(work, 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_between_ranks_is_named_on_all_of_them_before_it_matters(found, name):
    for rank in range(2):
        assert DIFFERENT[name][0] in found[rank]["different"][name]
        assert found[rank]["different"][name].startswith("SetupError")


def test_an_evaluation_on_one_rank_alone_stops_both_and_says_where_each_is(found):
    for rank in range(2):
        assert "rank 0 is in evaluate, rank 1 is in step 3: call it on every rank" in found[rank]["evaluated alone"]


def test_validation_sees_every_sample_once_whatever_the_ranks_micro_batches(found):
    alone = validated()
    for rank in range(2):
        for told, expected in zip(found[rank]["validated"], alone, strict=True):
            assert told["loss"] == pytest.approx(expected["loss"], rel=1e-12)
            assert told["accuracy"] == expected["accuracy"]


def test_what_a_dataset_draws_at_random_may_differ(found):
    assert [each["augmented"] for each in found] == ["ended well"] * 2
