"""What one optimizer step did, as plain values."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["StepRecord"]


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did.

    Attributes:
        step: optimizer steps taken, this one included; counts from 1.
        epoch: counts from 0.
        loss: Σ numerators / Σ denominators of the window, over all ranks.
        lr: the learning rate of the first parameter group that this step used.
        grad_norm: the L2 norm of the window's gradient before clipping; None unless clipped, asked for, or what the
            window was left out for.
        samples: over all ranks.
        micro_batches: forward and backward passes on this rank.
        seconds: from the window's opening to the end of the step; in a TrainingLoop with the wait for its samples.
        samples_per_second: over all ranks.
        peak_bytes: the most bytes in use on the device during the window; None where the backend keeps no count (CPU).
        noise_scale: the gradient noise scale in samples, smoothed; None where it was not measured.
        skipped: why the optimizer was not stepped; None where it was.
        tokens: where windows are cut by length, the lengths of this rank's samples added up; else None.
        padded_tokens: the same with their padding, as they ran.
        unsorted_tokens: the same with the padding of micro-batches of one size, in the order the samples came.
        phase: whose step it was, where several optimizers take turns; else None.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float | None
    samples: int
    micro_batches: int
    seconds: float
    samples_per_second: float
    peak_bytes: int | None = None
    noise_scale: float | None = None
    skipped: str | None = None
    tokens: int | None = None
    padded_tokens: int | None = None
    unsorted_tokens: int | None = None
    phase: str | None = None

    def after(self, waited: float, padding: tuple[int, int, int] | None) -> "StepRecord":
        """The record with the seconds that its samples were waited for, and the lengths that they were cut by."""
        seconds = self.seconds + waited
        changed: dict[str, Any] = {"seconds": seconds, "samples_per_second": self.samples / seconds}
        if padding is not None:
            changed |= zip(("tokens", "padded_tokens", "unsorted_tokens"), padding)
        return StepRecord(**(vars(self) | changed))  # at half the cost of dataclasses.replace

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
