"""What the loss of a trainer's step divides by: its labels, or its samples."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoaccum.data.piece import Piece
from autoaccum.errors import SetupError, shown
from autoaccum.loss.call import scalar, targets_in
from autoaccum.loss.counting import holds_indices
from autoaccum.loss.heads import Head, measure

__all__ = ["LabelCount", "counted_in_batch"]


class LabelCount:
    """Counts the labels that the step's loss counts, found by running it once; samples where a batch has none."""

    def __init__(self, model: nn.Module, step: Any) -> None:
        self._model, self._step = model, step
        self._head: Head | None = None

    def __call__(self, piece: Piece) -> float:
        """What the mean loss over the piece is divided by."""
        apart = isinstance(piece.batch, (tuple, list))  # whose last element is the target
        labels = targets_in(piece.batch, apart=apart)
        if not isinstance(labels, Tensor) or not holds_indices(labels):
            return float(len(piece.samples))
        if self._head is None:
            self._head = measure(self._model, piece.batch, self._loss, apart=apart)
        if self._head.over == "samples":
            return float(len(piece.samples))
        return self._head.count(labels)

    def _loss(self, batch: Any) -> Tensor:
        with torch.no_grad():
            return scalar(self._step(self._model, batch), "the trainer's step", graph=False)


def counted_in_batch(reduction: Any) -> Any:
    """A declared reduction counts in the trainer's batch."""
    if isinstance(reduction, Mapping) or not callable(reduction):
        if reduction in ("sample_mean", "sum"):
            return reduction
        raise SetupError(
            f"reduction={shown(reduction)} cannot be declared for a trainer's step: give 'auto', 'sample_mean', "
            "'sum' or "
            "f(batch) -> float"
        )
    return lambda piece: reduction(piece.batch)
