"""The gradients that a trial finds, as the rest of its window would have left them."""

import math

import torch
from torch.nn import Parameter

from autoaccum.model.precision import untouched_rows
from autoaccum.model.shards import local
from autoaccum.units import format_bytes
from autoaccum.window.accumulate import Accumulator

__all__ = ["WindowGradients"]


class WindowGradients:
    """Which parameters get a gradient, and of what kind: learnt from one step, allocated before the others.

    Attributes:
        known: whether that step has run.
        unused: parameters to which the samples tried gave none; others may.
    """

    def __init__(self, accumulator: Accumulator, share: int | None) -> None:
        """`share` is how many samples a window has on this rank; None: twice those of a trial."""
        self._accumulator, self._share = accumulator, share
        self.known = False
        self._dense: list[Parameter] = []
        self.unused: list[Parameter] = []
        self._rows: dict[Parameter, float] = {}  # of sparse ones, for each sample

    def look(self, size: int) -> None:
        """What kind of gradient each parameter has got by a step of `size` samples."""
        accumulator = self._accumulator
        stepped = set() if accumulator.in_backward is None else accumulator.in_backward.stepped  # and gone again
        found = [(p, accumulator.side.gradient(p)) for p in accumulator.parameters if p not in stepped]
        self._rows = {parameter: g._nnz() / size for parameter, g in found if g is not None and g.is_sparse}
        self.unused = [p for p, g in found if g is None and p.requires_grad and p not in accumulator.sparse]
        self._dense = [p for p, g in found if g is not None and not g.is_sparse] + self.unused
        self.known = True

    def allocate(self, size: int, micro_batches: int) -> None:
        """What the other micro-batches of a window leave to `micro_batches` of `size`, beside what these will make."""
        side = self._accumulator.side
        for parameter in self._dense if micro_batches == 1 else self.unused:
            side.put(parameter, torch.zeros_like(parameter, dtype=side.dtype(parameter)))
        ran = size * micro_batches
        others = size if self._share is None else max(self._share - ran, 0)
        for parameter, rows in self._rows.items():
            most = min(math.ceil(rows * others), parameter.shape[0])
            side.put(parameter, untouched_rows(parameter, most, side.dtype(parameter), 1))

    @property
    def bytes(self) -> int:
        """Of the whole tensors among them, on this rank."""
        return sum(local(p).numel() * self._accumulator.side.dtype(p).itemsize for p in self._dense)

    @property
    def note(self) -> str | None:
        """What is counted for parameters that got none; None where all did."""
        if not self.unused:
            return None
        names = {id(parameter): name for name, parameter in self._accumulator.model.named_parameters()}
        first = names.get(id(self.unused[0]), "one of the optimizer's")
        more = f" and {len(self.unused) - 1} more" if len(self.unused) > 1 else ""
        size = sum(p.numel() * self._accumulator.side.dtype(p).itemsize for p in self.unused)
        return (
            f"{first}{more} got no gradient from the samples tried: {format_bytes(size)} are counted for one all the "
            "same, and what the optimizer keeps for it, since other samples may give it one; freeze what is never used "
            "(requires_grad_(False))"
        )
