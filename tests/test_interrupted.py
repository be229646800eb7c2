"""Ctrl-C at any moment of a probe, a check or a training leaves everything as it was, or whole."""

import os
import random
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

import autoaccum
from autoaccum.errors import AutoaccumError, DataError, SetupError
from autoaccum.ranks import Ranks
from tests.first_forward import Hooked, picture
from tests.interrupting import python_handles_it
from tests.torture.interrupts import KINDS, run

X, Y = torch.randn(24, 6), torch.arange(24) % 3


@pytest.fixture(autouse=True)
def _handled(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path))
    with python_handles_it():
        yield


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("kind", KINDS)
def test_at_some_random_moments(kind):
    assert run(2, seed=len(kind), kinds=(kind,)).failures == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_at_a_hundred_random_moments():
    assert run(100).failures == []


# --- training


def prepared(model, data=(X, Y), **keywords):
    keywords = {"target_batch": 8, "micro_batch": 4, "epochs": 2, "seed": 3, "check": False, "lr": 0.1, **keywords}
    return autoaccum.prepare(model, data, loss=nn.CrossEntropyLoss(), device="cpu", **keywords)


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


class Interrupting(torch.optim.SGD):
    """Ctrl-C comes in the middle of the third step."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps == 3:
            interrupt()
            len(self.param_groups)
        return super().step(closure)


@pytest.mark.parametrize("saves", [False, True], ids=["no folder", "folder"])
def test_inside_a_step_it_waits_for_the_step_and_the_loop_goes_on(tmp_path, saves):
    ends = []
    for kind in (torch.optim.SGD, Interrupting):
        model = Hooked()
        folder = tmp_path / kind.__name__ if saves else None
        loop = prepared(model, optimizer=lambda p, lr, kind=kind: kind(p, lr=lr), checkpoint=folder)
        if kind is Interrupting:
            with pytest.raises(KeyboardInterrupt):
                loop.run()
            assert loop.step == len(loop.history) == 3
        result = loop.run()
        assert [record.step for record in result.history] == [1, 2, 3, 4, 5, 6]
        ends.append(weights(model))
    assert torch.equal(*ends)


class Augmented(Dataset):
    """Draws from the global generators, and is broken off once in the middle of a fetch."""

    left = None

    def __len__(self):
        return 24

    def __getitem__(self, index):
        noise = torch.randn(6) + random.random()
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                interrupt()
        return noise + X[index], int(Y[index])


@pytest.mark.parametrize("saves", [False, True], ids=["no folder", "folder"])
@pytest.mark.parametrize("at", [1, 6, 21, 30])
def test_a_fetch_that_was_broken_off_draws_its_augmentation_anew(tmp_path, saves, at):
    ends = []
    for place in (None, at):
        random.seed(0)
        torch.manual_seed(0)
        model = Hooked()
        folder = tmp_path / str(place) if saves else None
        data = Augmented()
        loop = prepared(model, data, seed=None, checkpoint=folder)
        data.left = place
        if place is not None:
            with pytest.raises(KeyboardInterrupt):
                loop.run()
        assert len(loop.run().history) == 6
        ends.append(weights(model))
    assert torch.equal(*ends)


class Stream(IterableDataset):
    """Read again from its beginning each time, and broken off once in its own code."""

    left, samples = None, 24

    def __iter__(self):
        for index in range(self.samples):
            if self.left is not None:
                self.left -= 1
                if self.left == 0:
                    interrupt()
            yield X[index % 24], int(Y[index % 24])


def test_a_stream_that_was_broken_off_in_its_own_code_is_read_to_its_end():
    ends = []
    for place in (None, 13):
        model, data = Hooked(), Stream()
        loop = prepared(model, data, epochs=1)
        data.left = place
        if place is not None:
            with pytest.raises(KeyboardInterrupt):
                loop.run()
        assert [record.samples for record in loop.run().history] == [8, 8, 8]
        ends.append(weights(model))
    assert torch.equal(*ends)


def test_a_stream_that_is_read_once_and_was_broken_off_in_its_own_code_does_not_end_early_in_silence():
    data = Stream()
    data.samples = 400  # more than are looked at beforehand
    loop = prepared(Hooked(), iter(data), epochs=1)
    data.left = 13
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    with pytest.raises(DataError, match="broken off"):
        loop.run()


def test_in_a_callback_it_comes_at_once_and_nothing_is_trained_twice():
    def listen(event):
        if event.name == "step" and event.record.step == 2 and not heard:
            heard.append(event)
            interrupt()

    heard = []
    loop = prepared(Hooked(), callbacks=[listen])
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert [record.step for record in loop.run().history] == [1, 2, 3, 4, 5, 6]


# --- what is left on the model


def hooks(model):
    held = [value for module in model.modules() for name, value in vars(module).items() if name.endswith("_hooks")]
    held += [parameter._backward_hooks for parameter in model.parameters()]
    return sum(len(each or ()) for each in held)


def test_a_probe_that_is_refused_leaves_nothing_on_the_model():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    before = picture(model)
    for wrong in ({"memory": "8 gigs"}, {"accumulate": "x"}, {"on_nonfinite": "x"}, {"batch_norm": "x"}):
        with pytest.raises(AutoaccumError):
            autoaccum.probe(model, (X, Y), loss=nn.CrossEntropyLoss(), target_batch=8, device="cpu", **wrong)
    assert picture(model) == before


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_training_takes_its_hooks_off(precision):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    prepared(model, precision=precision, max_steps=1).run()
    assert hooks(model) == 0


class Two(Ranks):
    """One of two ranks, with nobody to talk to."""

    size = 2


def test_on_several_ranks_what_measures_the_noise_leaves_no_hooks():
    model = nn.Linear(6, 3)
    made = autoaccum.plan(4, 16, world_size=2, rank=0)
    accumulator = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters()), made, ranks=Two())
    accumulator.open([X[:4], X[4:8]])
    accumulator.discard()
    assert hooks(model) == 0


def test_gradients_that_stand_are_refused_by_a_training_before_it_probes():
    model = nn.Linear(6, 3)
    model.weight.grad = torch.ones(3, 6)
    with pytest.raises(SetupError, match="gradient stands"):
        autoaccum.prepare(model, (X, Y), loss=nn.CrossEntropyLoss(), target_batch=8, device="cpu")
