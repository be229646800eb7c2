"""What a module logs in the pieces of a window, logged once for the window."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["Logged"]


class Logged:
    """Gathers the values of each piece, and gives one for all of them to the trainer's results."""

    def __init__(self, results: Any = None) -> None:
        self._results = results
        self._pieces: list[tuple[Tensor, list[tuple[str, Any, int]]]] = []
        self._open: list[tuple[str, Any, int]] = []

    def note(self, key: str, value: Any, batch_size: int) -> None:
        """A value that the module logged in the piece that runs."""
        self._open.append((key, value, batch_size))

    def begin(self) -> None:
        """A piece begins: what one logged that ran out of memory is forgotten."""
        self._open = []

    def piece(self, loss: Tensor) -> None:
        """The piece's step has returned, with this loss."""
        self._pieces.append((loss.detach(), self._open))
        self._open = []

    def apply(self, pieces: int, loss: float, device: torch.device) -> Tensor:
        """Logs what the last `pieces` of them logged: earlier ones ran out of memory, and ran again.

        Args:
            pieces: of the window.
            loss: the window's, for what was logged as a piece's loss.
            device: where the loss is returned, in the format of the pieces'.
        """
        dtype = self._pieces[-1][0].dtype if self._pieces else torch.get_default_dtype()
        whole = torch.tensor(loss, dtype=dtype, device=device)
        values: dict[str, list[tuple[Any, int, Tensor]]] = {}
        for own, noted in self._pieces[-pieces:] if pieces else ():
            for key, value, size in noted:
                values.setdefault(key, []).append((value, size, own))
        for key, each in values.items():
            total = sum(size for _, size, _ in each)
            last = each[-1][0]  # of a metric that gathers by itself, all there is
            one = self._one(key, each, total, whole).to(last.dtype) if isinstance(last, Tensor) else last
            self._results.update_metrics(key, one, total)
        return whole

    def _one(self, key: str, each: list[tuple[Tensor, int, Tensor]], total: int, loss: Tensor) -> Tensor:
        meta = self._results[key].meta
        stacked = torch.stack([value.to(torch.float64) for value, _, _ in each])
        if meta.is_mean_reduction:
            losses = torch.stack([own.to(stacked) for _, _, own in each])
            # Where every target of a piece is ignored its mean is NaN, and the window's loss is not.
            if torch.allclose(stacked, losses, rtol=0, atol=0, equal_nan=True):
                return loss
            weights = torch.tensor([size for _, size, _ in each], dtype=torch.float64, device=stacked.device)
            return (stacked * weights).sum() / total
        if meta.is_sum_reduction:
            return stacked.sum()
        if meta.is_max_reduction:
            return stacked.max()
        return stacked.min() if meta.is_min_reduction else stacked[-1]
