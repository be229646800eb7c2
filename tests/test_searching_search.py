"""A whole search in this process: what it finds, what it keeps, how it goes on, and what it refuses."""

import json
import logging
import math
import subprocess
import sys
import warnings

import optuna
import pytest
import torch

import autoaccum
from autoaccum.errors import MissingExtraError, NothingFitsError, PlanError, SetupError
from autoaccum.planning.plan import Plan
from autoaccum.searching.recipe import Recipe
from autoaccum.searching.samplers import make_pruner
from autoaccum.searching.search_result import best_arguments
from autoaccum.searching.study_trial import Limits
from tests.search_setups import (
    arguments,
    no_val_data,
    plain,
    probed,
    raises_always,
    raises_sometimes,
    wide,
)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def search(tmp_path, setup=plain, **keywords):
    targets = {} if "space" in keywords else {"target_batch": (8, 16)}
    return autoaccum.search(setup, **{"n_trials": 4, **targets, "folder": tmp_path / "run", **keywords})


# --- what it finds ---------------------------------------------------------------------------------------------------


def test_without_a_space_rate_and_batch_are_searched_and_the_rate_is_scaled_to_the_batch(tmp_path):
    result = search(tmp_path, n_trials=6)

    assert set(result.best_params) == {"lr", "target_batch"}
    assert all(1e-3 <= row["params"]["lr"] <= 1e-1 for row in result.trials)
    for row in result.trials:
        assert row["target_batch"] == row["params"]["target_batch"]
        assert row["lr"] == pytest.approx(row["params"]["lr"] * math.sqrt(row["target_batch"] / 8))
    complete = [row["value"] for row in result.trials if row["state"] == "complete"]
    assert result.best_value == min(complete)
    assert result.best_plan.target_batch == result.best_params["target_batch"]


def test_without_a_budget_a_trial_trains_for_the_setups_epochs_though_they_drop_a_tail(tmp_path):
    # 90 samples an epoch are two windows of 40; the ten that each drops are not made up for in a third epoch.
    result = search(tmp_path, lambda: arguments(epochs=2, tail="drop"), space={"target_batch": [40]}, n_trials=1)
    result.save(tmp_path / "best.json")

    saved = json.loads((tmp_path / "best.json").read_text())["fit"]
    assert (saved["epochs"], "max_steps" in saved) == (2, False)
    assert result.trials[0]["reports"][-1][0] == 2 * 80


def test_parameters_go_to_the_setup_where_it_takes_them_and_to_fit_otherwise(tmp_path):
    space = {"width": [3], "weight_decay": [0.5], "warmup_steps": [2], "target_batch": [16]}
    seen = []

    def setup(width, weight_decay):
        seen.append((width, weight_decay))
        return wide(width, weight_decay)

    result = search(tmp_path, setup, space=space, n_trials=1, pruner="none")

    assert seen[-1] == (3, 0.5)
    assert result.best_plan.target_batch == 16


def test_the_best_trial_is_had_again_from_its_file_to_the_last_digit(tmp_path):
    result = search(tmp_path, wide, space={"lr": (1e-3, 1e-1, "log"), "width": (2, 5), "target_batch": [8, 16]})
    result.save(tmp_path / "best.json")

    assert Plan.load(tmp_path / "best.json") == result.best_plan
    again = autoaccum.fit(**best_arguments(tmp_path / "best.json", wide), progress=False)
    assert again.evaluations[-1]["loss"] == result.best_value
    kept = torch.load(result.weights, weights_only=True)
    assert all(torch.equal(kept[name], value) for name, value in again.model.state_dict().items())


def test_only_the_best_trials_weights_are_kept(tmp_path):
    (tmp_path / "run").mkdir()
    theirs = tmp_path / "run" / "trial-0.pt"
    theirs.write_text("of the user's own")
    result = search(tmp_path, n_trials=5)

    assert set((tmp_path / "run").glob("*.pt")) == {result.weights, theirs}
    assert result.weights.name.startswith(f"trial-{result.best_number}-")
    assert json.loads((tmp_path / "run" / "best.json").read_text())["value"] == result.best_value


