"""A few small traces -> the peak memory of a window at any batch size, and any sequence length.

What each operator call allocates is affine in the batch, though the peak, the largest of many sums of such
figures, is not. So the rows of the aligned traces (playback.py) are fitted one by one (fitting.py) and added
up again at the size asked for: the peak is a maximum of affine functions, evaluated as one matrix product.

Choices:

- Traces too small to match the larger ones are left out.
- The largest trace that the others can do without is held out once: how far the forecast from the others
  misses its course, at any moment, relative to its peak, is `residual`. The course and not only the peak,
  since at other sizes the peak lies elsewhere. Where an allocator caches it is the peak alone: kernels of a GPU
  change with the size all the time, and the last trace there is near the size that will be run.
- Bytes are requested bytes. What CUDA's allocator makes of them is not fitted but simulated (`reserved`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from autoaccum.memory.alignment import MOST_UNMATCHED, Cell, ForecastFailed, align
from autoaccum.memory.allocator import CachingAllocator, SimulatedOutOfMemory
from autoaccum.memory.fitting import Size, basis, determined, fit, volume
from autoaccum.memory.playback import Column, Playback, Table, matrix, tabulate
from autoaccum.memory.trace import Trace

__all__ = ["Forecast", "ForecastFailed"]

# With more than this share of its bytes unmatched a forecast stands on stretches instead of operators: it is
# believed only where it met a held-out trace this closely.
MOST_UNALIGNED, MOST_RESIDUAL = MOST_UNMATCHED, 0.01


class Forecast:
    """The memory of a window at any size, made by `fit`. Sizes are bytes.

    Attributes:
        sizes: of the traces it stands on.
        residual: the largest miss at a held-out trace, relative to its peak above the start, or where an allocator
            caches the miss at that peak; None where no trace could be spared.
        unaligned: the share of a step's allocated bytes that could not be matched between the traces.
        reserve: reserved over requested bytes, as measured at the largest trace, where the allocator is not simulated;
            None where it is, or was not measured.
        longest: of a forecast over lengths, the one that is meant where none is given; None: one has to be given.
        simulated, unsupported: whether `reserved` is, of an allocator that caches; the setting of it that cannot be.
        expandable: whether the allocator's segments grow in place.
    """

    def __init__(
        self,
        traces: Sequence[Trace],
        sizes: Sequence[Size],
        resident: Sequence[Mapping[str, int]],
        cells: Sequence[Cell],
        unaligned: float,
    ) -> None:
        """From traces that were aligned into `cells`, and what was there before each by part; `fit` makes these."""
        self.sizes, self.unaligned = tuple(sizes), unaligned
        self.reserve: float | None = None
        self.longest: int | None = None
        self._last = last = traces[max(range(len(traces)), key=lambda at: volume(sizes[at]))]
        self.unsupported, self.expandable = last.unsupported, last.setup.expandable
        self.simulated = last.caching and last.unsupported is None
        self._background = max(trace.background for trace in traces)
        tabled = [Column(trace) for trace in traces]
        self._table = tabulate(tabled, cells)
        self._changes = fit(self._table.sizes, sizes)
        self._levels = _levels(fit(self._table.deltas, sizes))
        self._resident_names = list(dict.fromkeys(name for parts in resident for name in parts))
        held = [[parts.get(name, 0) for parts in resident] for name in self._resident_names]
        self._residents = fit(matrix(held, len(sizes)), sizes)
        self._lines = self._levels + self._residents.sum(0)
        self._lines[:, 0] += self._background
        self._reserved: dict[tuple[int, int | None], int] = {}
        self._playback = Playback(tabled, cells, sizes) if self.simulated else None
        if self._playback is not None:
            self._blocks = fit(self._playback.sizes, sizes)
        self.residual = _residual(self._table, sizes, at_peak=last.caching)

    @classmethod
    def fit(
        cls,
        traces: Sequence[Trace],
        sizes: Sequence[Size],
        resident: Sequence[Mapping[str, int]] = (),
        reserved: Sequence[int] = (),
    ) -> Forecast:
        """The forecast from traces at `sizes`: (batch,) each, or (batch, length) each.

        Over batches alone, the smallest traces are left out where the larger ones match without them: what a kernel
        does at very small sizes says nothing of the large ones.

        Args:
            resident: bytes by part that were there before each trace, which `peak` includes; empty: none were.
            reserved: bytes that the allocator was measured to reserve in each trace, where it caches.

        Raises:
            ForecastFailed: fewer sizes than the fit needs (two batches; for sequences two batches × three
                lengths), a trace that is empty or was cut short, or traces that have too little in common and no
                further one that the forecast is seen to meet.
        """
        if not sizes or not determined(sizes):
            raise ForecastFailed(
                f"traces at {', '.join(map(str, sizes))} do not determine the fit: it takes two batch sizes, for "
                "sequences each at the same three lengths"
            )
        for trace, size in zip(traces, sizes):
            if not trace.complete or not trace.events:
                raise ForecastFailed(f"the trace at {size} was cut short by an error, or nothing was recorded")

        def of(used: Sequence[int], cells: Sequence[Cell], unaligned: float) -> Forecast:
            """From the traces numbered in `used`."""
            before = [resident[at] for at in used] if resident else []
            return cls([traces[at] for at in used], [sizes[at] for at in used], before, cells, unaligned)

        every = range(len(sizes))
        largest = sorted(every, key=lambda at: volume(sizes[at]))
        found: list[tuple[Sequence[int], list[Cell], float]] = [(every, *align(traces))]
        for left_out in range(1, len(sizes) - 1 if len(sizes[0]) == 1 else 0):
            used = largest[left_out:]
            if found[-1][2] > 0 and len({sizes[at] for at in used}) > 1:
                found.append((used, *align([traces[at] for at in used])))
        forecast = of(*found[-1 if found[-1][2] == 0 else 0])
        if forecast.unaligned > MOST_UNALIGNED and (forecast.residual is None or forecast.residual > MOST_RESIDUAL):
            seen = "there is no further trace to check the rest on"
            if forecast.residual is not None:
                seen = f"the rest misses a held-out trace by {forecast.residual:.1%}"
            raise ForecastFailed(
                f"{forecast.unaligned:.1%} of what a step allocates could not be matched between the sizes "
                f"{list(forecast.sizes)}, and {seen}"
            )
        if found[-1][2] < forecast.unaligned:
            # Lines go through the two largest in any case: these alone, where they have more in common than all.
            residual = forecast.residual  # by how much the others missed the largest
            forecast = of(*found[-1])
            forecast.residual = residual
        if reserved and not forecast.simulated:
            last = largest[-1]
            forecast.reserve = reserved[last] / max(1, forecast.peak(*sizes[last]))
        return forecast

    def peak(self, batch: int, length: int | None = None) -> int:
        """The most in use at once, in requested bytes, what was there before included."""
        return round(float((self._lines @ self._point(batch, length)).max()))

    def lines(self) -> list[tuple[float, ...]]:
        """The functions whose maximum the peak is, in bytes, what was there before included: (a, b) of a + b·batch.

        Of a forecast over lengths the coefficients of 1, B, L, BL, L², BL².
        """
        return [tuple(row) for row in self._lines.tolist()]

    def timeline(self, batch: int, *, moments: int = 240) -> dict[str, Any]:
        """Memory over the window by part, for a plot.

        "parts": names; "bytes": for each part, what it holds at each moment (what was there before included); "phases":
        [name, its first moment]. Of a longer window the fullest rows of `moments` stretches are kept, with the peak.
        """
        point = self._point(batch, None)
        names = list(dict.fromkeys([*self._resident_names, *(part for part, _ in self._table.changes), "temporary"]))
        levels = self._levels @ point
        held = torch.zeros(len(names), len(levels), dtype=torch.float64, device="cpu")
        places = [(names.index(part), row + 1) for part, row in self._table.changes]
        where = torch.tensor(places, dtype=torch.long, device="cpu").reshape(-1, 2)
        held.index_put_(where.unbind(1), self._changes @ point, accumulate=True)
        held = held.cumsum(1)
        before = self._residents @ point
        for name, value in zip(self._resident_names, before):
            held[names.index(name)] += value
        held[names.index("temporary")] = levels + before.sum() - held.sum(0)
        count = min(len(levels), moments)
        cuts = [len(levels) * at // count for at in range(count + 1)]
        kept = [start + int(levels[start:stop].argmax()) for start, stop in pairwise(cuts)]
        phases = [0, *self._table.phases]
        begins: dict[int, int] = {}
        for moment, row in enumerate(kept):
            begins.setdefault(phases[row], moment)
        return {
            "parts": names,
            "bytes": held[:, kept].round().long().tolist(),
            "phases": [[self._last.phases[phase].name, moment] for phase, moment in begins.items()],
        }

    def simulate(
        self, batch: int, length: int | None = None, *, limit: int | None = None, expandable: bool | None = None
    ) -> CachingAllocator:
        """The caching allocator after a training's first two windows at this size, from an emptied cache.

        `limit` is the most it may reserve, in bytes, else SimulatedOutOfMemory; `expandable` whether its segments grow
        in place, None: as it is set up. A ForecastFailed where it is not `simulated`.
        """
        if self._playback is None:
            raise ForecastFailed(f"the allocator is set up with {self.unsupported}, which is not simulated")
        point = self._point(batch, length)
        setup = self._last.setup if expandable is None else self._last.setup._replace(expandable=expandable)
        allocator = CachingAllocator(self._last.segments, limit=limit, setup=setup)
        self._playback.play(allocator, (self._blocks @ point).round().long().tolist())
        return allocator

    def reserved(self, batch: int, length: int | None = None) -> int:
        """The most that the device's allocator takes: simulated where it caches (CUDA), else it is `peak`.

        A ForecastFailed where it has a setting that is not simulated, and nothing was measured beside it.
        """
        if not self._last.caching:
            return self.peak(batch, length)
        if self.reserve is not None:
            return round(self.peak(batch, length) * self.reserve)
        if (batch, length) not in self._reserved:
            self._reserved[batch, length] = self.simulate(batch, length).peak_reserved + self._background
        return self._reserved[batch, length]

    def within(self, batch: int, budget: int, *, expandable: bool | None = None) -> bool:
        """Whether the allocator gets through with `budget` bytes without emptying its cache for it; else as
        `simulate`.
        """
        try:
            played = self.simulate(batch, limit=budget - self._background, expandable=expandable)
        except SimulatedOutOfMemory:
            return False
        return played.retries == 0

    def _point(self, batch: int, length: int | None) -> torch.Tensor:
        if len(self.sizes[0]) == 1:
            return basis((batch,))
        length = self.longest if length is None else length
        if length is None:
            raise ForecastFailed("the traces are of sequences: a forecast needs a length beside the batch size")
        return basis((batch, length))


def _levels(deltas: torch.Tensor) -> torch.Tensor:
    """The running sums of the rows, from an empty start."""
    return torch.cat([torch.zeros_like(deltas[:1]), deltas.cumsum(0)])


def _residual(table: Table, sizes: Sequence[Size], *, at_peak: bool) -> float | None:
    """How far the forecast from the other traces misses the largest that can be spared; None: none can."""
    for held_out in sorted(range(len(sizes)), key=lambda at: -volume(sizes[at])):
        rest = [at for at in range(len(sizes)) if at != held_out]
        others = [sizes[at] for at in rest]
        if not determined(others):
            continue
        forecast = _levels(fit(table.deltas[:, rest], others)) @ basis(sizes[held_out])
        measured = _levels(table.deltas[:, held_out])
        missed = (forecast.max() - measured.max()).abs() if at_peak else (forecast - measured).abs().max()
        return float(missed / measured.max().clamp(min=1))
    return None
