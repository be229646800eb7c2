"""What is searched, said in plain terms: what each form means, and that every mistake is named."""

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.errors import SetupError
from autoaccum.planning.plan import plan
from autoaccum.searching.space import read_space
from autoaccum.searching.terms import check_targets, read_budget, steps_for


def drawn(space, times=20):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [read_space(space).suggest(study.ask()) for _ in range(times)]


def test_tuples_are_ranges_and_lists_are_choices():
    found = drawn({"lr": (1e-4, 1e-1, "log"), "decay": [0, 1e-4, None], "layers": (2, 6), "p": (0, 0.5)})

    assert all(1e-4 <= each["lr"] <= 1e-1 for each in found)
    assert {each["decay"] for each in found} == {0, 1e-4, None}
    assert {type(each["layers"]) for each in found} == {int}
    assert {type(each["p"]) for each in found} == {float}
    assert sum(each["lr"] < 3e-3 for each in found) >= 5, "evenly over the logarithm, not over the range"


def test_a_function_of_the_trial_gives_its_own_parameters():
    assert drawn(lambda trial: {"depth": trial.suggest_int("layers", 2, 2)}, 1) == [{"depth": 2}]


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({}, "no parameters"),
        ({"lr": (0.1, 0.1)}, "'lr'.*empty range"),
        ({"lr": (0.2, 0.1)}, "'lr'.*empty range: 0.2 is not below 0.1"),
        ({"lr": (0, 0.1, "log")}, "'lr'.*logarithmic and goes down to 0"),
        ({"lr": (-1, 0.1, "log")}, "'lr'.*goes down to -1"),
        ({"lr": (1e-3, 0.1, "lin")}, 'can only be "log"'),
        ({"lr": (1e-3, float("inf"))}, "inf is not a finite number"),
        ({"lr": ("a", "b")}, "'a' is not a finite number; for choices write a list"),
        ({"lr": 0.1}, "neither a range nor choices"),
        ({"lr": []}, "no choices"),
        ({"lr": [1, 1]}, "a choice twice"),
        ({"lr": [(1, 2)]}, "choices are kept in the study as numbers, texts"),
        ({"not a name": [1]}, "'not a name'"),
    ],
)
def test_a_space_that_cannot_be_searched_names_the_parameter(space, said):
    with pytest.raises(SetupError, match=said):
        read_space(space)


def test_a_function_that_returns_no_dict_is_told_so():
    with pytest.raises(SetupError, match="space returned int"):
        drawn(lambda trial: 3, 1)


@pytest.mark.parametrize("targets", [(), (0,), (True,), ("64",), None, -3])
def test_target_batches_are_whole_numbers_above_0(targets):
    with pytest.raises(SetupError, match="target_batch"):
        check_targets(targets)


def test_budgets_are_samples_or_times():
    assert read_budget(5000) == (5000, "samples")
    assert read_budget("90s") == (90_000, "ms")
    assert read_budget("1.5 min") == (90_000, "ms")
    for wrong in (0, -1, True, 1.5, "soon", "0s", ""):
        with pytest.raises(SetupError, match="budget"):
            read_budget(wrong)


@given(st.integers(1, 60), st.integers(1, 500), st.integers(1, 3000), st.integers(1, 64))
def test_steps_are_the_fewest_that_see_the_budgets_samples(target, length, amount, limit):
    made = plan(limit, target, samples=length)
    sizes = list(made.window_sizes(length))
    steps = steps_for(made, amount, length)

    seen = [sizes[index % len(sizes)] for index in range(steps)]
    assert sum(seen) >= amount
    assert sum(seen[:-1]) < amount