def test_a_metric_that_is_to_grow_is_searched_upwards(tmp_path):
    result = search(tmp_path, metric="accuracy", direction="maximize")

    assert result.best_value == max(row["value"] for row in result.trials if row["state"] == "complete")


def test_values_are_reported_against_samples_and_weak_trials_end_early(tmp_path):
    result = search(tmp_path, n_trials=10)

    whole = 9 * 90
    for row in result.trials:
        amounts = [amount for amount, _ in row["reports"]]
        assert amounts == sorted(set(amounts))
        assert (amounts[-1] == whole) == (row["state"] == "complete")
    assert {len(row["reports"]) for row in result.trials if row["state"] == "pruned"} == {1}, "at a ninth, if at all"
    assert any(row["state"] == "complete" for row in result.trials)


def test_an_epoch_longer_than_a_ninth_is_looked_at_in_its_middle(tmp_path):
    result = search(tmp_path, lambda: arguments(epochs=1), n_trials=10, space={"lr": (1e-5, 1e-1, "log"),
                    "target_batch": [8]})  # fmt: skip

    pruned = [row for row in result.trials if row["state"] == "pruned"]
    assert pruned
    assert {row["reports"][-1][0] for row in pruned} == {16}, "the first window's end after a ninth of 90 samples"


def test_a_report_in_mid_epoch_does_not_change_the_training(tmp_path):
    def setup():
        values = arguments(epochs=2)
        values["model"].insert(1, torch.nn.Dropout(0.3))
        draws = {"draws": lambda outputs, targets: autoaccum.Mean(torch.rand(()), 1)}  # as careless metrics do
        return {**values, "metrics": draws}

    result = search(tmp_path, setup, n_trials=1, space={"target_batch": [8]})
    result.save(tmp_path / "best.json")
    again = autoaccum.fit(**best_arguments(tmp_path / "best.json", setup), progress=False)

    assert any(amount % 90 for amount, _ in result.trials[0]["reports"]), "there was a report within an epoch"
    assert again.evaluations[-1]["loss"] == result.best_value


def test_a_budget_in_samples_is_the_same_for_every_batch(tmp_path):
    result = search(tmp_path, budget=200, pruner="none", n_trials=4)

    for row in result.trials:
        assert 200 <= row["samples"] < 200 + row["target_batch"]
    assert "max_steps" in result.arguments


def test_a_budget_in_seconds_ends_each_trial_in_time(tmp_path):
    result = search(tmp_path, budget="0.2s", n_trials=2, pruner="none")

    assert result.unit == "ms"
    assert all(row["samples"] > 0 for row in result.trials)
    assert result.arguments["max_steps"] >= 1


def test_without_val_data_the_training_loss_is_searched(tmp_path):
    result = search(tmp_path, no_val_data, n_trials=2)

    assert result.metric == "train_loss"
    assert math.isfinite(result.best_value)


def test_a_loss_that_is_not_finite_is_a_bad_value_and_no_failure(tmp_path):
    space = {"lr": [1e-2, 1e30], "target_batch": [8]}

    def setup():
        return arguments(epochs=3, optimizer="sgd", loss=lambda outputs, targets: (outputs**2).mean())

    result = search(
        tmp_path, setup, space=space, n_trials=6, sampler=optuna.samplers.RandomSampler(seed=0), pruner="none"
    )

    states = {row["params"]["lr"]: row["state"] for row in result.trials}
    assert states == {1e-2: "complete", 1e30: "diverged"}


# --- the probe -------------------------------------------------------------------------------------------------------


