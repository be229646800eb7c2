"""The backward pass begun at the engine: torch's own gradients, and torch's own way for what is no plain tensor."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from autoaccum.window.passes import backward


def two_losses(dtype=torch.float64):
    torch.manual_seed(0)
    weight = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    x = torch.randn(5, 3, dtype=dtype)
    hidden = checkpoint(torch.tanh, x @ weight, use_reentrant=False)
    return weight, hidden.square().mean(), hidden.sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_weighted_sum_and_add_up(dtype):
    weight, *losses = two_losses(dtype)
    backward(losses, [0.25, 3.0])
    got = weight.grad
    weight, *losses = two_losses(dtype)
    torch.autograd.backward(losses, [torch.tensor(0.25, dtype=dtype), torch.tensor(3.0, dtype=dtype)])
    assert torch.equal(got, weight.grad)
    before = weight.grad.clone()
    backward([(weight * 2).sum()], [0.5])
    assert torch.equal(weight.grad, before + 1)


def test_the_graph_is_used_up():
    _, loss, _ = two_losses()
    backward([loss], [1.0])
    with pytest.raises(RuntimeError, match="second time"):
        backward([loss], [1.0])


class Watched(Tensor):
    """A tensor that wants to hear of functions called on it."""

    heard: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.heard.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_of_tensor_is_still_asked():
    weight = torch.ones(3, requires_grad=True)
    loss = weight.sum().as_subclass(Watched)
    Watched.heard.clear()
    torch.autograd.backward([loss], [torch.full_like(loss, 2.0)], retain_graph=True)
    expected = list(Watched.heard)
    Watched.heard.clear()
    weight.grad = None
    backward([loss], [2.0])
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
    assert Watched.heard == expected
