"""Sparse gradients over a window: each backward pass appends its rows, and here they are merged again.

PyTorch adds a sparse gradient to another by putting the rows of both one after the other, so that a window of k
micro-batches would hold k times the rows of one. Merged after each micro-batch they are never more than the embedding
has. The sums are the same.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["SparseGradients", "untouched_rows"]


class SparseGradients:
    """The parameters with sparse gradients: known from layers that say so, and from what a backward pass leaves."""

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        said = (module.weight for module in model.modules() if getattr(module, "sparse", False) is True)
        self._parameters = {id(weight): weight for weight in said if isinstance(weight, nn.Parameter)}
        self._others = [parameter for parameter in parameters if id(parameter) not in self._parameters]
        self._looked = False

    def merge(self) -> None:
        """After a backward pass: no row stands twice in a sparse gradient."""
        if not self._looked:  # once: looking at every parameter in every micro-batch would cost more than all else here
            self._looked = True
            self._parameters |= {id(p): p for p in self._others if p.grad is not None and p.grad.is_sparse}
        for parameter in self._parameters.values():
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._parameters


def untouched_rows(parameter: nn.Parameter, rows: int, dtype: torch.dtype, dimensions: int = 1) -> Tensor:
    """A sparse gradient of zeros in the last `rows` rows, as earlier micro-batches would have left one.

    Args:
        parameter: whose.
        rows: 0 gives one in which nothing is stored.
        dtype: of the gradient.
        dimensions: how many of the parameter's dimensions are indexed; 1 where there are rows.
    """
    at = torch.arange(parameter.shape[0] - rows, parameter.shape[0], device=parameter.device).expand(dimensions, rows)
    values = torch.zeros(rows, *parameter.shape[dimensions:], dtype=dtype, device=parameter.device)
    return torch.sparse_coo_tensor(at, values, parameter.shape, is_coalesced=True, check_invariants=False)