def test_the_probe_runs_once_for_all_that_need_the_same_memory(tmp_path, monkeypatch):
    asked = []
    real = Limits._probe
    monkeypatch.setattr(Limits, "_probe", lambda *a: asked.append(1) or real(*a))
    space = {"lr": (1e-3, 1e-1, "log"), "target_batch": [8, 16], "width": [3, 4]}
    result = search(tmp_path, probed, space=space, n_trials=5, sampler=optuna.samplers.RandomSampler(seed=0))

    assert len(asked) == len({row["params"]["width"] for row in result.trials})
    search(tmp_path, probed, space=space, n_trials=6, sampler=optuna.samplers.RandomSampler(seed=0))
    assert len(asked) <= 2, "a restart reads what is known"


def test_a_setting_in_which_nothing_fits_is_pruned_and_the_sampler_learns_from_it(tmp_path, monkeypatch):
    def tried(error):
        def report(self, key, session):
            if session.parts.model[0].out_features > 8:
                raise error
            return real(self, key, session)

        monkeypatch.setattr(Limits, "report", report)
        space = {"width": (2, 20), "target_batch": [8]}
        return search(tmp_path / type(error).__name__, probed, space=space, n_trials=24, seed=4)

    real = Limits.report
    result, control = tried(NothingFitsError("not even one fits")), tried(ValueError("a failure teaches nothing"))
    later = [row["state"] for row in result.trials[8:]].count("does not fit")

    assert result.best_params["width"] <= 8
    assert 0 < later < [row["state"] for row in control.trials[8:]].count("error")
    no_room = [t for t in result.study.trials if t.user_attrs.get("autoaccum.constraint")]
    assert {trial.state.name for trial in no_room} == {"PRUNED"}


def test_nothing_fits_anywhere_is_said_so(tmp_path, monkeypatch):
    def report(*_):
        raise NothingFitsError("not even one sample fits in 3 B")

    monkeypatch.setattr(Limits, "report", report)
    with pytest.raises(NothingFitsError, match=r"any of the 3 settings.*in 3 B"):
        search(tmp_path, probed, n_trials=3)


# --- the pruner ------------------------------------------------------------------------------------------------------


def looked_at(direction, amount, trials):
    """Whether the pruner gives up, at each report of trials that are told one after another."""
    study = optuna.create_study(direction=direction, pruner=make_pruner("once", amount))
    found = []
    for reports in trials:
        trial, answers = study.ask(), []
        for at, value in reports:
            trial.report(value, at)
            answers.append(trial.should_prune())
        ended = {"state": optuna.trial.TrialState.PRUNED} if any(answers) else {"values": reports[-1][1]}
        study.tell(trial, **ended)
        found.append(answers)
    return found


@pytest.mark.parametrize(("direction", "sign"), [("minimize", 1.0), ("maximize", -1.0)])
def test_one_look_at_a_ninth_of_the_budget_lets_the_best_quarter_go_on(direction, sign):
    values = [5.0, 6.0, 4.0, 4.5, 7.0, 4.2, 3.0, 8.0, 3.5]
    trials = [[(100, sign * value), (200, sign * 9.9), (900, sign * value)] for value in values]
    found = looked_at(direction, 900, trials)

    #       the best so far goes on; from eight on, the best two
    assert [answers[0] for answers in found] == [False, True, False, True, True, True, False, True, False]
    assert not any(any(answers[1:]) for answers in found), "a bad value later ends no trial"


def test_the_look_waits_for_the_first_report_after_a_ninth():
    found = looked_at("minimize", 900, [[(90, 1.0), (130, 1.0)], [(90, 9.0), (140, 2.0)], [(95, 9.0), (150, 0.5)]])

    assert found == [[False, False], [False, True], [False, False]]


def test_trials_that_failed_are_no_measure_for_others():
    study = optuna.create_study(pruner=make_pruner("once", 900))
    failed, own = study.ask(), study.ask()
    failed.report(0.1, 100)
    study.tell(failed, state=optuna.trial.TrialState.FAIL)
    own.report(5.0, 100)

    assert not own.should_prune()


