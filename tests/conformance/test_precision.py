"""Number formats: the fp16 loss scale over a window, and gradients that are summed in bf16."""

import pytest
import torch
from torch import nn

from tests.conformance.models import Named, classifier, seeded, vectors
from tests.conformance.problems import Problem
from tests.versions import since


@pytest.mark.case(15, "fp16 loss scale: constant in a window, unscaled and clipped once")
@pytest.mark.parametrize("clip_norm", [None, 0.05], ids=["unclipped", "clipped"])
def test_the_scale_is_constant_and_undone_once(trainer, figures, clip_norm):
    """At stake: a scale that changes in mid-window mixes two units in one sum; clipping what is still scaled, or each
    micro-batch by itself, gives another step.

    Autocast leaves float64 alone, so the scaler's part is seen at full precision. On a CPU: who refuses that is
    recorded as raising.
    """
    problem = Problem(
        model=classifier, samples=vectors(16), loss=nn.CrossEntropyLoss(), precision="fp16", clip_norm=clip_norm
    )
    figures.gradients("clipped" if clip_norm else "unclipped", problem)


def halves(count):
    chance = torch.Generator().manual_seed(4)
    return [
        {"x": torch.randn(8, generator=chance).bfloat16(), "labels": torch.randn(4, generator=chance).bfloat16()}
        for _ in range(count)
    ]


def one_by_one(problem):
    """The mean of the samples' own bf16 gradients, added up in float64."""
    model = problem.model()
    totals = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in model.parameters()]
    for sample in problem.samples:
        model.zero_grad()
        problem.compute(model, {name: value[None] for name, value in sample.items()}).backward()
        for total, parameter in zip(totals, model.parameters()):
            total += parameter.grad.double() / len(problem.samples)
    return totals


@since("2.6", "the squared error of bf16 on the CPU")
@pytest.mark.case(17, "bf16 parameters, against a sum in float64 (at most 0.4%: one rounding to bf16)")
@pytest.mark.parametrize("k", [4, 64, 1024])
def test_bf16_gradients_are_not_summed_in_bf16(trainer, figures, k):
    """At stake: added one by one in bf16, what is smaller than 1/256 of the sum is lost."""
    problem = Problem(
        model=lambda: seeded(lambda: Named(nn.Linear(8, 4)), dtype=torch.bfloat16),
        samples=halves(k),
        micro_batch=1,
        k=k,
        loss=nn.MSELoss(),
    )
    run = figures.attempt(f"k = {k}", lambda: trainer.train(problem))
    if run is not None:
        figures.compare(f"k = {k}", run.gradients, [one_by_one(problem)], within=4e-3)
