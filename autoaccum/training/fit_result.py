"""What `fit` gives back: the model, and what is known of its training."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from autoaccum.checking.verify import VerifyReport
from autoaccum.checks import plain
from autoaccum.display.shown import Drawn
from autoaccum.planning.plan import Plan
from autoaccum.probing.report import ProbeReport
from autoaccum.window.record import StepRecord

__all__ = ["FitResult", "LengthSummary", "length_summary"]


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
        rates = {name: getattr(self, name) for name in ("tokens_per_second", "padding", "padding_unsorted")}
        counts = {str(count): windows for count, windows in sorted(self.micro_batches.items())}
        return {**vars(self), **rates, "micro_batches": counts}


def length_summary(history: Iterable[StepRecord]) -> LengthSummary | None:
    """Over the windows that were cut by length; None where none were."""
    records = [record for record in history if record.tokens is not None and record.micro_batches]
    if not records:
        return None
    fields = {"tokens": "tokens", "padded": "padded_tokens", "unsorted": "unsorted_tokens", "seconds": "seconds"}
    sums: dict[str, Any] = {name: sum(getattr(record, of) for record in records) for name, of in fields.items()}
    return LengthSummary(**sums, micro_batches=dict(Counter(record.micro_batches for record in records)))


@dataclass(frozen=True)
class FitResult(Drawn):
    """What `fit` gives back.

    Attributes:
        model: the trained model, the same object.
        plan: as it was at the end; k may have grown after an out-of-memory error.
        probe: None where the micro-batch or the plan was given.
        verify: None where the check was switched off.
        history: one record a window, also of those before a resume.
        evaluations: one dict an epoch, with "epoch" and "step"; empty without validation data.
        unsaved: what of the checkpoints and the run's record could not be saved; None where all was.
        stopped: why the training ended before its time, at a listener's wish; None where it ran to its end.
        lengths: tokens a second, padding, and micro-batches a window, where samples differ in length; else None.
    """

    model: nn.Module = field(repr=False)
    plan: Plan
    probe: ProbeReport | None = field(repr=False)
    verify: VerifyReport | None
    history: Sequence[StepRecord] = field(repr=False)
    evaluations: list[dict[str, float]]
    unsaved: str | None = None
    stopped: str | None = None
    lengths: LengthSummary | None = None

    _view = "fit_view"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: everything but the model."""
        values = {**vars(self), "history": list(self.history)}
        del values["model"]
        return dict(plain(values))