# --- going on --------------------------------------------------------------------------------------------------------


def test_the_same_call_goes_on_to_the_total(tmp_path):
    first = search(tmp_path, n_trials=2)
    again = search(tmp_path, n_trials=5)
    done = search(tmp_path, n_trials=5)

    assert [row["number"] for row in again.trials] == [0, 1, 2, 3, 4]
    assert again.trials[:2] == first.trials
    assert done.trials == again.trials


def test_a_search_in_two_parts_tries_what_one_alone_tries(tmp_path):
    whole = search(tmp_path / "a", n_trials=7)
    search(tmp_path / "b", n_trials=3)
    parts = search(tmp_path / "b", n_trials=7)

    assert [row["params"] for row in whole.trials] == [row["params"] for row in parts.trials]
    assert [row["value"] for row in whole.trials] == [row["value"] for row in parts.trials]


def test_an_interrupted_trial_is_marked_and_its_parameters_run_again(tmp_path, monkeypatch):
    calls = []

    def setup():
        calls.append(1)
        if len(calls) == 3:  # one call settles the terms
            raise KeyboardInterrupt
        return arguments(epochs=1)

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, setup, n_trials=3)
    study = optuna.load_study(
        study_name=None, storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "run" / "journal.log"))
        ),
    )  # fmt: skip
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL"]
    result = search(tmp_path, setup, n_trials=3)

    assert len(result.trials) == 3
    again = next(row for row in result.trials if row["repeats"] == 1)
    assert again["params"] == study.trials[1].params


def test_resume_false_refuses_a_study_that_is_there(tmp_path):
    search(tmp_path, n_trials=1)
    with pytest.raises(SetupError, match=r"already in .*journal.log.*resume=False"):
        search(tmp_path, n_trials=2, resume=False)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"direction": "maximize"}, "direction 'minimize', and this search 'maximize'"),
        ({"metric": "accuracy"}, "has metric 'loss', and this search 'accuracy'"),
        ({"target_batch": (8, 32)}, r"has space .*\[8, 16\].* and this search .*\[8, 32\]"),
        ({"budget": 100}, "has amount 810, and this search 100"),
        ({"seed": 7}, "has seed 0, and this search 7"),
    ],
)
def test_a_study_of_another_search_is_refused_and_both_are_named(tmp_path, other, said):
    search(tmp_path, n_trials=1)
    with pytest.raises(SetupError, match=said):
        search(tmp_path, n_trials=2, **{"target_batch": (8, 16), **other})


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_setup_that_raises_in_some_trials_is_recorded_and_the_search_goes_on(tmp_path):
    result = search(tmp_path, raises_sometimes, space={"width": [2, 3, 4], "target_batch": [8]}, n_trials=9,
                    sampler=optuna.samplers.RandomSampler(seed=0))  # fmt: skip

    failed = [row for row in result.trials if row["state"] == "error"]
    assert {row["params"]["width"] for row in failed} == {3}
    assert failed[0]["error"]["message"] == "no width of 3"
    assert "raises_sometimes" in failed[0]["error"]["traceback"]
    assert len(result.trials) == 9


def test_a_setup_that_raises_in_all_of_the_first_five_ends_the_search_and_is_shown(tmp_path, monkeypatch):
    calls = []

    def setup(width=4):
        calls.append(width)
        return arguments(epochs=1) if len(calls) == 1 else raises_always(width)

    with pytest.raises(SetupError, match=r"all of the first 5 trials failed.*RuntimeError: never") as error:
        search(tmp_path, setup, space={"width": (1, 20), "target_batch": [8]}, n_trials=20)

    assert len(calls) == 6
    assert "raise RuntimeError" in str(error.value.__cause__)


def test_an_error_of_the_setup_before_any_trial_is_raised_as_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="never 4"):
        search(tmp_path, raises_always)


