"""What cutting windows by length came to, over a whole training: tokens a second, padding, micro-batches a window."""

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from autoaccum.window.record import StepRecord

__all__ = ["LengthSummary", "length_summary"]


@dataclass(frozen=True)
class LengthSummary:
    """Sums over the windows that were cut by length, on this rank. A token is a unit of the length that varies.

    Attributes:
        tokens, padded: the samples' own; with their padding, as they ran.
        unsorted: with their padding, had they run in the order they came, in micro-batches that fit the longest samples
            seen.
        seconds: that the windows took.
        micro_batches: how many windows had so many micro-batches.
    """

    tokens: int
    padded: int
    unsorted: int
    seconds: float
    micro_batches: dict[int, int]

    @property
    def tokens_per_second(self) -> float:
        """Padding not counted."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def padding(self) -> float:
        """The share of all that ran which was padding."""
        return 1.0 - self.tokens / self.padded

    @property
    def padding_unsorted(self) -> float:
        """The share that padding would be in micro-batches of one size, in the order the samples came."""
        return 1.0 - self.tokens / self.unsorted

    def lines(self) -> list[str]:
        """For a person."""
        counts = Counter(self.micro_batches)
        usual = statistics.median_low(list(counts.elements()))
        low, high = min(counts), max(counts)
        spread = f"{low} in every window" if low == high else f"{low} to {high} a window, {usual} in the middle"
        return [
            f"tokens: {self.tokens_per_second:,.0f} a second, padding not counted; {self.tokens:,} in "
            f"{sum(self.micro_batches.values())} windows",
            f"padding: {self.padding:.1%} of what ran; in micro-batches of one size it would have been "
            f"{self.padding_unsorted:.1%}, and {self.unsorted / self.padded:.2f} times as much would have run",
            f"micro-batches: {spread}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        sums = {name: getattr(self, name) for name in ("tokens", "padded", "unsorted", "seconds")}
        rates = {name: getattr(self, name) for name in ("tokens_per_second", "padding", "padding_unsorted")}
        counts = {str(count): windows for count, windows in sorted(self.micro_batches.items())}
        return {**sums, **rates, "micro_batches": counts}


def length_summary(history: Iterable[StepRecord]) -> LengthSummary | None:
    """Over the windows that were cut by length; None where none were."""
    records = [record for record in history if record.tokens is not None and record.micro_batches]
    if not records:
        return None
    return LengthSummary(
        sum(record.tokens or 0 for record in records),
        sum(record.padded_tokens or 0 for record in records),
        sum(record.unsorted_tokens or 0 for record in records),
        sum(record.seconds for record in records),
        dict(Counter(record.micro_batches for record in records)),
    )
