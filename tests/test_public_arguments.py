"""Whatever stands where a setting belongs: one clear line of ours, and the model as it was.

Each combination is drawn from a seed: a public function, valid arguments, and one to three of them replaced by a value
of another type, or far too large, or broken. Nothing may end in an error that is not ours.
"""

import fractions
import inspect
import itertools
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.errors import AutoaccumError

LOSS = nn.CrossEntropyLoss()


class Broken:
    """An object that cannot even be shown."""

    def __repr__(self):
        raise RuntimeError("no repr")


def values(chance: random.Random):
    """A value that hardly any setting takes."""
    return chance.choice([
        lambda: None, lambda: True, lambda: False, lambda: 0, lambda: 1, lambda: 3, lambda: -1, lambda: 2**31,
        lambda: 2**63, lambda: 2**64, lambda: 10**400, lambda: -(10**400), lambda: 10**5000, lambda: 1.5, lambda: -0.0,
        lambda: float("nan"), lambda: float("inf"), lambda: 1e308, lambda: 5e-324, lambda: 1j,
        lambda: fractions.Fraction(1, 3), lambda: "", lambda: " ", lambda: "auto", lambda: "8 gigs",
        lambda: "9" * 400 + "GiB", lambda: "1e9%", lambda: "x" * 10**6, lambda: "\0", lambda: "a\nb", lambda: b"auto",
        lambda: [], lambda: (), lambda: {}, set, lambda: [1], lambda: ["auto"], lambda: {"a": 1},
        lambda: range(3), lambda: torch.tensor(4), lambda: torch.tensor(0.1), lambda: torch.zeros(3),
        lambda: torch.tensor(float("nan")), lambda: np.array([1, 2]), lambda: np.int64(4), lambda: np.float32(0.1),
        lambda: np.array("auto"), lambda: np.bool_(True), object, Broken, lambda: Broken, lambda: int, lambda: print,
        lambda: lambda: None, lambda: lambda *args, **keywords: None, lambda: nn.Linear(2, 2), lambda: nn.Linear,
        lambda: iter([1]), lambda: (i for i in range(3)), itertools.count, lambda: Path("x"),
        lambda: [[[[[[[]]]]]]], lambda: list(range(10**5)), lambda: torch.device("cpu"), lambda: torch.float16,
        lambda: ValueError("x"), lambda: NotImplemented, lambda: ...,
    ])()  # fmt: skip


def arguments(function: str):
    """Valid arguments of a public function; (positional, keywords)."""
    data = torch.randn(24, 6), torch.randint(0, 4, (24,))
    common = {"loss": LOSS, "device": "cpu"}
    if function == "plan":
        return [8, 32], {}
    if function == "verify":
        return [nn.Linear(6, 4), data], common
    if function == "probe":
        return [nn.Linear(6, 4), data], {**common, "target_batch": 8, "cache": False}
    if function == "Accumulator":
        model = nn.Linear(6, 4)
        return [model, torch.optim.SGD(model.parameters(), lr=0.1), autoaccum.plan(4, 8)], {}
    keywords = {**common, "target_batch": 8, "micro_batch": 4, "seed": 0}
    return [nn.Linear(6, 4), data], {**keywords, "max_steps": 1} if function == "fit" else keywords


# How often each is drawn. fit is prepare and then run: it trains for ever where a number of steps asks it to.
FUNCTIONS = ["prepare"] * 5 + ["fit"] * 2 + ["probe"] * 2 + ["plan"] * 2 + ["verify", "Accumulator", "Mean"]
NOT_DRAWN = {
    "fit": {"epochs", "max_steps"},
    "prepare": {"isolate"},  # what can be called is called in a process of its own, which takes seconds
    "probe": {"isolate"},
}


def combination(seed: int):
    """(the public function's name, its arguments, what was put among them)."""
    chance = random.Random(seed)
    name = chance.choice(FUNCTIONS)
    if name == "Mean":
        return name, [values(chance), values(chance)], {}, {}
    positional, keywords = arguments(name)
    parameters = inspect.signature(getattr(autoaccum, name)).parameters
    names = [each for each in parameters if each not in NOT_DRAWN.get(name, {"isolate"}) and each != "isolate"]
    odd = {each: values(chance) for each in chance.sample(names, chance.choice([1, 1, 1, 2, 3]))}
    firsts = list(parameters)[: len(positional)]
    positional = [odd.get(each, given) for each, given in zip(firsts, positional, strict=True)]
    return name, positional, {**keywords, **{k: v for k, v in odd.items() if k not in firsts}}, odd


def state(model):
    if not isinstance(model, nn.Module):
        return None
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    flags = [module.training for module in model.modules()]
    return [p.detach().clone() for p in model.parameters()], [p.grad for p in model.parameters()], hooks, flags


def same(before, after):
    (values, *rest), (now, *others) = before, after
    return rest == others and all(torch.equal(a, b) for a, b in zip(values, now, strict=True))


def check(seed: int):
    """Calls a combination; all that may come out is what the module's first line says."""
    name, positional, keywords, odd = combination(seed)
    model = positional[0] if positional else None
    before = state(model)
    raised: Exception | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(autoaccum, name)(*positional, **keywords)
    except Exception as error:
        raised = error
    if raised is None:
        return
    text = str(raised)
    where = f"seed {seed}: {name} with {list(odd)}: {type(raised).__name__}: {text[:300]}"
    assert isinstance(raised, AutoaccumError), where
    assert 10 < len(text) < 1500, where
    assert "\n" not in text or isinstance(raised, autoaccum.errors.LossError), where
    assert before is None or same(before, state(model)), where


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where a value happens to be a path, it is one of this folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["isolate", "progress", "precision", "check", "compile"])
@pytest.mark.parametrize("value", [torch.ones(3), np.array([1, 0]), "x" * 10**6], ids=["tensor", "array", "text"])
def test_what_is_no_switch_is_refused_by_name(name, value):
    with pytest.raises(AutoaccumError, match=f"^{name}=") as raised:
        positional, keywords = arguments("prepare")
        autoaccum.prepare(*positional, **{**keywords, name: value})
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("seed", range(0, 100, 20))
def test_odd_arguments_end_in_a_clear_line(seed):
    for each in range(seed, seed + 20):
        check(each)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 1000, 50))
def test_many_more_odd_arguments_end_in_a_clear_line(seed):
    for each in range(seed, seed + 50):
        check(each)
