"""What is searched, said in plain terms: what each form means, and that every mistake is named."""

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.errors import SetupError
from autoaccum.planning.plan import plan
from autoaccum.searching.job import check_targets, read_budget, steps_for
from autoaccum.searching.space import read_space, space_of_texts


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


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    space = {"lr": (numpy.float32(0.5), numpy.float64(2), "log"), "layers": (numpy.int64(2), 6),
             "width": [numpy.int32(4), numpy.float64(0.5)]}  # fmt: skip

    assert read_space(space) == read_space({"lr": (0.5, 2.0, "log"), "layers": (2, 6), "width": [4, 0.5]})
    assert {type(value) for value in read_space(space).parts["width"].choices} == {int, float}
    assert check_targets((numpy.int64(8), 16)) == check_targets([8, 16]) == (8, 16)
    assert check_targets(numpy.int64(8)) == (8,)


def test_a_function_of_the_trial_gives_its_own_parameters():
    assert drawn(lambda trial: {"depth": trial.suggest_int("layers", 2, 2)}, 1) == [{"depth": 2}]


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({}, "no parameters"),
        ({"lr": (0.1, 0.1)}, "'lr'.*empty range"),
        ({"lr": (0.2, 0.1)}, "'lr'.*empty range: 0.2 is not below 0.1"),
        ({"lr": (0, 0.1, "log")}, "'lr'.*must hold for `log=True`"),
        ({"lr": (-1, 0.1, "log")}, "'lr'.*must hold for `log=True`"),
        ({"lr": (1e-3, 0.1, "lin")}, 'can only be "log"'),
        ({"lr": (1e-3, float("inf"))}, "inf is not a finite number"),
        ({"lr": ("a", "b")}, "'a' is not a number; for choices write a list"),
        ({"lr": 0.1}, "neither a range nor choices"),
        ({"lr": []}, "must contain one or more elements"),
        ({"lr": [1, 1]}, "a choice twice"),
        ({"lr": [1, 1.0]}, "a choice twice"),
        ({"lr": [True, 0, 1]}, "a choice twice"),
        ({"lr": (1, 10**400)}, "is not a finite number"),
        ({"lr": [(1, 2)]}, "choices are kept in the study as numbers, texts"),
        ({"not a name": [1]}, "'not a name'"),
    ],
)
def test_a_space_that_cannot_be_searched_names_the_parameter(space, said):
    with pytest.raises(SetupError, match=said):
        read_space(space)


def test_a_function_that_returns_no_dict_is_told_so():
    with pytest.raises(SetupError, match="what space returned=3 is of type int"):
        drawn(lambda trial: 3, 1)


def test_a_space_written_as_text_means_the_same_as_in_python():
    texts = [
        "lr=1e-4:1e-1:log",
        "weight_decay=0,1e-4,1e-2",
        "layers=2:6",
        "p=0:0.5",
        "name=sgd",
        "fast=true,False,none",
    ]

    assert space_of_texts([*texts, " clip_norm = 1 , 2.5 "]) == {
        "lr": (1e-4, 1e-1, "log"),
        "weight_decay": [0, 1e-4, 1e-2],
        "layers": (2, 6),
        "p": (0, 0.5),
        "name": ["sgd"],
        "fast": [True, False, None],
        "clip_norm": [1, 2.5],
    }
    assert [type(end) for end in space_of_texts(["layers=2:6"])["layers"]] == [int, int]
    assert [type(end) for end in space_of_texts(["p=0:0.5"])["p"]] == [int, float]


@given(
    st.dictionaries(
        st.sampled_from(["lr", "depth", "decay"]),
        st.one_of(
            st.tuples(st.floats(1e-9, 1.0), st.floats(1.5, 1e9), st.just("log")),
            st.tuples(st.integers(-9, 0), st.integers(1, 9)),
            st.lists(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans()),
                     min_size=1, max_size=4, unique=True),
        ),
        min_size=1,
    )
)  # fmt: skip
def test_what_is_written_from_a_space_is_read_as_that_space(space):
    texts = [f"{name}={(':' if isinstance(part, tuple) else ',').join(map(str, part))}" for name, part in space.items()]

    assert space_of_texts(texts) == space


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["lr"], "'lr' is neither a range nor choices"),
        (["lr="], "'lr=' is neither"),
        (["=1:2"], "neither a range nor choices"),
        (["lr=1:"], "neither a range nor choices: write NAME=LOW:HIGH"),
        (["lr=1,,2"], "neither a range nor choices"),
        (["lr=1:2:log:3"], "neither a range nor choices"),
        (["lr=1e-1:1e-4:log"], "empty range"),
        (["lr=0:1:log"], "must hold for `log=True`"),
        (["lr=1e-4:1:lin"], 'can only be "log"'),
        (["lr=low:high"], "'low' is not a number"),
        (["lr=nan"], "nan is not a finite number"),
        (["lr=1,1"], "a choice twice"),
        (["lr=1:2", "lr=3"], "'lr' is given twice"),
        (["weight-decay=1,2"], "'weight-decay': names are keywords"),
    ],
)
def test_a_text_that_says_no_space_is_refused_with_the_way_to_write_it(texts, said):
    with pytest.raises(SetupError, match=said):
        space_of_texts(texts)


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
    sizes = list(made.windows.sizes(length))
    steps = steps_for(made, amount, length)

    seen = [sizes[index % len(sizes)] for index in range(steps)]
    assert sum(seen) >= amount
    assert sum(seen[:-1]) < amount
