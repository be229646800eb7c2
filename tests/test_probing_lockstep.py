"""The probe of sharded models: forecasts against peaks measured at every size, and limits by drawn budgets."""

import os
import random

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.probing import lockstep
from tests.ranks_started import started
from tests.shards_work import Net, grouped, sharded, tokens

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.skipif(
    not hasattr(getattr(fsdp, "FSDPModule", None), "reset_iter_state"), reason="this torch's FSDP cannot be replayed"
)

MODES = ("micro-batch", "window")
MOST = int(os.environ.get("AUTOACCUM_TEST_MOST", "6"))  # sizes that are all measured
DRAWS, RUN = 200, 2
ALWAYS = -9.0  # the share by which summing once has to be sooner: it may be much later


def probed(ranks, **more):
    """A probe of windows of several micro-batches, in fp32 and with uneven shards."""
    model = sharded(Net().float())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = tuple(torch.cat([part] * 4) for part in tokens(64))
    settings = {"target_batch": 32 * ranks, "memory": "1GiB", "progress": False, **more}
    return autoaccum.probe(model, data, loss=nn.CrossEntropyLoss(), optimizer=optimizer, **settings)


def own(report):
    """(batch, peak, forecast) of the trials that ran as the answer does; those before it ran in the other way."""
    trials = list(report.trials)
    starts = [number for number, trial in enumerate(trials) if trial.kind == "trace"]
    begins = [number for number in starts if number - 1 not in starts]
    trials = trials[begins[-1] :] if report.gradient_sync.startswith("window") else trials
    return [(trial.batch, trial.peak_bytes, report.forecast(trial.batch)) for trial in trials if trial.peak_bytes]


def by_mode(mode):
    lockstep.WORTH = ALWAYS if mode == "window" else 1.0


def work(rank, folder):
    """With one forecast: what all sizes take, how many of drawn budgets it keeps to, and some of these run."""
    size = int(folder.rsplit("-", 1)[1])
    with grouped(rank, size, folder):
        found = {}
        for mode in MODES[: 1 + (size == 2 or MOST > 6)]:
            by_mode(mode)
            forecast = probed(size, max_batch=12, target_batch=24 * size).forecast
            measured = {}
            for most in range(3, MOST + 2):
                report = probed(size, max_batch=most, target_batch=2 * most * size)
                measured |= {batch: peak for batch, peak, _ in own(report)}
            off = [forecast(batch) - peak for batch, peak in measured.items()]
            lockstep.WORTH = 1.0
            chance = random.Random(rank)
            budgets = [chance.randrange(measured[2], measured[MOST + 1]) for _ in range(DRAWS)]
            wrong = 0
            for budget in budgets:
                limit = max(batch for batch in measured if forecast(batch) <= budget)
                wrong += not measured[limit] <= budget < measured[limit + 1]
            ran = []
            if mode == "micro-batch":
                roomy = [budget for budget in budgets if budget >= measured[4]]  # the second trace surely fits
                for budget in roomy[:RUN]:
                    report = probed(size, memory=budget)  # another rank's may let no second trace run
                    ran.append([budget, max(trial.peak_bytes for trial in report.trials if trial.peak_bytes)])
            found[mode] = {"off": off, "wrong": wrong, "ran": ran}
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_forecasts_are_exact_at_every_size_and_no_drawn_budget_is_overrun(tmp_path, ranks):
    folder = tmp_path / f"ranks-{ranks}"
    folder.mkdir()
    started(work, ranks, folder, seconds=900)
    for found in (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)):
        for mode in found:
            assert found[mode]["off"] == [0] * MOST
            assert found[mode]["wrong"] == 0
        assert len(found["micro-batch"]["ran"]) == RUN
        assert all(peak <= budget for budget, peak in found["micro-batch"]["ran"])


def work_of_two(rank, folder):
    with grouped(rank, 2, folder):
        found = {}
        for mode in MODES:
            by_mode(mode)
            report = probed(2, max_batch=11)
            found[mode] = [report.plan.gradient_sync, report.plan.reasons["gradient_sync"],
                           [peak - said for _, peak, said in own(report)]]  # fmt: skip
        by_mode("window")
        tight = probed(2, memory=probed(2, max_batch=11, target_batch=22).forecast(11) + 8)
        found["tight"] = [tight.plan.gradient_sync, tight.gradient_sync]
        found["one"] = probed(2, max_batch=11, target_batch=22).gradient_sync
        torch.save(found, f"{folder}/{rank}.pt")


def test_gradients_are_summed_once_a_window_only_where_they_fit_whole_and_that_is_faster(tmp_path):
    started(work_of_two, 2, tmp_path)
    for found in (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)):
        for mode in MODES:
            sync, why, off = found[mode]
            assert sync == mode
            assert "two micro-batches took" in why
            assert off == [0] * len(off)
        assert found["tight"][0] == "micro-batch"
        assert "whole ones do not fit" in found["tight"][1]
        assert found["one"] is None
