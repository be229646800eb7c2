"""Plain values in and out: what a checkpoint can hold, the generators, and what tells one training from another."""

import enum
import io
import random
from collections import Counter, OrderedDict, UserDict, deque, namedtuple

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from autoaccum.errors import CheckpointError
from autoaccum.model.optimizer import optimizer_name
from autoaccum.random_state import RandomState, seed_everything
from autoaccum.training.state import SCHEMA, check_same, load_optimizer, plain, scheduler_state

CPU = torch.device("cpu")


class Colour(enum.IntEnum):
    RED = 3


def written_and_read(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_what_is_not_plain_is_made_so_and_survives_a_file():
    point = namedtuple("point", "x y")
    value = {
        "plain": [None, True, 1, 2.5, 1 + 2j, "text", b"bytes", (1, 2), torch.float16, CPU],
        "mappings": OrderedDict(a=UserDict(b=1)),
        "counts": Counter([2, 2, 5]),
        "sequences": [deque([1]), point(1, 2), torch.Size([2, 3]), range(3)],
        "numpy": [numpy.float64(0.1), numpy.int32(7), numpy.arange(3), numpy.bool_(True)],
        "subclasses": [Colour.RED],
        "parameter": nn.Parameter(torch.ones(2)),
    }
    got = written_and_read(plain(value, "it"))
    assert got["plain"] == value["plain"]
    assert got["mappings"] == {"a": {"b": 1}}
    assert got["counts"].most_common() == [(2, 2), (5, 1)]
    assert got["sequences"] == [[1], (1, 2), (2, 3), [0, 1, 2]]
    assert got["numpy"][:2] == [0.1, 7]
    assert [type(item) for item in got["numpy"][:2]] == [float, int]
    assert torch.equal(got["numpy"][2], torch.arange(3))
    assert got["subclasses"] == [3]
    assert type(got["parameter"]) is torch.Tensor


@pytest.mark.parametrize("value", [object(), lambda: 1, {1, 2}, torch.Generator(), int])
def test_what_only_code_can_make_is_refused_by_its_place(value):
    with pytest.raises(CheckpointError, match=r"it\['a'\]\[1\] is a"):
        plain({"a": [0, value]}, "it")


def draws():
    return [numpy.random.randn(), numpy.random.rand(), random.gauss(0, 1), random.random(), torch.rand(2).tolist()]


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["numpy", "normal", "python", "gauss", "torch", "seed", "look"]), max_size=6))
@example(["gauss", "look", "gauss"])  # the second value was kept from the first draw: the words stay as they are
@example(["normal", "look", "normal"])
def test_the_generators_come_back_whatever_was_drawn_before(used):
    actions = {
        "numpy": lambda: numpy.random.rand(3), "normal": numpy.random.randn, "python": random.random,
        "gauss": lambda: random.gauss(0, 1), "torch": lambda: torch.rand(1), "seed": lambda: seed_everything(7),
        "look": lambda: RandomState(CPU, quick=True),
    }  # fmt: skip
    for name in used:
        actions[name]()
    kept = RandomState(CPU, quick="seed" not in used)
    want = draws()
    kept.restore()
    assert draws() == want
    state = written_and_read(kept.state_dict())
    RandomState.from_state(state, CPU).restore()
    assert draws() == want


def test_what_another_kind_of_device_drew_is_left_as_it_is():
    torch.manual_seed(3)
    state = {**RandomState(CPU).state_dict(), "device": "cuda", "accelerator": torch.zeros(16, dtype=torch.uint8)}
    want = draws()
    RandomState.from_state(state, CPU).restore()
    assert draws() == want


def test_optimizers_state_comes_back_in_the_dtype_it_had():
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {"fine": torch.tensor([1.001, 2.001, 3.001]), "count": 3}
    saved = optimizer.state_dict()
    other = torch.optim.SGD([parameter], lr=0.5)
    load_optimizer(other, saved)
    assert torch.equal(other.state[parameter]["fine"], torch.tensor([1.001, 2.001, 3.001]))
    assert other.state[parameter]["fine"] is not optimizer.state[parameter]["fine"]
    assert other.param_groups[0]["lr"] == 0.1


def test_an_optimizer_is_named_by_its_class_and_its_groups():
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    assert optimizer_name(torch.optim.SGD([a, b, c], lr=1)) == "SGD with 3 parameters"
    assert (
        optimizer_name(torch.optim.AdamW([{"params": [a]}, {"params": [b, c]}]))
        == "AdamW with groups of 1, 2 parameters"
    )


def test_a_schedulers_functions_stay_where_they_are():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    assert not any(callable(value) for value in scheduler_state(scheduler).values())


def test_all_that_differs_is_named_at_once():
    was = {"target_batch": 16, "seed": 1, "model's 'weight'": "float32 of shape (2, 3)"}
    saved = {"schema": SCHEMA, "identity": was}
    check_same(saved, was)
    with pytest.raises(CheckpointError) as caught:
        check_same(saved, {"target_batch": 32, "seed": 2, "loss's 'scale'": "float32 of shape ()"})
    for text in ("target_batch: 16 in the checkpoint, 32 here", "seed: 1 in the checkpoint, 2 here",
                 "model's 'weight': float32 of shape (2, 3) in the checkpoint, none here",
                 "loss's 'scale': none in the checkpoint, float32 of shape () here"):  # fmt: skip
        assert text in str(caught.value)
    with pytest.raises(CheckpointError, match="and 4 more"):
        check_same(saved, {**was, **dict.fromkeys(map(str, range(12)), 0)})
    with pytest.raises(CheckpointError, match="schema 7"):
        check_same({**saved, "schema": 7}, {})
