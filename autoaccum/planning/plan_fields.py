"""What a plan holds, the windows that follow from it, and its file: the base of Plan, of which the lines on it tell."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from autoaccum.checks import typed
from autoaccum.errors import PlanError, shown
from autoaccum.files import read_json, write_json
from autoaccum.planning import learning_rate, split
from autoaccum.planning.length_rule import LengthRule, Room
from autoaccum.planning.split import Windows

__all__ = ["SCHEMA", "PlanFields", "read_file", "read_values", "write_file"]

SCHEMA = 1
_LONGEST_PATH = 1000  # characters that a message repeats


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


# --- as plain JSON values, and in a file ------------------------------------------------------------------------------


def read_values(data: Any) -> dict[str, Any]:
    """A plan's fields out of what was JSON; where an object holds the plan under "plan", out of that."""
    if isinstance(data, Mapping) and isinstance(data.get("plan"), Mapping):
        data = data["plan"]
    if not isinstance(data, Mapping):
        raise PlanError(f"a plan is a JSON object, and this is a {type(data).__name__}: give what Plan.to_dict wrote")
    if data.get("schema") != SCHEMA or isinstance(data["schema"], bool):
        raise PlanError(
            f"this plan has schema {data.get('schema')!r:.40}, and this version of autoaccum reads schema {SCHEMA}: "
            "make the plan anew, or use the version that wrote it"
        )
    # A plan that was written before a field came has that field's default.
    data = {each.name: each.default for each in fields(PlanFields) if each.default is not MISSING} | {**data}
    missing = [each.name for each in fields(PlanFields) if each.name not in data]
    if missing:
        raise PlanError(f"this plan lacks {', '.join(missing)}: make it anew with autoaccum.plan")
    values = {}
    for each in fields(PlanFields):
        try:
            values[each.name] = typed(data[each.name], each.type)
        except (TypeError, OverflowError) as error:
            raise PlanError(f"this plan's {each.name} is {data[each.name]!r:.80}, not {error}: make it anew") from None
    return values


def read_file(path: Path) -> Any:
    """The JSON value in a file; a PlanError where it cannot be read, or is not JSON."""
    try:
        return read_json(path)
    except (OSError, ValueError) as error:  # not UTF-8, not JSON, out of bounds, or of another checksum
        text = str(path)  # whole, as people look for it, but where it is too long to be one
        name = text if len(text) < _LONGEST_PATH and text.isprintable() else shown(text)
        why = f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else f"is damaged: {error}"
        raise PlanError(f"the plan {name} {why}; give a file saved by Plan.save, or make the plan anew") from error


def write_file(path: Path, values: Mapping[str, Any]) -> None:
    """The values as JSON in the file, whole or not at all, which is a PlanError."""
    try:
        write_json(path, values, checksum=True)
    except OSError as error:
        why = error.strerror or str(error)
        raise PlanError(
            f"the plan cannot be saved at {shown(str(path))}: {why}; choose a folder that exists and is writable"
        ) from error