def test_a_metric_that_is_not_reported_ends_the_search_in_its_first_trial(tmp_path):
    def setup():
        return {**arguments(epochs=1), "step": nn_loss, "loss": None, "metrics": {}}

    with pytest.raises(SetupError, match=r"'f1' was not reported: the evaluation has"):
        search(tmp_path, setup, metric="f1", n_trials=5)


def nn_loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_a_space_that_raises_whatever_it_may_ends_the_search_and_is_shown(tmp_path):
    """It was asked again for ever: a trial that never was drawn counted for nothing."""

    def space(trial):
        if trial.number:
            raise AttributeError("no such thing")
        return {"lr": 1e-2, "target_batch": 16}

    result = search(tmp_path, plain, space=space, n_trials=3)
    assert [row["state"] for row in result.trials] == ["complete", "error", "error"]


def test_a_sampler_that_unpickles_the_study_is_refused_unless_the_storage_is_trusted(tmp_path):
    own = optuna.samplers.CmaEsSampler(seed=0)
    for storage in (None, f"sqlite:///{tmp_path}/study.db", "postgresql://me@host/db"):
        with pytest.raises(SetupError, match=r"unpickles what stands in the study.*trust_storage=True"):
            search(tmp_path, sampler=own, storage=storage)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SetupError, match="trust_storage='yes'"):
        search(tmp_path, trust_storage="yes")
    assert len(search(tmp_path, sampler=own, n_trials=2, trust_storage=True).trials) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"threads": 99999}, {"threads": 0}, {"threads": None}, {"threads": True}, {"seed": "0"},
        {"seed": 2**70}, {"params": None}, {"params": []}, {"params": {"lr": [1]}},
        {"fit": None}, {"fit": {"lr": []}}, {"fit": {"seed": 10**30}},
        {"fit": {"loss": "x"}}, {"plan": None}, {"plan": {"lr_scale": 0}}, {"fit": {"lr": 1e999}},
    ],
    ids=str,
)  # fmt: skip
def test_a_result_that_was_changed_is_refused_where_it_is_read(tmp_path, result_file, changed):
    values = json.loads(result_file)
    path = tmp_path / "best.json"
    path.write_text(json.dumps({**values, **changed}))
    with pytest.raises(PlanError, match="checksum|not finite|64 bits"):
        Plan.load(path)
    del values["checksum"]
    plans = {"plan": {**values["plan"], **changed["plan"]}} if changed.get("plan") else changed
    path.write_text(json.dumps({**values, **plans}))
    before = torch.get_num_threads()
    with pytest.raises(PlanError, match=str(path)) as caught:
        best = best_arguments(path, plain)
        assert best is None or "plan" in changed
        Plan.load(path)
    assert len(str(caught.value)) < 400
    assert torch.get_num_threads() == before


@pytest.fixture(scope="module")
def result_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("result")
    torch.set_num_threads(1)  # as each test has; this is made before the first of them sets it
    search(folder, n_trials=1)
    return (folder / "run" / "best.json").read_text()


