"""Number formats: autocast, the scaler, fp32 sums, the norm."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autoaccum.errors import SetupError
from autoaccum.model.precision import Precision, SideBuffers, clip_by_norm, global_norm

CPU = torch.device("cpu")


def test_auto_on_a_cpu_is_fp32_and_says_why():
    precision = Precision("auto", CPU, nn.Linear(2, 2))
    assert precision.name == "fp32"
    assert "a CPU takes bf16 where it is asked for" in precision.reason
    assert not precision.scaler.is_enabled()
    with precision.autocast():
        assert not torch.is_autocast_enabled("cpu")
    assert "its own float64" in Precision("auto", CPU, nn.Linear(2, 2).double()).reason


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_runs_the_forward_in_the_format_asked_for(name, dtype):
    precision = Precision(name, CPU, nn.Linear(2, 2))
    with precision.autocast():
        assert nn.Linear(2, 2)(torch.randn(1, 2)).dtype == dtype
        with precision.outside():
            assert nn.Linear(2, 2)(torch.randn(1, 2)).dtype == torch.float32
    assert precision.scaler.is_enabled() == (name == "fp16")


def test_bad_formats():
    with pytest.raises(SetupError, match="precision='fp8': choose 'auto', 'fp32', 'bf16', 'fp16'"):
        Precision("fp8", CPU, nn.Linear(2, 2))
    with pytest.raises(SetupError, match="gradients of 16-bit parameters cannot be unscaled"):
        Precision("fp16", CPU, nn.Linear(2, 2).half())


def test_side_buffers_sum_in_fp32_and_cast_once():
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    side = SideBuffers([parameter])
    small = torch.full_like(parameter, 1.0)
    for _ in range(1000):
        parameter.grad = small.clone()
        side.collect()
        assert parameter.grad is None
    assert torch.equal(side.gradient(parameter), torch.full((1000,), 1000.0))
    side.give_back()
    assert parameter.grad.dtype == torch.bfloat16
    assert float(parameter.grad[0]) == 1000.0  # 1 + 1 + ... in bf16 would stand still at 256
    assert side.gradient(parameter) is parameter.grad


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), min_size=1, max_size=4), st.floats(0.01, 100))
def test_clipping_is_torchs(values, limit):
    parameters = [nn.Parameter(torch.zeros(len(row), dtype=torch.float64)) for row in values]
    gradients = [torch.tensor(row, dtype=torch.float64) for row in values]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    expected = nn.utils.clip_grad_norm_(parameters, limit)
    norm = global_norm(gradients)
    clip_by_norm(gradients, norm, limit)
    torch.testing.assert_close(norm, expected)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_sparse_gradients_have_no_norm_here():
    with pytest.raises(SetupError, match="sparse=False, or leave clip_norm and log_grad_norm out"):
        global_norm([torch.sparse_coo_tensor([[0]], [1.0], (3,))])
