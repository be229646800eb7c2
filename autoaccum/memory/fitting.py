"""Figures at a few sizes -> their coefficients over the batch size and the sequence length.

Over a batch size B alone a figure is a + b·B, and the line goes through the two largest sizes, where a
kernel's choice of algorithm is nearest to that of the sizes asked for. Over a batch and a length L it is a
sum of 1, B, L, BL, L², BL², fitted to all sizes by least squares: attention is quadratic in the length, and
everything is affine in the batch. A figure gets the terms in L² only where they foretell a left-out size
clearly better than it is foretold without them: rounding inside a kernel must not become a parabola. Blocks that
a library rounds up to whole pages (oneDNN's LSTM) meet no line at small sizes: a trace nearer to the size wanted does.

All in float64, which is exact for bytes up to 2⁵³.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["Size", "basis", "determined", "fit", "volume"]

Size = tuple[int, ...]
_CLEARLY = 4  # times the miss with L² is what the miss without may be
_ROUNDING = 0.02  # of the figure: taken for rounding where no size can be left out


def determined(sizes: Sequence[Size]) -> bool:
    """Whether the sizes, of one kind, tell the coefficients of all functions."""
    design = _design(sizes)
    return int(torch.linalg.matrix_rank(design / design.abs().amax(0))) == design.shape[1]


def basis(size: Size) -> torch.Tensor:
    """1, B of a batch size; 1, B, L, BL, L², BL² where it has a length; in float64."""
    powers = [float(size[-1] ** power) for power in range(3)] if len(size) > 1 else [1.0]
    values = [part * power for power in powers for part in (1.0, size[0])]
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def fit(figures: torch.Tensor, sizes: Sequence[Size]) -> torch.Tensor:
    """The coefficients (rows × functions) of figures (rows × sizes): bytes, below 0 where they are freed."""
    if len(sizes[0]) == 1:
        order = sorted(range(len(sizes)), key=lambda at: sizes[at][0])
        last = order[-1]
        other = next(at for at in reversed(order) if sizes[at][0] < sizes[last][0])
        slope = (figures[:, last] - figures[:, other]) / (sizes[last][0] - sizes[other][0])
        return torch.stack([figures[:, last] - slope * sizes[last][0], slope], 1)
    simple, missed_simply = _least_squares(figures, _design(sizes)[:, :4])
    whole, missed = _least_squares(figures, _design(sizes))
    enough = missed_simply <= torch.where(missed.isnan(), _ROUNDING * figures.abs().amax(1), _CLEARLY * missed + 1.0)
    simple = torch.cat([simple, torch.zeros_like(simple[:, :2])], 1)
    return torch.where(enough[:, None], simple, whole)


def _design(sizes: Sequence[Size]) -> torch.Tensor:
    return torch.stack([basis(size) for size in sizes])


def _least_squares(figures: torch.Tensor, design: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fit over the functions of `design`, and by how many bytes each row misses a trace that is left out.

    The latter by the hat matrix, e / (1 - h), over the traces that can be left out; nan where none can.
    """
    scale = design.abs().amax(0)
    identity = torch.eye(len(design), dtype=torch.float64, device="cpu")
    weights = (torch.linalg.lstsq(design / scale, identity, driver="gelsd").solution / scale[:, None]).T
    fitted = figures @ weights
    spare = 1.0 - (design * weights).sum(1)
    can = spare > 1e-6
    missed = ((fitted @ design.T - figures).abs()[:, can] / spare[can]).amax(1) if can.any() else None
    return fitted, torch.full_like(figures[:, 0], torch.nan) if missed is None else missed


def volume(size: Size) -> int:
    """Samples, or tokens."""
    return math.prod(size)
