"""Micro-batches that are copied to a device while one runs there."""

import pytest
import torch
from torch import nn

import autoaccum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("pinned", [True, False])
def test_batches_that_were_copied_ahead_are_the_ones_that_are_trained_on(pinned):
    torch.manual_seed(0)
    model = nn.Linear(1024, 64).cuda().double()
    batch = torch.randn(4096, 1024, dtype=torch.float64)
    model(batch.cuda()).square().mean().backward()
    whole = model.weight.grad.clone()
    model.weight.grad = model.bias.grad = None
    taken = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: taken.append(model.weight.grad.clone()))
    plan = autoaccum.plan(limit=512, target_batch=4096)
    accumulator = autoaccum.Accumulator(model, optimizer, plan, precision="fp32")
    for part in accumulator.window(batch.pin_memory() if pinned else batch):
        accumulator.backward(model(part).square().mean())
    assert float((taken[0] - whole).norm() / whole.norm()) <= 1e-10
