"""From the user's parts to a plan, where no probe has been asked."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.assembly import assemble
from autoaccum.pipeline import _looked_at, planned
from tests.norms import Force

LOSS = nn.CrossEntropyLoss()
DATA = torch.randn(32, 5), torch.randn(32, 5)


def minimum_of(model):
    parts = assemble(model, DATA, loss=nn.MSELoss(), device="cpu")
    made = planned(parts, None, 8, 16, lr_batch=None, lr_rule="auto", batch_norm="pooled", tail="step", multiple_of=1)
    return made.minimum


def test_a_compiled_model_says_in_its_own_way_that_batch_norm_needs_two():
    """TorchDynamo makes a RuntimeError of the layer's ValueError."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    assert minimum_of(torch.compile(model, backend="eager")) == 2


@pytest.mark.parametrize(("spatial", "minimum"), [(False, 2), (True, 1)])
def test_a_model_may_ask_for_gradients_inside_its_forward(spatial, minimum):
    assert minimum_of(Force(spatial)) == minimum


def test_other_errors_of_the_models_come_out_as_they_are():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            raise RuntimeError("of the model's own")

    with pytest.raises(RuntimeError, match="^of the model's own$"):
        autoaccum.prepare(Broken(), DATA, loss=nn.MSELoss(), target_batch=16, micro_batch=8, device="cpu")


# --- the samples that the gradient check is given ---


def of_those_that_count(outputs, labels):
    """A mean whose denominator is not declared: right only where no label is ignored."""
    return F.cross_entropy(outputs[labels != -100], labels[labels != -100])


def labelled(ignored, seed=0):
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (400,), generator=chance)
    labels[torch.rand(400, generator=chance) < ignored] = -100
    return torch.randn(400, 5, generator=chance), labels


@pytest.mark.parametrize("seed", range(6))
def test_few_ignored_labels_are_among_the_samples_checked(seed):
    """One in twenty: of eight samples, two times in three none is ignored."""
    data = labelled(0.05, seed)
    assert not autoaccum.verify(nn.Linear(5, 4), data, loss=of_those_that_count, device="cpu").ok
    assert autoaccum.verify(nn.Linear(5, 4), data, loss=nn.CrossEntropyLoss(), device="cpu").ok


def test_labels_that_all_count_pass_without_a_caveat():
    report = autoaccum.verify(nn.Linear(5, 4), labelled(0), loss=of_those_that_count, device="cpu")
    assert report.ok
    assert not report.untried


@pytest.mark.parametrize(("width", "targets", "want"), [(5, 4, 64), (2**22, 4, 15), (5, None, 8)])
def test_more_samples_are_looked_at_where_labels_may_count_unequally_and_samples_are_small(width, targets, want):
    """Samples of 16 MiB: 16 of them are 256 MiB."""
    labels = torch.randn(400) if targets is None else torch.arange(400) % targets
    parts = assemble(nn.Linear(5, 4), (torch.zeros(1).expand(400, width), labels), loss=LOSS, device="cpu")
    assert len(_looked_at(parts, 8)[1]) == want