@pytest.mark.parametrize(
    ("setup", "keywords", "said"),
    [
        (no_val_data, {"metric": "accuracy"}, "add it to the setup's metrics, and val_data"),
        (plain, {"metric": "f1"}, "'f1' is not reported: there are loss, train_loss, accuracy"),
        (plain, {"space": {"lr": (0.1, 0.1)}}, "empty range"),
        (plain, {"space": {"lr": (0.0, 0.1, "log")}}, "must hold for `log=True`"),
        (plain, {"space": {"wdith": (1, 2)}}, "'wdith', which neither the setup nor fit takes: did you mean 'width'"),
        (plain, {"space": {"momentum": (0.1, 0.9)}}, "'momentum', which neither"),
        (plain, {"space": {"epochs": (1, 3)}}, "give budget= instead"),
        (plain, {"n_trials": 0}, "n_trials=0"),
        (plain, {"direction": "down"}, "direction='down'"),
        (plain, {"sampler": "best"}, "sampler='best'"),
        (plain, {"space": {"target_batch": (0, 5)}}, "target_batch=0 is too small"),
        (plain, {"space": {"target_batch": [1.5, 2]}}, "target_batch=1.5 is a float: it counts samples"),
        (plain, {"pruner": "harsh"}, "pruner='harsh'"),
        (plain, {"workers": 0}, "workers=0"),
        (plain, {"target_batch": ()}, "target_batch"),
        (plain, {"space": {"lr": (1e-3, 0.1)}}, "every trial needs a target batch: search it"),
        (lambda: {**plain(), "target_batch": 2.5}, {"space": {"lr": (1e-3, 0.1)}}, "target_batch=2.5 is a float"),
        (plain, {"space": {"target_batch": [8]}, "target_batch": (8, 16)}, r"=\(8, 16\) beside a space"),
        (plain, {"space": lambda trial: {}, "target_batch": 8}, r"=\(8,\) beside a space"),
        (plain, {"space": {"checkpoint": ["a", "b"]}}, "'checkpoint', which belongs to one long training"),
        (plain, {"space": {"progress": [True, False]}}, "'progress', which belongs to one long training"),
        (plain, {"space": {"plan": ["a.json"]}}, "'plan', which fixes the target batch"),
        (plain, {"study_name": 5}, "study_name=5 is of type int: give a text"),
        (plain, {"sampler": ["tpe"]}, r"sampler=\['tpe'\]: leave it out"),
        (plain, {"workers": 2, "storage": optuna.storages.InMemoryStorage()}, "memory.*give the storage as a path"),
        (plain, {"seed": 2**64}, "seed="),
        (lambda: None, {}, "returned NoneType"),
        (lambda: {"model": 1}, {}, "without 'data'"),
        (lambda: {**plain(), "lern_rate": 1}, {}, "unknown key 'lern_rate'"),
        (lambda: {**plain(), "max_steps": 5}, {}, "give budget= in samples"),
        (lambda needed: plain(), {}, "missing a required argument: 'needed'; give it a default"),
        (lambda: {**(found := plain()), "optimizer": torch.optim.SGD(found["model"].parameters(), lr=0.1)}, {},
         "return its class or a factory"),
        ("train.py", {}, "give a function that returns a dict"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused_before_anything_is_trained(tmp_path, setup, keywords, said):
    if "wdith" in str(keywords):
        setup = wide
    with pytest.raises(SetupError, match=said):
        search(tmp_path, setup, **keywords)


def test_what_an_error_said_to_give_is_taken_in_the_same_study(tmp_path):
    """The study was made before the first trial found out, and the call that was mended was another space."""

    def space(trial):
        return {"lr": trial.suggest_float("lr", 1e-3, 1e-1)}

    with pytest.raises(SetupError, match="search it"):
        search(tmp_path, space=space, study_name="s")
    mended = {"lr": (1e-3, 1e-1), "target_batch": [8]}

    assert len(search(tmp_path, space=mended, study_name="s", n_trials=2).trials) == 2


def test_target_batches_beside_a_space_are_searched_with_it(tmp_path):
    result = search(
        tmp_path,
        space={"lr": (1e-3, 1e-1)},
        target_batch=(8, 32),
        n_trials=6,
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    fixed = search(tmp_path / "b", lambda: {**plain(), "target_batch": 16}, space={"lr": [1e-2]}, target_batch=8)

    assert {row["target_batch"] for row in result.trials} == {8, 32}
    assert {row["target_batch"] for row in fixed.trials} == {8}


def test_a_setup_that_takes_any_keyword_gets_all_and_what_it_keeps_to_itself_goes_to_fit(tmp_path):
    def setup(**keywords):
        seen.append(keywords)
        values = arguments(epochs=1, warmup_steps=2)
        values.pop("lr")
        return values

    seen = []
    space = {"lr": [0.5], "warmup_steps": [1], "width": [3], "target_batch": [8]}
    result = search(tmp_path, setup, space=space, n_trials=1)

    assert seen[-1] == {"lr": 0.5, "warmup_steps": 1, "width": 3, "target_batch": 8}
    assert result.arguments["lr"] == 0.5
    assert Recipe(setup, 0).build(seen[-1])["warmup_steps"] == 2, "what it returns itself is its word"


def test_a_setup_that_fails_in_some_settings_can_settle_the_terms_with_others(tmp_path):
    def setup(width):
        seen.append(width)
        if len(seen) < 3:
            raise RuntimeError(f"no width of {width}")
        return arguments(epochs=1)

    seen = []
    assert len(search(tmp_path, setup, space={"width": (1, 99), "target_batch": [8]}, n_trials=2).trials) == 2
    with pytest.raises(SetupError, match=r"all of the 5 settings tried before.*RuntimeError: never") as error:
        search(tmp_path / "b", lambda width: raises_always(width + 1), space={"width": (1, 99), "target_batch": [8]})
    assert isinstance(error.value.__cause__, RuntimeError)


def test_nothing_of_optunas_is_logged(tmp_path, monkeypatch):
    lines = []
    handler = logging.Handler()
    handler.emit = lines.append
    monkeypatch.setattr(logging.getLogger("optuna"), "handlers", [handler])
    search(tmp_path, lambda width: arguments(epochs=1), space={"width": (1, 99), "target_batch": [8]}, n_trials=1)

    assert [line.getMessage() for line in lines] == []


def test_the_searchs_seed_wins_over_the_setups_and_else_the_setups_stands(tmp_path):
    def setup():
        return arguments(epochs=1, seed=7)

    assert search(tmp_path / "a", setup, n_trials=1).arguments["seed"] == 7
    assert search(tmp_path / "b", setup, n_trials=1, seed=3).arguments["seed"] == 3
    assert search(tmp_path / "c", setup, n_trials=1, seed=3, space={"seed": [5], "target_batch": [8]}).arguments[
        "seed"] == 5  # fmt: skip


@pytest.mark.parametrize("what", ["file", "long"])
def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path, what):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run" if what == "file" else tmp_path / ("x" * 300)
    with pytest.raises(
        SetupError, match=r"folder '.*' cannot be made or written to \(.+\): give another one \(folder=\)"
    ):
        search(tmp_path, folder=folder)


def test_a_folder_that_cannot_be_written_to_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # as on a disk that is mounted to be read only
    with pytest.raises(SetupError, match=r"cannot be made or written to \(Permission denied\): give another one"):
        search(tmp_path)


def test_a_studys_name_with_separators_stays_below_the_folder_of_searches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("../out", "team/digits", "team-digits"):
        autoaccum.search(plain, n_trials=1, target_batch=8, study_name=name)

    assert [path.name for path in tmp_path.iterdir()] == ["autoaccum-search"]
    assert len(list((tmp_path / "autoaccum-search").iterdir())) == 3


def test_without_optuna_the_extra_is_named(tmp_path):
    code = """
import sys
sys.modules["optuna"] = None
import autoaccum
try:
    autoaccum.search(dict, n_trials=1)
except autoaccum.errors.MissingExtraError as error:
    assert 'pip install "autoaccum[search]"' in str(error), error
    sys.exit(3)
"""
    assert issubclass(MissingExtraError, ImportError)
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path).returncode == 3


def test_no_deprecated_name_of_optuna_is_used(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        search(tmp_path, n_trials=8)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_the_picture_has_the_values_of_all_trials(tmp_path):
    result = search(tmp_path, n_trials=3)
    result.plot(tmp_path / "search.svg")

    assert "<svg" in (tmp_path / "search.svg").read_text()
    with pytest.raises(SetupError, match="no plot can be written"):
        result.plot(tmp_path / "search.xyz")
