"""Pure: which size to run next where there is no forecast, from what fitted and what did not.

Each step is guarded. Peaks are convex in the batch (a maximum of affine functions), so a line through two of them
*under*estimates what lies beyond: growth is held to a doubling, and to nine tenths of what the line allows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Bracket", "highest_peak"]


def highest_peak(size: int, peaks: Mapping[int, int], fixed: int) -> int:
    """An upper bound on the peak in bytes at `size`, which is larger than all that were run.

    Of what was measured (`peaks`, by size) what is not `fixed`, whatever the size, grows at most in proportion to it.
    """
    largest = max(peaks)
    fixed = min(fixed, peaks[largest])
    return fixed + -(-(peaks[largest] - fixed) * size // largest)


@dataclass
class Bracket:
    """The sizes still in question, from `floor` to `ceiling`; `peaks` are those measured, in bytes, by size."""

    floor: int
    ceiling: int
    budget: int
    peaks: dict[int, int] = field(default_factory=dict)
    _fits: int = 0
    _fails: int | None = None

    @property
    def low(self) -> int:
        """The largest size known to fit; 0 while none is."""
        return self._fits

    @property
    def high(self) -> int:
        """The smallest size known not to fit, or one above the ceiling."""
        return self.ceiling + 1 if self._fails is None else self._fails

    @property
    def closed(self) -> bool:
        """No size is left in question."""
        return self.high - max(self.low, self.floor - 1) <= 1

    def fits(self, size: int, peak: int | None) -> None:
        """Notes that `size` was run and fits."""
        self._fits = max(self._fits, size)
        if peak is not None:
            self.peaks[size] = peak

    def fails(self, size: int, peak: int | None = None) -> None:
        """Notes that `size` does not fit; `peak` where it was measured all the same (over budget)."""
        self._fails = size if self._fails is None else min(self._fails, size)
        if self._fits >= self._fails:  # memory is not the same from run to run: believe the failure
            self._fits = max((s for s in self.peaks if s < self._fails), default=0)
        if peak is not None:
            self.peaks[size] = peak

    def next(self) -> int:
        """The size to run next, where the bracket is not closed."""
        if self.low == 0:
            return self.floor
        if self._fails is None:
            return min(self._grown(), self.ceiling)
        return min(max(self._between(), self.low + 1), self.high - 1)

    def _grown(self) -> int:
        grown = self.low * 2
        line = self._line()
        if line is not None:
            grown = min(grown, max(self.low + 1, self.low + (line - self.low) * 9 // 10))
        return max(grown, self.low + 1)

    def _between(self) -> int:
        """The middle, or nearer to where a line through the two largest measured peaks meets the budget."""
        line = self._line()
        if line is None:
            return (self.low + self.high) // 2
        return min(max(line, (self.low * 7 + self.high) // 8), (self.low + self.high * 7) // 8)

    def _line(self) -> int | None:
        """Where a line through the two largest measured sizes meets the budget."""
        if len(self.peaks) < 2:
            return None
        (a, at_a), (b, at_b) = sorted(self.peaks.items())[-2:]
        if at_b <= at_a:
            return None
        return b + int((self.budget - at_b) * (b - a) / (at_b - at_a))
