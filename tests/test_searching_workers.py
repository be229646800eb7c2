"""Several workers: who takes which trial, what a kill costs, and how an interruption ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import psutil
import pytest

import autoaccum
from autoaccum.errors import AutoaccumError, DeviceError, SetupError
from autoaccum.searching.worker_pool import places
from tests.search_setups import arguments, counted, fails_in_a_worker, killed_always, probed, slow

ROOT = Path(__file__).parents[1]
SCRIPT = """
import signal
import sys
import torch
torch.set_num_threads(2)
import autoaccum
from tests import search_setups

if __name__ == "__main__":
    # Tests that run in the background of a shell may have inherited that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    setup = getattr(search_setups, sys.argv[2])
    result = autoaccum.search(setup, n_trials=int(sys.argv[3]), workers=int(sys.argv[4]), target_batch=(8, 16),
                              folder=sys.argv[1], study_name="s", pruner="none")
    print(len(result.trials))
"""


def search(tmp_path, setup, n_trials, **keywords):
    keywords = {"target_batch": (8, 16), "folder": tmp_path / "run", "study_name": "s", "pruner": "none", **keywords}
    return autoaccum.search(setup, n_trials=n_trials, **keywords)


def started(tmp_path, setup, n_trials, workers):
    """The same search in a process of its own, with a process group of its own, as a shell gives it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "run"), setup, str(n_trials), str(workers)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SEARCH_SLEEP": "5"},
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def trials(tmp_path):
    journal = tmp_path / "run" / "journal.log"
    if not journal.exists() or not journal.stat().st_size:
        return []
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    found = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name="s", storage=storage).trials if found else []


def wait_for(tmp_path, process, reached, seconds=90):
    """Until the study is so far; fails where the process ends before or it takes too long."""
    deadline = time.monotonic() + seconds
    while not reached(trials(tmp_path)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def states(tmp_path):
    return Counter(trial.state.name for trial in trials(tmp_path))


def running(found):
    return any(trial.state.name == "RUNNING" and "autoaccum.owner" in trial.user_attrs for trial in found)


@pytest.mark.usefixtures("spawns_warm")
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
    assert {threads for _, threads in calls} == {str(places(2)[0]["threads"])}


@pytest.mark.slow
def test_workers_that_die_one_after_another_end_the_search(tmp_path):
    with pytest.raises(AutoaccumError, match=r"workers died one after another.*ended by SIGKILL"):
        search(tmp_path, killed_always, 4, workers=2)


@pytest.mark.slow
def test_an_error_that_ends_the_search_reaches_the_caller_from_a_worker(tmp_path):
    # When the fifth has failed, the other worker may be in a sixth.
    with pytest.raises(SetupError, match="all of the first [56] trials failed"):
        search(tmp_path, fails_in_a_worker, 12, workers=2)


def test_a_setup_that_cannot_be_sent_says_what_to_do(tmp_path):
    with pytest.raises(SetupError, match=r"cannot be sent to other processes.*top level.*workers=1"):
        search(tmp_path, lambda: {**arguments()}, 2, workers=2)


@pytest.mark.slow
def test_interrupted_killed_and_orphaned_a_search_ends_with_exactly_its_trials(tmp_path):
    process = started(tmp_path, "slow", 6, 2)
    wait_for(tmp_path, process, running)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT or "KeyboardInterrupt" in error
    interrupted = states(tmp_path)

    process = started(tmp_path, "slow", 6, 2)
    wait_for(tmp_path, process, running)
    begun = [trial.user_attrs.get("autoaccum.owner") for trial in trials(tmp_path) if trial.state.name == "RUNNING"]
    pids = {owner["pid"] for owner in begun if owner is not None}  # who comes after the first may not have signed yet
    process.kill()  # the parent alone: its workers see it, and go
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    orphans = [pid for pid in pids if alive(pid)]
    result = search(tmp_path, slow, 6)

    assert interrupted["RUNNING"] == 0, "every worker marked its trial before it went"
    assert pids
    assert orphans == []
    finished = [row for row in result.trials if row["state"] != "killed"]
    assert [row["state"] for row in finished] == ["complete"] * 6
    assert len({json.dumps(row["params"]) for row in finished}) == 6, "none twice"
    assert json.loads((tmp_path / "run" / "best.json").read_text())["value"] == result.best_value


UNSENDABLE = """
import autoaccum
from tests.search_setups import arguments

def setup():
    return arguments(epochs=1)

{guard}
    autoaccum.search(setup, n_trials=2, workers=2, target_batch=8, folder={folder!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stdin", "-c"])
def test_a_setup_without_a_file_is_refused_at_once(tmp_path, how):
    code = UNSENDABLE.format(guard="if __name__ == '__main__':", folder=str(tmp_path / "run"))
    done = run_python([] if how == "stdin" else ["-c", code], input=code if how == "stdin" else None)

    assert "cannot be sent to other processes" in done.stderr.splitlines()[-1]
    assert "at the top level of a module" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(UNSENDABLE.format(guard="if True:", folder=str(tmp_path / "run")))
    done = run_python([str(script)])

    assert 'below `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("autoaccum.errors.AutoaccumError: 3 workers died one after another")


def run_python(words, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100, **more)


@pytest.mark.usefixtures("spawns_warm")
def test_a_plan_says_that_the_free_memory_was_shared_out(tmp_path):
    result = search(tmp_path, probed, 2, workers=2)

    assert result.best_plan.reasons["budget"].endswith("what is free, shared out over 2 workers")


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_places_share_threads_and_refuse_gpus_that_are_not_there(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [place["threads"] for place in places(3)] == [2, 2, 2]
    assert "memory" not in places(1)[0]
    assert places(2)[0]["memory"] > 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceError, match="no CUDA device"):
        places("gpus")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [(place["device"], place["threads"]) for place in places("gpus")] == [("cuda:0", 4), ("cuda:1", 4)]
    for wrong in (0, -1, "all", 1.5, True):
        with pytest.raises(SetupError, match="workers="):
            places(wrong)
