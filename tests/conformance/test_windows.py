"""Where windows begin and end, and what a step is given: tails, streams, clipping, schedules, odd parameters."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.errors import SetupError
from tests.conformance.models import CLASSES, IGNORED, WORDS, CausalLM, classifier, seeded, tokens, vectors
from tests.conformance.problems import Problem


def classes(count, **more):
    return Problem(**{"model": classifier, "samples": vectors(count), "loss": nn.CrossEntropyLoss(), **more})


@pytest.mark.case(4, "last window shorter: k' < k micro-batches")
def test_a_short_last_window_is_divided_by_what_it_holds(trainer, figures):
    """At stake: divided by k all the same, the last step of each epoch shrinks by k' / k; not taken, its samples are
    never trained on."""
    figures.gradients("3 of 4 micro-batches", classes(14))
    figures.gradients("1 of 4 micro-batches", classes(10))


@pytest.mark.case(5, "last micro-batch smaller")
def test_a_smaller_last_micro_batch_weighs_less(trainer, figures):
    """At stake: one sample left over gets the weight of a whole micro-batch, four or eight times that of the others."""
    figures.gradients("1 sample of 2", classes(15))
    figures.gradients("1 sample of 8", classes(25, micro_batch=8))


@pytest.mark.case(6, "stream without a length, two epochs")
def test_a_stream_leaves_nothing_over_for_the_next_epoch(trainer, figures):
    """At stake: who does not know where the data ends keeps the last micro-batches' gradient, and adds it to the next
    epoch's first step."""
    figures.gradients("14 samples in windows of 8", classes(14, stream=True, epochs=2))


@pytest.mark.case(16, "clipping by global norm")
def test_the_whole_windows_gradient_is_clipped(trainer, figures):
    """At stake: clipping each micro-batch, or a gradient that is k times too large, changes the step's direction."""
    figures.gradients("full windows", classes(16, clip_norm=0.05))
    figures.gradients("short tail", classes(13, clip_norm=0.05))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.case(18, "schedule: one step an update")
def test_the_schedule_moves_once_an_update(trainer, figures):
    """At stake: a schedule that counts micro-batches ends its warm-up and its decay k times too early."""
    problem = classes(48, lr=0.01, schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    run = figures.attempt("k = 4", lambda: trainer.train(problem))
    if run is None:
        return
    moves = [math.log2(before / after) for before, after in itertools.pairwise(run.rates)]
    right = len(run.rates) == 6 and all(abs(each - 1) < 1e-9 for each in moves)
    each = round(sum(moves) / len(moves), 2) if moves else 0
    figures.verdict("k = 4", right, "1 an update" if right else f"{each:g} an update")


@pytest.mark.case(18, "schedule: one step an update", trainers=("autoaccum", "lightning"))
def test_a_schedule_that_moves_at_every_second_update(trainer, figures):
    """At stake: a frequency that is documented in steps, and counts micro-batches."""
    every = 2 if trainer.ours else 1
    schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, every, gamma=0.5)  # noqa: E731
    run = trainer.train(classes(48, lr=0.01, schedule=schedule, frequency=2))
    rates = [round(rate / 0.01, 6) for rate in run.rates]
    right = rates == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    figures.verdict("at every second update", right, "right" if right else "at every update")


class Tied(CausalLM):
    """The head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class Sparse(CausalLM):
    """An embedding whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 10, sparse=True)


def frozen():
    model = classifier()
    next(model.parameters()).requires_grad_(False)
    return model


class Idle(nn.Module):
    """A classifier with a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.never = nn.Linear(6, CLASSES), nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x)


def counted(batch):
    return (batch["labels"] != IGNORED).sum()


ODD = {
    "tied weights": lambda: Problem(
        model=lambda: seeded(Tied), samples=tokens(16), loss=nn.CrossEntropyLoss(), denominator=counted
    ),
    "frozen parameters": lambda: classes(16, model=frozen),
    "parameters never used": lambda: classes(16, model=lambda: seeded(Idle)),
    "sparse embedding gradients": lambda: Problem(
        model=lambda: seeded(Sparse), samples=tokens(16), loss=nn.CrossEntropyLoss(), denominator=counted
    ),
}


@pytest.mark.case(25, "tied, frozen, unused and sparse parameters")
@pytest.mark.parametrize("name", ODD)
def test_parameters_out_of_the_ordinary(trainer, figures, name):
    """At stake: a tied weight counted twice, a gradient where there should be none (weight decay would move it), a
    sparse gradient made dense or refused. Tied and sparse ones have unequally many tokens in their micro-batches."""
    problem = ODD[name]()
    run = figures.gradients(name, problem)
    if trainer.ours and name in ("frozen parameters", "parameters never used"):
        absent = [gradient is None for gradient in problem.whole(problem.samples)]
        assert [gradient is None for gradient in run.gradients[0]] == absent
        assert any(absent)


def stale():
    model = classifier()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


@pytest.mark.case(26, "gradients empty at the start, no step on a denominator of 0")
def test_a_gradient_that_was_left_over_enters_no_step(trainer, figures):
    """At stake: a gradient that stands when training begins is added to the first step, silently."""
    label = "a gradient is left over"
    if trainer.ours:
        with pytest.raises(SetupError, match="gradient stands before the window's first backward"):
            trainer.train(classes(16, model=stale))
        figures.verdict(label, True, "refused, with the remedy")
        return
    run = figures.attempt(label, lambda: trainer.train(classes(16, model=stale)))
    if run is not None:
        problem = classes(16)
        figures.compare(label, run.gradients, [problem.whole(samples) for samples in problem.windows()])


@pytest.mark.case(26, "gradients empty at the start, no step on a denominator of 0")
def test_a_window_in_which_nothing_counts_takes_no_step(trainer, figures):
    """At stake: momentum and weight decay move the parameters on a gradient of 0, and of NaN they never recover."""
    samples = [
        {**sample, "labels": torch.full_like(sample["labels"], IGNORED)} if index < 8 else sample
        for index, sample in enumerate(tokens(16))
    ]
    problem = Problem(
        model=lambda: seeded(CausalLM),
        samples=samples,
        loss=nn.CrossEntropyLoss(),
        denominator=counted,
        summed=lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="sum"),
    )
    label = "every label of a window is ignored"
    run = figures.attempt(label, lambda: trainer.train(problem))
    if run is None:
        return
    steps = len(run.gradients)
    finite = all(bool(g.isfinite().all()) for gradient in run.gradients for g in gradient if g is not None)
    first = "a step of 0" if finite else "a step of NaN"
    figures.verdict(label, steps == 1, "no step" if steps == 1 else first)
    if trainer.ours:
        figures.compare("the window after it", run.gradients, [problem.whole(samples[8:])])


@pytest.mark.case(26, "gradients empty at the start, no step on a denominator of 0", trainers=("Accumulator",))
def test_gradients_are_empty_again_after_each_window(trainer, figures):
    """At stake: what is left after one window would enter the next."""
    model = classifier()
    accumulator = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), autoaccum.plan(2, 8))
    x = torch.stack([sample["x"] for sample in vectors(8)])
    for _ in range(2):
        assert all(parameter.grad is None for parameter in model.parameters())
        for (micro,) in accumulator.window((x,)):
            accumulator.backward(model(micro).square().mean())
    empty = all(parameter.grad is None for parameter in model.parameters())
    figures.verdict("between windows", empty, "empty" if empty else "left over")
