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

from collections.abc import Sequence

import torch

from autoaccum.memory.alignment import ForecastFailed

__all__ = ["Size", "basis", "columns", "determined", "fit", "volume"]

Size = tuple[int, ...]
_CLEARLY = 4  # times the miss with L² is what the miss without may be
_ROUNDING = 0.02  # of the figure: taken for rounding where no size can be left out


def columns(sizes: Sequence[Size]) -> int:
    """How many basis functions the sizes call for: 2 (batch), or 6 (batch and length); a ForecastFailed of too few."""
    batches = {size[0] for size in sizes}
    lengths = {size[1] for size in sizes if len(size) > 1}
    count = 6 if lengths else 2
    if not determined(sizes, count):
        raise ForecastFailed(
            f"{len(batches)} batch sizes and {len(lengths)} lengths do not determine the fit: it takes two batch "
            "sizes, for sequences each at the same three lengths"
        )
    return count


def determined(sizes: Sequence[Size], count: int) -> bool:
    """Whether the sizes tell the coefficients of the first `count` functions."""
    if count == 2 or len(sizes) < count:
        return count == 2 and len({size[0] for size in sizes}) > 1
    design = _design(sizes, count)
    return int(torch.linalg.matrix_rank(design / design.abs().amax(0))) == count


def basis(size: Size, count: int) -> torch.Tensor:
    """1, B; or 1, B, L, BL, L², BL² in float64."""
    batch = float(size[0])
    if count == 2:
        return torch.tensor([1.0, batch], dtype=torch.float64, device="cpu")
    length = float(size[1])
    powers = [1.0, length, length * length]
    return torch.tensor(
        [factor * power for power in powers for factor in (1.0, batch)], dtype=torch.float64, device="cpu"
    )


def fit(figures: torch.Tensor, sizes: Sequence[Size]) -> torch.Tensor:
    """The coefficients (rows × columns) of figures (rows × sizes): bytes, below 0 where they are freed."""
    if columns(sizes) == 2:
        order = sorted(range(len(sizes)), key=lambda at: sizes[at][0])
        last = order[-1]
        other = next(at for at in reversed(order) if sizes[at][0] < sizes[last][0])
        slope = (figures[:, last] - figures[:, other]) / (sizes[last][0] - sizes[other][0])
        return torch.stack([figures[:, last] - slope * sizes[last][0], slope], 1)
    simple, missed_simply = _least_squares(figures, sizes, 4)
    whole, missed = _least_squares(figures, sizes, 6)
    enough = missed_simply <= torch.where(missed.isnan(), _ROUNDING * figures.abs().amax(1), _CLEARLY * missed + 1.0)
    simple = torch.cat([simple, torch.zeros_like(simple[:, :2])], 1)
    return torch.where(enough[:, None], simple, whole)


def _least_squares(figures: torch.Tensor, sizes: Sequence[Size], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The fit over the first `count` functions, and by how many bytes each row misses a trace that is left out.

    The latter by the hat matrix, e / (1 - h), over the traces that can be left out; nan where none can.
    """
    weights = _weights(sizes, count)
    design = _design(sizes, count)
    fitted = figures @ weights
    spare = 1.0 - (design * weights).sum(1)
    can = spare > 1e-6
    missed = ((fitted @ design.T - figures).abs()[:, can] / spare[can]).amax(1) if can.any() else None
    return fitted, torch.full_like(figures[:, 0], torch.nan) if missed is None else missed


def _design(sizes: Sequence[Size], count: int) -> torch.Tensor:
    return torch.stack([basis(size, 6 if count > 2 else 2)[:count] for size in sizes])


def _weights(sizes: Sequence[Size], count: int) -> torch.Tensor:
    """(sizes × columns): figures at the sizes times this are the coefficients of the first `count` functions."""
    design = _design(sizes, count)
    scale = design.abs().amax(0)
    identity = torch.eye(len(sizes), dtype=torch.float64, device="cpu")
    solved: torch.Tensor = torch.linalg.lstsq(design / scale, identity, driver="gelsd").solution
    return (solved / scale[:, None]).T


def volume(size: Size) -> int:
    """Samples, or tokens."""
    return size[0] * (size[1] if len(size) > 1 else 1)
