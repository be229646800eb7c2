"""What a plan holds, and the windows that follow from it: the base of Plan, which the lines on it are written from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoaccum.planning import learning_rate, split
from autoaccum.planning.length_rule import LengthRule, Room
from autoaccum.planning.split import Windows

__all__ = ["PlanFields"]


@dataclass(frozen=True)
class PlanFields:
    """How one rank trains with exactly `target_batch` samples a step; all sizes are in samples."""

    target_batch: int
    """Samples per optimizer step, over all ranks."""
    world_size: int
    rank: int
    micro_batch: int
    """The largest of this rank's sizes; 0 where the rank is idle."""
    accumulation_steps: int
    micro_batches: tuple[int, ...]
    """This rank's sizes in a full window, or where an epoch has fewer samples in that; larger ones first."""
    lr: float | None
    """The LR after scaling; None where none was given, or where the optimizer's groups have several."""
    lr_scale: float
    """What every parameter group's own LR is multiplied by."""
    lr_rule: str
    """The rule applied: "linear", "sqrt", "adam-sde" or "none"."""
    lr_batch: int | None
    """Samples a step that the LR was tuned at."""
    optimizer_overrides: dict[str, float | tuple[float, ...]]
    """New values of other settings, as `betas` and `eps` by "adam-sde"."""
    bn_momentum: float | None
    """The BatchNorm momentum for as many updates a window as it has micro-batches here."""
    layer_momentum: float | None
    """The BatchNorm layers' own momentum, for one update a window."""
    batch_norm: str
    """"pooled", "momentum" or "keep"."""
    batch_norm_layers: int | None
    """How many the model has; None where the model is not known."""
    limits: tuple[int, ...]
    """The largest micro-batch allowed on each rank."""
    minimum: int
    """The smallest micro-batch allowed."""
    multiple_of: int
    tail: str
    """What becomes of a short last window: "step" or "drop"."""
    samples: int | None
    """Of an epoch, where known."""
    reasons: dict[str, str]
    """One line on each value: what it is, and why."""
    by_length: Room = ()
    """Where samples differ in length: (length, samples), so many fit at once up to that padded length. Sizes above are
    those of the longest samples seen; each window is cut by the lengths in it, and k varies."""
    ladder: str | None = None
    """What makes the step smaller, without which not even the smallest micro-batch fits; None where nothing does."""
    gradient_sync: str = "micro-batch"
    """When gradients of a sharded model are summed over the ranks: in each "micro-batch", or once a "window"."""

    @property
    def length_rule(self) -> LengthRule | None:
        """How this rank's share of a window is cut where samples differ in length; None where they do not."""
        return LengthRule(self.by_length, self.minimum, self.limits[self.rank]) if self.by_length else None

    def share(self, samples: int) -> tuple[int, int]:
        """This rank's part [start, stop) of a window of `samples` samples; the parts of all ranks tile the window.

        A PlanError names the nearest window where this one cannot be shared.
        """
        parts = split.shares(samples, self.limits, minimum=self.minimum)
        start = sum(parts[: self.rank])
        return start, start + parts[self.rank]

    def split(self, samples: int) -> tuple[int, ...]:
        """This rank's micro-batch sizes for its share of a window of `samples` samples; empty where it has none."""
        start, stop = self.share(samples)
        return split.even_split(
            stop - start, self.limits[self.rank], minimum=self.minimum, multiple_of=self.multiple_of
        )

    @property
    def windows(self) -> Windows:
        """How an epoch is cut into windows, over all ranks."""
        return Windows(self.target_batch, self.tail, self.minimum, max(self.limits))

    @property
    def usual_window(self) -> int:
        """Samples of an optimizer step, over all ranks: the target, or all of an epoch that has fewer."""
        return self.windows.usual(self.samples)

    def group_settings(self, group: Mapping[str, Any]) -> dict[str, float | tuple[float, ...]]:
        """New values for one of the optimizer's parameter groups, from those it holds: its own LR scaled, and so on."""
        return learning_rate.group_settings(group, self.lr_rule, self.usual_window, self.lr_batch)
