"""The backward pass, begun at the autograd engine itself where that is the same.

`torch.autograd.backward` asks a lot before it begins (symbolic shapes, nested tensors, function modes), in Python, at
every call: for a small micro-batch as long as the backward pass takes. None of it can matter for a plain scalar.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["backward", "run_engine"]


def backward(losses: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Adds the gradient of Σ loss · factor to the parameters', and uses up the graphs of the losses, of one element
    each.

    The factors are where each backward pass begins, which needs no operation in the graph.
    """
    begins = [torch.full_like(loss, factor) for loss, factor in zip(losses, factors, strict=True)]
    # On another device the engine's own thread runs it, and torch hands that thread what a compiled backward looks up.
    if all(type(loss) is Tensor and loss.device.type == "cpu" for loss in losses):
        run_engine(losses, begins)
    else:
        torch.autograd.backward(losses, begins)


def run_engine(losses: Sequence[Tensor], begins: Sequence[Tensor]) -> None:
    """What `torch.autograd.backward(losses, begins)` comes to once it has asked; `begins` are shaped as the losses."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(tuple(losses), tuple(begins), False, False, (), allow_unreachable=True, accumulate_grad=True)
