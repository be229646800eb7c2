"""The same again: the same seed, a probe before it, memory that runs out in mid-window."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from tests.conformance.models import CLASSES, Named, seeded, vectors
from tests.conformance.problems import Problem


def dropped():
    return seeded(lambda: Named(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.4), nn.Linear(32, CLASSES)))


def parameters(run):
    return [parameter.detach().clone() for parameter in run.model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.case(22, "dropout and shuffling on: the same seed gives the same run")
def test_the_same_seed_gives_the_same_run(trainer, figures):
    """At stake: a run that cannot be repeated cannot be debugged; bit by bit, whatever was drawn before it."""
    problem = Problem(
        model=dropped, samples=vectors(30), loss=nn.CrossEntropyLoss(), lr=0.1, seed=7, shuffle=True, epochs=2
    )
    runs = []
    for drawn in (1, 2):
        torch.manual_seed(drawn)
        runs.append(figures.attempt("twice", lambda: parameters(trainer.train(problem))))
        if runs[-1] is None:
            return
    repeated = same(*runs)
    figures.verdict("twice", repeated, "the same bits" if repeated else "differs")


@pytest.mark.case(22, "dropout and shuffling on: the same seed gives the same run", trainers=("autoaccum", "lightning"))
def test_a_probe_before_it_changes_nothing(trainer, figures):
    """At stake: a search for the batch size that leaves the generators or the weights elsewhere trains another run."""
    problem = Problem(model=dropped, samples=vectors(30), loss=nn.CrossEntropyLoss(), lr=0.1, shuffle=True)
    torch.manual_seed(3)
    plain = parameters(trainer.train(problem))
    if trainer.ours:
        options = {"micro_batch": None, "max_batch": problem.micro_batch, "cache": False}
        searched = dataclasses.replace(problem, options=options)
    else:
        searched = dataclasses.replace(problem, options={"tune": True})
    torch.manual_seed(3)
    run = trainer.train(searched)
    if trainer.ours:
        assert run.extra["result"].probe.micro_batch == problem.micro_batch
    repeated = same(plain, parameters(run))
    text = "the same bits" if repeated else "differs"
    figures.verdict("with and without a search for the batch size", repeated, text)


def noisy(samples):
    """Augmentation in the collator, from torch's generator."""
    batch = default_collate(samples)
    return {**batch, "x": batch["x"] + 0.1 * torch.randn(batch["x"].shape, dtype=torch.float64)}


@pytest.mark.case(23, "left in the middle of an epoch and resumed, dropout and shuffling on: as if never left")
@pytest.mark.parametrize("collator", ["plain", "random"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(trainer, figures, collator, tmp_path):
    """At stake: samples seen twice or never, an order or a dropout mask that is drawn anew, momentum that is lost. The
    random collator augments in the loading process, so that the data draws from the same generators as dropout."""
    label = "a random collator too" if collator == "random" else "a plain collator"
    if trainer.name == "Accumulator":
        pytest.skip("whoever keeps their own loop saves it")
    if trainer.name == "accelerate, recipe":
        figures.not_offered(label, "measured without the recipe")
        return
    problem = Problem(
        model=dropped, samples=vectors(30), loss=nn.CrossEntropyLoss(), lr=0.1, momentum=0.9, seed=7, shuffle=True,
        epochs=3, collate=noisy if collator == "random" else default_collate, save_to=str(tmp_path / "whole"),
    )  # fmt: skip
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()

    def train(**more):
        torch.manual_seed(11)  # as a new process would not know where the old one stood
        return trainer.train(dataclasses.replace(problem, **more))

    whole = figures.attempt(label, train)
    if whole is None:
        return
    parts = str(tmp_path / "parts")
    left = figures.attempt(label, lambda: train(save_to=parts, stop_after=6))  # in the second of three epochs
    resumed = None if left is None else figures.attempt(label, lambda: train(save_to=parts, resume=True))
    if resumed is None:
        return
    steps = len(left.gradients) + len(resumed.gradients)
    repeated = same(parameters(whole), parameters(resumed))
    text = "the same bits" if repeated else "differs"
    if steps != len(whole.gradients):
        text += f", {steps} updates instead of {len(whole.gradients)}"
    figures.verdict(label, repeated and len(left.gradients) == 6, text)


class Trip:
    """Runs out of memory once, at one micro-batch's forward or backward."""

    def __init__(self, at: int, where: str) -> None:
        self.left, self.where = at, where

    def check(self, where: str) -> None:
        if where == self.where:
            self.left -= 1
            if self.left == 0:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (simulated)")


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, trip):
        ctx.trip = trip
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.trip.check("backward")
        return gradient, None


class Tripping(nn.Module):
    """A classifier beside a BatchNorm layer that sees the input and whose output is not used."""

    def __init__(self, trip: Trip) -> None:
        super().__init__()
        self.norm, self.layers = nn.BatchNorm1d(6), nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, CLASSES))
        self.norm.requires_grad_(False)
        self.trip = trip

    def forward(self, x):
        self.norm(x)
        hidden = _Through.apply(self.layers[0](x), self.trip)
        self.trip.check("forward")
        return self.layers[1:](hidden)


def state(run):
    """Parameters and buffers of a run, end to end."""
    return torch.cat([value.detach().double().reshape(-1) for value in run.model.state_dict().values()])


@pytest.mark.filterwarnings("ignore:out of memory in step")
@pytest.mark.case(24, "out of memory in micro-batch 3 of 4: the model at the end against an undisturbed run")
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_window_that_ran_out_of_memory_is_taken_again_exactly(trainer, figures, where):
    """At stake: what the failed attempt left in gradients, statistics and generators; samples lost or seen twice; an
    effective batch that shrank on the way."""
    if trainer.name == "Accumulator":
        pytest.skip("whoever keeps their own loop decides what happens when memory runs out")

    def problem(at):
        trip = Trip(at, where)
        return Problem(
            model=lambda: seeded(Tripping, trip),
            samples=vectors(48),
            loss=nn.CrossEntropyLoss(),
            micro_batch=4,
            lr=0.5,
            recover=True,
            options={"check": False},
        )

    undisturbed = figures.attempt(where, lambda: trainer.train(problem(at=0)))
    run = None if undisturbed is None else figures.attempt(where, lambda: trainer.train(problem(at=7)))
    if run is None:
        return
    start = torch.cat([value.double().reshape(-1) for value in problem(0).model().state_dict().values()])
    moved, expected = state(run) - start, state(undisturbed) - start
    error = float((moved - expected).norm() / expected.norm())
    steps = len(run.gradients)
    figures.error(
        where, error, within=1e-10, text="" if steps == 3 else f"{steps} steps instead of 3", ok=math.isfinite(error)
    )
