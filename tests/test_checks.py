"""Values are refused by name, with what to give instead."""

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.checks import check_counts, check_kind, check_seed, listed, one_of
from autoaccum.errors import PlanError, SetupError, shown


@pytest.mark.parametrize("value", [None, 1, 256])
def test_whole_numbers_of_one_or_more_are_counts(value):
    check_counts(target_batch=value)


@pytest.mark.parametrize("value", [0, -5, 1.0, "4", True])
def test_others_are_none(value):
    with pytest.raises(PlanError, match=f"regrow_after={value!r}: give a whole number"):
        check_counts(regrow_after=value)


@pytest.mark.parametrize("seed", [None, 0, 3, -1, 2**64 - 1])
def test_what_torchs_generators_take_is_a_seed(seed):
    check_seed(seed)


@pytest.mark.parametrize("seed", ["a", 1.5, 2**70, -(2**64), True, [1]])
def test_what_they_do_not_take_is_refused(seed):
    with pytest.raises(SetupError, match="^seed=.*: give a whole number"):
        check_seed(seed)


def test_a_value_of_another_kind_is_refused_with_its_type():
    check_kind("plan", 8, int, "a number")
    with pytest.raises(SetupError, match="plan=8 is of type int: give a text"):
        check_kind("plan", 8, str, "a text")


def test_functions_come_in_any_iterable_and_are_read_once():
    assert listed("sinks", ()) == []
    assert listed("sinks", iter([print])) == [print]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (print, r"callbacks=<built-in function print> is of type .*: give functions .* callbacks=\[print\]"),
        (None, "callbacks=None is of type NoneType"),
        ([print, 3], "callbacks has 3 in it, which cannot be called"),
        ("print", "callbacks has 'p' in it"),
    ],
)
def test_what_is_no_list_of_functions_is_refused(given, message):
    with pytest.raises(SetupError, match=message):
        listed("callbacks", given)


def test_one_of_takes_the_very_choices():
    one_of("check", True, (True, False, "warn"))
    with pytest.raises(SetupError, match="check=1: choose True, False, 'warn'"):
        one_of("check", 1, (True, False, "warn"))


@pytest.mark.parametrize("name", ["cache", "compile", "log_grad_norm"])
def test_a_word_is_no_switch(name):
    with pytest.raises(SetupError, match=f"{name}='no': choose True, False"):
        autoaccum.prepare(nn.Linear(2, 2), (torch.randn(8, 2), torch.randn(8, 2)), target_batch=4, loss=nn.MSELoss(),
                          device="cpu", **{name: "no"})  # fmt: skip


def test_an_optimizer_that_refuses_the_parameters_is_named():
    with pytest.raises(SetupError, match=r"refuses f\(params, lr=lr\) with this model's parameters and lr=0.001: only"):
        autoaccum.prepare(nn.Linear(2, 2), (torch.randn(8, 2), torch.randn(8, 2)), target_batch=4, loss=nn.MSELoss(),
                          device="cpu", optimizer=refusing)  # fmt: skip


def refusing(parameters, lr):
    raise ValueError("only matrices are taken")


class Broken:
    def __repr__(self):
        raise RuntimeError("no repr")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("short", "'short'"),
        (10**5000, "an integer of 16610 bits"),
        (True, "True"),
        (["a\nb"], "['a\\nb']"),
    ],
    ids=["text", "huge", "flag", "lines"],
)
def test_a_message_repeats_a_value_as_it_is_written(value, text):
    assert shown(value) == text


@pytest.mark.parametrize(
    "value", ["x" * 10**6, list(range(10**6)), {n: n for n in range(10**5)}, Broken(), [[[[[]]]]]], ids=list("abcde")
)
def test_a_message_repeats_the_beginning_of_a_value_at_most(value):
    assert 0 < len(shown(value)) <= 80
    assert "\n" not in shown(value)
