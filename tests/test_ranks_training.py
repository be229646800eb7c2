"""Training on two ranks, over gloo: equal to one process with the whole batch, whatever differs between the ranks.

The trainings are in ranks_work.py. Two processes run them once; each test looks at what they found.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import autoaccum
from autoaccum.errors import SetupError
from tests.ranks_started import started
from tests.ranks_work import CASES, Case, Net, by_hand, data, errors, train, work

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed"),
    pytest.mark.slow,
]

EXACT = 1e-10


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    started(work, 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def off(state, reference):
    """‖a − b‖ / ‖b‖ over all parameters and buffers that are numbers."""
    pairs = [(state[name], value) for name, value in reference.items()]
    square = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return (square / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_end_where_one_process_with_the_whole_batch_does(found, name):
    reference = by_hand(CASES[name]).state_dict()
    for rank in range(2):
        assert off(found[rank]["cases"][name]["state"], reference) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_hold_the_same_bits_and_the_same_records(found, name):
    first, second = (found[rank]["cases"][name] for rank in range(2))
    assert all(torch.equal(value, second["state"][key]) for key, value in first["state"].items())
    assert [(samples, loss) for samples, _, loss in first["records"]] == [
        (samples, loss) for samples, _, loss in second["records"]
    ]


def test_every_window_has_the_target_and_the_tail_what_is_left(found):
    samples = [samples for samples, _, _ in found[0]["cases"]["short tail"]["records"]]
    assert samples == [8, 8, 3] * 2


def test_ranks_run_as_many_micro_batches_as_each_needs(found):
    counts = [found[rank]["cases"]["unequal limits, more micro-batches on one"]["records"][0][1] for rank in range(2)]
    assert counts == [2, 1]


def test_a_rank_without_samples_joins_the_step_all_the_same(found):
    micro_batches = [found[rank]["cases"]["an idle rank in the tail"]["records"][2][1] for rank in range(2)]
    assert micro_batches == [1, 0]


def test_the_loss_told_is_the_whole_batchs(found):
    alone = train(CASES["short tail"])[1].history
    told = [loss for _, _, loss in found[1]["cases"]["short tail"]["records"]]
    assert told == pytest.approx([record.loss for record in alone], rel=1e-12)


def test_models_that_began_differently_are_rank_0s_from_the_start(found):
    reference = by_hand(Case(model=lambda: Net(5))).state_dict()
    for rank in range(2):
        assert off(found[rank]["another start"], reference) <= EXACT


def test_a_seed_repeats_a_run_and_no_two_ranks_drop_out_alike(found):
    for rank in range(2):
        (first, masks), (second, again) = found[rank]["dropout"]
        assert masks == again
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert found[0]["dropout"][0][1] != found[1]["dropout"][0][1]


def test_a_shuffled_epoch_shows_every_sample_once_over_all_ranks(found):
    seen = [found[rank]["shuffled"] for rank in range(2)]
    assert sorted(seen[0] + seen[1]) == list(range(30))
    assert seen[0] + seen[1] != list(range(30))


def test_validation_is_over_all_ranks(found):
    alone = train(Case(), val_data=data(13)[:2])[1].evaluations
    for rank in range(2):
        told = found[rank]["evaluations"]
        assert [each["loss"] for each in told] == pytest.approx([each["loss"] for each in alone], rel=1e-12)


OWN = {
    "forward": "Broken: the model's own error",
    "optimizer": "Broken: the optimizer's own error",
    "data": "the data's own error",
    "callback": "Broken: the callback's own error at step",
    "callback at the end of an epoch": "Broken: the callback's own error at epoch",
    "argument": "SetupError: lr=-1.0",
    "argument that is looked at late": "SetupError: clip_norm=-1.0",
    "probe": "NothingFitsError: ",
    "model": "the parameter 'first.weight': rank 0 has float64 of shape (12, 6), trained, rank 1 has none",
    "loss": "LossError",
    "loss in one micro-batch": "LossError",
    "callback at the start, rank 0": "Broken: the callback's own error at start",
}


@pytest.mark.parametrize("name", errors(0))
def test_an_error_on_one_rank_ends_both_with_it(found, name):
    """Nobody hangs: the other rank is told which one failed, and the group can go on afterwards."""
    failed = 0 if name.endswith("rank 0") else 1
    assert OWN[name] in found[failed]["errors"][name]
    if name in ("model", "loss", "loss in one micro-batch"):  # they agree on these, and both say so
        assert OWN[name] in found[1 - failed]["errors"][name]
    else:
        told = f"rank {failed} of 2 failed, so rank {1 - failed} stops as well"
        assert told in found[1 - failed]["errors"][name]


def test_layers_that_share_statistics_keep_to_themselves_while_each_rank_probes(found):
    (first, *after), (second, *after_too) = (found[rank]["probed alone"] for rank in range(2))
    assert 1 < first < second
    assert after == after_too == [True, False]


def test_the_group_trains_on_after_all_these_errors(found):
    for rank in range(2):
        assert off(found[rank]["afterwards"], by_hand(Case()).state_dict()) <= EXACT


def test_fit_finds_the_other_ranks_by_torchruns_environment(tmp_path):
    """A script that says nothing of ranks: probed, planned, verified and trained by both, shown by the first."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--redirects=2"]
    command += [f"--log-dir={tmp_path}/logs", "-m", "tests.ranks_work", str(tmp_path)]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reference = by_hand(CASES["short tail"]).state_dict()
    for rank in range(2):
        assert off(torch.load(tmp_path / f"{rank}.pt"), reference) <= EXACT
        # A thread of a group that lets go of a tensor while the interpreter ends would abort the process.
        assert (tmp_path / f"{rank}.threads").read_text() == "[]"
    shown = [file.read_text() for file in sorted((tmp_path / "logs").rglob("stderr.log"))]
    assert "micro-batch" in shown[0]
    assert "micro-batch" not in shown[1]


def test_a_loop_of_ones_own_that_forgot_to_join_the_ranks_is_refused():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SetupError, match=r"rank 1 of 2, and this is rank 0 of 1: call .*init_process_group"):
        autoaccum.Accumulator(model, optimizer, autoaccum.plan(4, 8, world_size=2, rank=1))
