"""Several workers: who takes which trial, what a kill costs, and how an interruption ends."""

import os
from collections import Counter
from pathlib import Path

import pytest

import autoaccum
from autoaccum.errors import AutoaccumError, DeviceError, SetupError
from autoaccum.searching.pool import places
from tests.search_setups import arguments, counted, fails_in_a_worker, killed_always

ROOT = Path(__file__).parents[1]


def search(tmp_path, setup, n_trials, **keywords):
    keywords = {"target_batch": (8, 16), "folder": tmp_path / "run", "study_name": "s", "pruner": "none", **keywords}
    return autoaccum.search(setup, n_trials=n_trials, **keywords)


def test_workers_share_trials_and_threads_and_a_killed_ones_trial_runs_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCH_CALLS", str(tmp_path))
    (tmp_path / "marker").touch()
    result = search(tmp_path, counted, 6, workers=2)

    rows = {row["number"]: row for row in result.trials}
    assert Counter(row["state"] for row in result.trials) == {"complete": 6, "killed": 1}
    killed = next(number for number, row in rows.items() if row["state"] == "killed")
    assert [row["params"] for row in result.trials if row["repeats"] == killed] == [rows[killed]["params"]]
    first, *calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert int(first[0]) == os.getpid(), "one call here settles the terms"
    assert len(calls) == 7, "no trial is begun twice, but the killed one"
    owners = {str(trial.user_attrs["autoaccum.owner"]["pid"]) for trial in result.study.trials}
    assert owners == {pid for pid, _ in calls}
    assert str(os.getpid()) not in owners
    assert {threads for _, threads in calls} == {str(places(2)[0].threads)}


def test_workers_that_die_one_after_another_end_the_search(tmp_path):
    with pytest.raises(AutoaccumError, match=r"workers died one after another.*ended by SIGKILL"):
        search(tmp_path, killed_always, 4, workers=2)


def test_an_error_that_ends_the_search_reaches_the_caller_from_a_worker(tmp_path):
    with pytest.raises(SetupError, match="all of the first 5 trials failed"):
        search(tmp_path, fails_in_a_worker, 12, workers=2)


def test_a_setup_that_cannot_be_sent_says_what_to_do(tmp_path):
    with pytest.raises(SetupError, match=r"cannot be sent to other processes.*top level.*workers=1"):
        search(tmp_path, lambda: {**arguments()}, 2, workers=2)


def test_places_share_threads_and_refuse_gpus_that_are_not_there(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [place.threads for place in places(3)] == [2, 2, 2]
    assert places(1)[0].memory is None
    assert places(2)[0].memory > 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceError, match="no CUDA device"):
        places("gpus")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [(place.device, place.threads) for place in places("gpus")] == [("cuda:0", 4), ("cuda:1", 4)]
    for wrong in (0, -1, "all", 1.5, True):
        with pytest.raises(SetupError, match="workers="):
            places(wrong)
