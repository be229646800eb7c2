"""One trial and how it ended, as plain values: what the journal writes, the search reads and the report shows."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["FITS", "KILLED", "OUT_OF_MEMORY", "OVER_BUDGET", "RanOutElsewhere", "Trial"]

FITS, OUT_OF_MEMORY, OVER_BUDGET, KILLED = "fits", "out of memory", "over budget", "killed"


class RanOutElsewhere(MemoryError):
    """Another rank of a sharded model ran out of memory in a trial."""


@dataclass(frozen=True)
class Trial:
    """One real step, run to see whether a size fits.

    Attributes:
        batch: samples.
        kind: "trace" (its allocations were recorded), "verify", "search" or "throughput".
        peak_bytes: the most bytes in use during it; None where it did not come to its end.
        reserved_bytes: the most bytes the caching allocator held; None on the CPU, which has none.
        seconds: how long it took.
        outcome: "fits", "out of memory", "over budget" or "killed".
        length: of its samples, where that was chosen; None where they were the largest looked at.
    """

    batch: int
    kind: str
    peak_bytes: int | None
    reserved_bytes: int | None
    seconds: float
    outcome: str
    length: int | None = None

    @property
    def fits(self) -> bool:
        """Whether the size fits in the budget."""
        return self.outcome == FITS

    @property
    def counted_bytes(self) -> int | None:
        """What a budget counts of it: what the allocator held, or where none caches what was in use."""
        return self.peak_bytes if self.reserved_bytes is None else self.reserved_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
