"""Ranks that differ in what they must share, or are at different places: both say so, and nobody waits.

Ranks whose memory runs out or differs, that idle, or whose machines share no disk: the batch stays whole.
"""

import pytest
import torch
import torch.distributed as dist

from tests.ranks_apart import DIFFERENT, validated
from tests.ranks_started import started
from tests.ranks_whole import by_window, work
from tests.ranks_work import CASES, Case, by_hand

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("apart")
    started(work, 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_between_ranks_is_named_on_all_of_them_before_it_matters(found, name):
    for rank in range(2):
        assert DIFFERENT[name][0] in found[rank]["different"][name]
        assert found[rank]["different"][name].startswith("SetupError")


@pytest.mark.slow
def test_an_evaluation_on_one_rank_alone_stops_both_and_says_where_each_is(found):
    for rank in range(2):
        assert "rank 0 is in evaluate, rank 1 is in step 3: call it on every rank" in found[rank]["evaluated alone"]


@pytest.mark.slow
def test_validation_sees_every_sample_once_whatever_the_ranks_micro_batches(found):
    alone = validated()
    for rank in range(2):
        for told, expected in zip(found[rank]["validated"], alone, strict=True):
            assert told["loss"] == pytest.approx(expected["loss"], rel=1e-12)
            assert told["accuracy"] == expected["accuracy"]


@pytest.mark.slow
def test_what_a_dataset_draws_at_random_may_differ(found):
    assert [each["augmented"] for each in found] == ["ended well"] * 2


def assert_same(state, reference):
    for name, value in reference.items():
        torch.testing.assert_close(state[name].double(), value.double(), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "case"), [("before the sum", Case()), ("levelling", CASES["a branch in one micro-batch"])]
)
def test_memory_that_runs_out_before_the_sum_replays_the_window_on_all_ranks(found, name, case):
    for each in found:
        state, replays = each[name]
        assert replays == ["replay"]
        assert_same(state, by_hand(case).state_dict())


@pytest.mark.slow
def test_ranks_share_a_window_by_what_fits_on_each_and_run_that_size(found):
    first, second = (each["limited"] for each in found)
    assert (first["limit"], second["limit"]) == (140, 46)
    assert (first["sizes"], second["sizes"]) == ((90,), (30,))
    assert 90 in first["fits"]


@pytest.mark.slow
def test_a_wrapped_model_with_buffers_trains_while_a_rank_has_no_samples(found):
    for each in found:
        assert_same(each["own loop"], by_window())


@pytest.mark.slow
def test_weights_that_differ_at_the_first_window_are_named(found):
    for each in found:
        assert "the values of 'first.weight': rank 0 has checksum" in each["unlike"]


@pytest.mark.slow
def test_a_layer_that_meets_the_other_ranks_wants_as_many_micro_batches_on_each(found):
    for each in found:
        assert (
            "a window of 11 samples has unequally many micro-batches on the ranks (2 on rank 0, 1 on rank 1)"
            in (each["unequal counts"])
        )


@pytest.mark.slow
def test_machines_without_a_shared_disk_resume_from_the_first_ones(found):
    for each in found:
        state, first_step = each["resumed"]
        assert first_step == 1  # the history of before is there, too
        assert all(torch.equal(value, state[name]) for name, value in each["in one go"].items())
