"""What can be counted in a batch's targets, as plain floats.

Counted where the targets lie: on the host for batches that wait there, so that nothing waits for the device. Class
weights are therefore kept once more on the host.
"""

import math
from typing import Any

import torch
from torch import Tensor

from autoaccum.errors import DataError, LossError

__all__ = ["IGNORED", "ClassWeights", "as_denominator", "elements", "holds_indices", "tokens"]

IGNORED = -100  # torch's default ignore_index, which Transformers keeps


def holds_indices(targets: Any) -> bool:
    """Whether `targets` are class indices: a tensor of integers."""
    return isinstance(targets, Tensor) and not (
        targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
    )


def tokens(targets: Tensor, ignore_index: int = IGNORED) -> float:
    """Class indices in `targets`, of any shape, other than `ignore_index`."""
    if ignore_index < 0 and targets.numel() and targets.min().item() > ignore_index:
        return float(targets.numel())  # the common case, at half the cost
    return float(torch.count_nonzero(targets.ne(ignore_index)))


def elements(targets: Any) -> float:
    """Numbers in `targets`.

    Raises:
        DataError: not a tensor.
    """
    if not isinstance(targets, Tensor):
        raise DataError(
            f"the targets are a {type(targets).__name__}, whose elements cannot be counted: make them a tensor, "
            "or declare reduction=f(batch)"
        )
    return float(targets.numel())


class ClassWeights:
    """Sums of class weights, which lie on the host whatever device the loss is on."""

    def __init__(self) -> None:
        self._source: Tensor | None = None
        self._version = -1
        self._host = torch.empty(0)

    def total(self, targets: Tensor, weights: Tensor, ignore_index: int = IGNORED) -> float:
        """Σ weights[t] over the `targets` t, class indices of any shape, other than `ignore_index`."""
        version = -1 if weights.is_inference() else weights._version
        if self._source is not weights or self._version != version:
            # A copy to the host waits for the device: done again only where the weights were changed.
            self._source, self._version = weights, version
            self._host = weights.detach().to("cpu", torch.float64)
        counted = targets[targets != ignore_index].to("cpu", torch.long)
        return float(self._host[counted].sum())


def as_denominator(value: Any, source: str) -> float:
    """`value` as a denominator: a finite number, 0 or above. A tensor of one element is read.

    Args:
        value: what a callable of the user's returned.
        source: who returned it, for the message: "reduction=f(batch)".

    Raises:
        LossError: anything else.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, (bool, str, complex)) or not hasattr(value, "__float__") or isinstance(value, Tensor):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise LossError(
            f"{source} gave {_short(value)}, a {type(value).__name__}{shape}: a denominator is one number, what the "
            "mean loss was divided by"
        )
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError) as error:
        raise LossError(f"{source} gave {_short(value)}, which is not one number: {error}") from error
    if not (math.isfinite(number) and number >= 0):
        raise LossError(
            f"{source} gave {number:g}: a denominator is finite and not negative, and 0 only where nothing in the "
            "batch counts"
        )
    return number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
