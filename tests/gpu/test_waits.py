"""Nothing in a window waits for the device but for its loss, which is there before the last backward pass has run."""

import pytest
import torch
from torch import nn

import autoaccum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_windows_wait_for_no_kernel():
    model = nn.Linear(64, 64).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    plan = autoaccum.plan(limit=8, target_batch=16)
    accumulator = autoaccum.Accumulator(model, optimizer, plan, precision="fp32")
    batch = torch.randn(16, 64).pin_memory()

    def window() -> None:
        for part in accumulator.window(batch):
            accumulator.backward(model(part).square().mean())

    window()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(12):  # the noise scale is measured in the eleventh
            window()
    finally:
        torch.cuda.set_sync_debug_mode("default")
