"""A loss in a loop of one's own whose divisor lies on the device: held against its micro-batches' samples."""

import pytest
import torch
from torch import nn

import autoaccum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_mean_over_what_a_mask_counts_is_refused():
    model = nn.Linear(8, 1).cuda()
    plan = autoaccum.plan(limit=4, target_batch=8)
    accumulator = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), plan, precision="fp32")
    mask = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    with pytest.raises(autoaccum.LossError, match="divides by"):
        for x, counts in accumulator.window((torch.randn(8, 8), mask)):
            accumulator.backward((model(x).square().squeeze(1) * counts).sum() / counts.sum())
