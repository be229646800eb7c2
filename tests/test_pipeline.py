"""From the user's parts to a plan, where no probe has been asked."""

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.assembly import assemble
from autoaccum.pipeline import planned
from tests.norms import Force

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
