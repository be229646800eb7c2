"""Ctrl-C at the worst moments: whenever it comes, the search ends with it, and the trial at hand is marked."""

import contextlib
import itertools
import os
import signal

import optuna
import pytest
import torch

import autoaccum
from autoaccum.interrupts import interruption_in
from autoaccum.searching.storage import open_storage
from autoaccum.searching.study import OUTCOME
from tests.search_setups import arguments, short


@pytest.fixture(autouse=True)
def _one_thread():
    before, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
    yield
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(before)


def search(tmp_path, setup=short, **keywords):
    keywords = {"n_trials": 3, "target_batch": (8, 16), "pruner": "none", "study_name": "s", **keywords}
    return autoaccum.search(setup, folder=tmp_path / "run", **keywords)


def trials(tmp_path):
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "run" / "journal.log"))
    return optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend)).trials


def interrupts_at(monkeypatch, name, number):
    """Ctrl-C comes right after the system call of this name has touched a lock for the so manieth time."""
    real, count = getattr(os, name), itertools.count(1)

    def call(*paths):
        real(*paths)
        if ".lock" in str(paths[-1]) and "journal" in str(paths[-1]) and next(count) == number:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("name", ["symlink", "rename", "unlink"])
def test_at_whatever_write_it_comes_the_search_ends_and_no_trial_is_left_running(tmp_path, monkeypatch, name):
    for number in range(3, 18):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            interrupts_at(patch, name, number)
            with pytest.raises(KeyboardInterrupt):
                search(folder, n_trials=9)  # more writes than are tried

        found = trials(folder)
        assert not [trial.number for trial in found if trial.state.name == "RUNNING"], number
        assert {trial.user_attrs.get(OUTCOME) for trial in found if trial.state.name == "FAIL"} <= {"interrupted"}
        assert not list((folder / "run").glob("journal.log.lock*"))


def test_a_search_that_was_interrupted_at_a_write_goes_on_to_its_total(tmp_path, monkeypatch):
    for number in range(4, 30, 5):
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            interrupts_at(patch, "unlink", number)
            search(tmp_path)

    assert [row["state"] for row in search(tmp_path).trials] == ["complete"] * 3


def test_one_that_became_another_error_in_the_users_code_is_no_error_of_the_trial(tmp_path):
    def setup():
        calls.append(1)
        if len(calls) == 2:
            try:
                raise KeyboardInterrupt
            finally:
                raise FileNotFoundError("cleaning up went wrong")
        return arguments(epochs=1)

    calls = []
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, setup)
    assert [trial.user_attrs[OUTCOME] for trial in trials(tmp_path)] == ["interrupted"]


def test_a_search_begun_in_the_handling_of_one_has_errors_of_its_own(tmp_path):
    def setup():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in this trial alone")
        return arguments(epochs=1)

    calls = []
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        result = search(tmp_path, setup)
    assert [row["state"] for row in result.trials] == ["error", "complete", "complete"]


def test_a_lock_whose_holder_was_killed_is_broken(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    os.symlink(str(tmp_path / "j"), str(tmp_path / "j.lock"))
    (tmp_path / "j").touch()
    study = optuna.create_study(storage=open_storage(tmp_path / "j"))
    study.set_user_attr("goes", "on")
    assert [path.name for path in tmp_path.iterdir()] == ["j"]


def test_the_interruption_behind_an_error_is_found():
    interruption, error = KeyboardInterrupt(), ValueError()
    error.__context__ = RuntimeError()
    error.__context__.__cause__ = interruption

    assert interruption_in(error) is interruption
    assert interruption_in(error, outer=error.__context__) is None
    assert interruption_in(ValueError()) is None
