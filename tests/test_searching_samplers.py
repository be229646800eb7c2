"""What is drawn: no setting twice, whoever draws, and the same again after a restart."""

import optuna
import pytest
import torch

import autoaccum
from autoaccum.errors import SetupError
from autoaccum.searching.samplers import ByNumber, check_sampler
from autoaccum.searching.search import TARGETS
from tests.search_setups import arguments, short, wide


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def search(tmp_path, **keywords):
    keywords = {
        "space": {"lr": (1e-4, 1e-1, "log"), "target_batch": [8]},
        "pruner": "none",
        "study_name": "s",
        **keywords,
    }
    return autoaccum.search(keywords.pop("setup", short), **{"folder": tmp_path / "run", "n_trials": 4, **keywords})


def rates(result):
    return [row["params"]["lr"] for row in result.trials]


def shared(tmp_path):
    """A study that two processes have open."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "j")))
    return [optuna.create_study(storage=storage, study_name="s", load_if_exists=True) for _ in range(2)]


@pytest.mark.parametrize("sampler", [None, "tpe", optuna.samplers.RandomSampler, optuna.samplers.TPESampler])
def test_two_machines_that_draw_at_the_same_moment_draw_differently(tmp_path, sampler):
    """Each has looked at the study before the other's trial was made."""
    machines = []
    for study in shared(tmp_path):
        own = sampler(seed=1) if isinstance(sampler, type) else sampler  # each has read the same script
        machines.append((study, ByNumber(own, seed=0, n_trials=9, first={})))
    trials = [drawing.ask(study) for _ in range(2) for study, drawing in machines]
    drawn = [trial.suggest_float("x", 0, 1) for trial in trials]

    assert len(set(drawn)) == 4


@pytest.mark.usefixtures("spawns_warm")
def test_workers_and_restarts_draw_nothing_twice_from_a_sampler_of_the_users(tmp_path):
    search(tmp_path, sampler=optuna.samplers.RandomSampler(seed=1), workers=2, n_trials=4)
    result = search(tmp_path, sampler=optuna.samplers.RandomSampler(seed=1), n_trials=7)

    assert len(set(rates(result))) == 7


def test_a_sampler_of_the_users_keeps_its_seed_where_one_process_draws_all(tmp_path):
    first = search(tmp_path / "a", sampler=optuna.samplers.RandomSampler(seed=1))
    again = search(tmp_path / "b", sampler=optuna.samplers.RandomSampler(seed=1))

    assert rates(first) == rates(again)


def test_a_sampler_sees_all_that_happens_to_a_trial(tmp_path):
    class Seeing(optuna.samplers.RandomSampler):
        def before_trial(self, study, trial):
            seen.append(("before", trial.number))

        def after_trial(self, study, trial, state, values):
            seen.append((state.name, trial.number, values))

    seen = []
    result = search(tmp_path, sampler=Seeing(), n_trials=2)

    values = [[row["value"]] for row in result.trials]
    assert seen == [("before", 0), ("COMPLETE", 0, values[0]), ("before", 1), ("COMPLETE", 1, values[1])]


def test_optunas_hyperband_shows_each_sampler_the_trials_of_its_bracket(tmp_path):
    pruner = optuna.pruners.HyperbandPruner(min_resource=90, max_resource=810)
    result = search(tmp_path, setup=arguments, pruner=pruner, n_trials=8, space={"lr": (1e-3, 1e-1, "log"),
                    "target_batch": [8]})  # fmt: skip

    assert len(result.trials) == 8


def test_the_first_trial_has_the_setups_own_values(tmp_path):
    """What it says of the rate, the defaults of its parameters; what lies outside of the space is drawn."""
    space = {"lr": (1e-3, 1e-1, "log"), "target_batch": [8, 16], "width": (2, 9), "weight_decay": [0.5, 0.25]}
    result = search(tmp_path, setup=wide, space=space, n_trials=4, target_batch=TARGETS)
    first, *others = sorted(result.trials, key=lambda row: row["number"])

    assert (first["params"]["lr"], first["params"]["width"]) == (1e-2, 4)
    assert first["params"]["weight_decay"] in (0.5, 0.25)
    assert all(row["params"]["lr"] != 1e-2 for row in others)


def test_a_random_search_is_random_from_its_first_trial_on(tmp_path):
    assert 1e-2 not in rates(search(tmp_path, sampler=optuna.samplers.RandomSampler(seed=0)))


@pytest.mark.parametrize("wrong", ["best", "random", "cmaes", ["tpe"], 3, optuna.samplers.RandomSampler])
def test_what_is_no_sampler_is_refused(wrong):
    with pytest.raises(SetupError, match=r"leave it out for TPE, or give a sampler of Optuna's"):
        check_sampler(wrong, None, trusted=False)
