"""Losses that compare the samples of a batch with each other: no accumulation is right, and somebody must say so."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.errors import LossError
from tests.conformance.models import classifier, vectors
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


class Encoder(nn.Sequential):
    """What sentence-transformers takes for a model: features in a dict become an embedding in it."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5)).double())

    def forward(self, features):
        return {**features, "sentence_embedding": self[0](features["input_ids"])}


def ranked(found, batch=None):
    """Each anchor's own positive against those of all others, by cosine."""
    scores = 20 * F.normalize(found[0], dim=1) @ F.normalize(found[1], dim=1).T
    return F.cross_entropy(scores, torch.arange(len(scores)))


def embedded(model, batch):
    return [model({"input_ids": side})["sentence_embedding"] for side in batch]


def gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_a_declared_one_has_the_whole_windows_gradient_as_cached_losses_and_unlike_plain_accumulation():
    torch.manual_seed(4)
    batch = torch.randn(24, 6, dtype=torch.float64), torch.randn(24, 6, dtype=torch.float64)
    whole, plain, ours = Encoder(), Encoder(), Encoder()
    ranked(embedded(whole, batch)).backward()
    for piece in zip(*(side.split(9) for side in batch)):
        (ranked(embedded(plain, piece)) * len(piece[0]) / 24).backward()
    start = [parameter.detach().clone() for parameter in ours.parameters()]
    autoaccum.fit(
        ours, batch, target_batch=24, micro_batch=9, step=autoaccum.Coupled(embedded, ranked), device="cpu", lr=1.0,
        optimizer=torch.optim.SGD, lr_rule="none", shuffle=False, progress=False, cache=False,
    )  # fmt: skip
    moved = torch.cat([(old - new.detach()).flatten() for old, new in zip(start, ours.parameters())])
    assert float((moved - gradient(whole)).norm()) <= 1e-10 * float(gradient(whole).norm())
    assert float((gradient(plain) - gradient(whole)).norm()) >= 0.1 * float(gradient(whole).norm())
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason="not installed")
    peer = Encoder()
    cached = losses.CachedMultipleNegativesRankingLoss(peer, scale=20.0, mini_batch_size=9)
    cached([{"input_ids": side, "attention_mask": torch.ones_like(side)} for side in batch], None).backward()
    assert float((gradient(peer) - gradient(whole)).norm()) <= 1e-10 * float(gradient(whole).norm())
