"""Losses that compare the samples of a batch with each other: no accumulation is right, and somebody must say so."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.errors import LossError
from tests.conformance.models import Pairs, classifier, seeded, vectors
from tests.conformance.problems import Problem


def info_nce(outputs, labels):
    """Each sample's embedding against all others of the batch."""
    embedded = F.normalize(outputs, dim=-1)
    views = F.normalize(outputs + 0.3 * F.one_hot(labels, outputs.shape[-1]), dim=-1)
    return F.cross_entropy(embedded @ views.T / 0.2, torch.arange(len(outputs), device=outputs.device))


def batch_hard(outputs, labels):
    """The farthest sample of one's own class against the nearest of another, within the batch."""
    distances = (outputs[:, None] - outputs[None]).square().sum(-1)
    same = labels[:, None] == labels[None]
    farthest = distances.masked_fill(~same, 0).amax(1)
    nearest = distances.masked_fill(same, 1e3).amin(1)
    return F.relu(farthest - nearest + 0.5).mean()


def balanced(count):
    """Samples of two classes in turn."""
    return [{**sample, "labels": torch.tensor(index // 2 % 2)} for index, sample in enumerate(vectors(count))]


@pytest.mark.case(21, "batch-coupled loss: noticed and refused")
@pytest.mark.parametrize(("name", "loss"), [("InfoNCE", info_nce), ("batch-hard triplets", batch_hard)])
def test_a_batch_coupled_loss_is_refused_by_name(trainer, figures, name, loss):
    """At stake: with negatives from a micro-batch instead of the batch another objective is trained; nothing fails."""
    problem = Problem(model=classifier, samples=balanced(32), micro_batch=4, loss=loss)
    if trainer.name == "Accumulator":
        samples = [(sample["x"], sample["labels"]) for sample in problem.samples]
        report = autoaccum.verify(nn.Sequential(classifier().layers), samples, loss=loss, device="cpu")
        figures.verdict(name, not report.ok and "coupled" in report.text, f"verify: {report.cause}")
        return
    if trainer.ours:
        with pytest.raises(LossError, match="batch-coupled"):
            trainer.train(problem)
        figures.verdict(name, True, "refused: batch-coupled")
        return
    figures.gradients(name, problem)


@pytest.mark.case(
    21,
    "batch-coupled loss: noticed and refused",
    trainers=("autoaccum", "transformers", "accelerate", "lightning", "ignite", "sentence-transformers"),
)
def test_a_declared_one_has_the_whole_windows_gradient(figures):
    """Beside plain accumulation, and losses that were written for this: encoded in micro-batches, computed over all."""
    chance = torch.Generator().manual_seed(4)
    sides = torch.randn(24, 2, 6, dtype=torch.float64, generator=chance)
    model = seeded(Pairs)
    problem = Problem(
        model=lambda: seeded(Pairs), samples=[{"anchor": one, "positive": other} for one, other in sides],
        micro_batch=3, k=4, step=autoaccum.Coupled(Pairs.embedded, model.ranked),
    )  # fmt: skip
    figures.gradients("ranking pairs, declared", problem)
