"""The Plan: what to train with, decided once, every value with its reason; to JSON and back.

Choices made here:

- A Plan is frozen and whole: it holds what was asked (target, limits, floor, rule), what follows (sizes, LR,
  momentum), and one readable line on each. When the device turns out smaller, `with_limit` makes another Plan for the
  same target.
- It knows windows of any size, not only full ones: `share` and `split` cut a short last window as they cut the full
  one, on every rank by the same arithmetic, so that no rank has to be told.
- The file is plain JSON with a schema version; it is written whole or not at all, and reads back as the equal Plan.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoaccum.checks import one_of, plain
from autoaccum.display.shown import Drawn
from autoaccum.errors import PlanError, shown
from autoaccum.planning import learning_rate, split, trainer_config
from autoaccum.planning.bn_momentum import MODES
from autoaccum.planning.bn_momentum import bn_momentum as bn_momentum_for
from autoaccum.planning.length_rule import Room, check_room, scaled
from autoaccum.planning.plan_fields import SCHEMA, PlanFields, read_file, read_values, write_file
from autoaccum.planning.reasons import batch_norm_lines, size_lines, tail_line

__all__ = ["SCHEMA", "Plan", "plan"]


@dataclass(frozen=True)
class Plan(PlanFields, Drawn):
    """How one rank trains with exactly `target_batch` samples a step: the fields of PlanFields. `plan` makes it."""

    _view = "plan_view"

    def with_limit(self, limit: int, reason: str) -> "Plan":
        """The plan for the same target with at most `limit` samples at once, on every rank.

        Roomier ranks come down to `limit`. Where all have less, the roomiest rise to it, and those that were smaller
        than these stay as they are. Where samples differ in length, `limit` is for the longest ones, and what shorter
        ones may take changes in proportion.

        Args:
            limit: the new limit.
            reason: one line on it, kept under "limit".

        Raises:
            PlanError: the target cannot be cut so; the nearest that can is named.
        """
        limit = split.whole("limit", limit, 1)
        roomiest = max(self.limits)
        limits = tuple(limit if own == roomiest else min(own, limit) for own in self.limits)
        room = scaled(self.by_length, limit, roomiest, self.minimum)
        reasons = {**self.reasons, "limit": reason}
        return _arranged(dataclasses.replace(self, limits=limits, by_length=room, reasons=reasons))

    def on_rank(self, rank: int) -> "Plan":
        """This plan as another rank has it: what a plan read from one rank's file becomes on the others.

        Raises:
            PlanError: there is no such rank.
        """
        return _arranged(dataclasses.replace(self, rank=_rank(rank, self.world_size)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the schema's version; tuples become lists."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"schema": SCHEMA, **{name: plain(value) for name, value in values.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """The plan that `to_dict` wrote, also where it stands under "plan"; keys that are not a plan's are passed over.

        Raises:
            PlanError: another schema, a key that is missing or of another kind, or sizes that do not fit together.
        """
        found = cls(**read_values(data))
        _check(found)
        return found

    def as_config(self, name: str) -> str:
        """What to put into another trainer's configuration, and what of the plan it cannot express, as text.

        Args:
            name: "transformers", "lightning", "accelerate", "deepspeed", "torchtitan", "axolotl", "llamafactory" or
                "trl".

        Raises:
            PlanError: a trainer that is not known.
        """
        return trainer_config.as_config(self, name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON: whole, or not at all where something fails half-way.

        Raises:
            PlanError: it cannot be written there.
        """
        write_file(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """The plan in a file that `save` wrote, or in one that holds it under "plan", as a search's result does.

        Raises:
            PlanError: the file is missing, damaged, not a plan, or of another schema; the path is named.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise PlanError(
                f"plan={shown(path)} is of type {type(path).__name__}: give a Plan, or the path of its file"
            )
        data = read_file(Path(path))
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def plan(
    limit: int | Sequence[int],
    target_batch: int,
    *,
    world_size: int = 1,
    rank: int = 0,
    samples: int | None = None,
    optimizer: object = "adamw",
    lr: float | None = None,
    lr_batch: int | None = None,
    lr_rule: str = "auto",
    betas: Sequence[float] | None = None,
    eps: float | None = None,
    bn_momentum: float | None = 0.1,
    batch_norm: str = "pooled",
    batch_norm_layers: int | None = None,
    minimum: int = 1,
    multiple_of: int = 1,
    tail: str = "step",
    reasons: Mapping[str, str] | None = None,
    by_length: Room = (),
) -> Plan:
    """The plan for `target_batch` where at most `limit` samples fit at once: arithmetic only, nothing is run.

    Args:
        limit: the most samples in one micro-batch; a sequence has one for each rank.
        target_batch: samples per optimizer step, over all ranks.
        world_size: how many ranks train together.
        rank: which of them the plan is for.
        samples: of an epoch, to say what becomes of the last window.
        optimizer: an optimizer, its class or its name, for the rule and for what it holds.
        lr: the LR as tuned; None takes that of an optimizer with parameter groups.
        lr_batch: samples a step that the LR was tuned at; None: the LR is not scaled.
        lr_rule: "auto", "linear", "sqrt", "adam-sde" or "none".
        betas: Adam's, which "adam-sde" changes; None takes the optimizer's, or PyTorch's defaults.
        eps: likewise.
        bn_momentum: the BatchNorm layers' own momentum; None is a cumulative average.
        batch_norm: "pooled", "momentum" or "keep".
        batch_norm_layers: how many the model has: with 0 the plan does not speak of BatchNorm; None is not known.
        minimum: the fewest samples in a micro-batch: 2 where a BatchNorm sees a single value per channel and sample.
        multiple_of: prefer such sizes where that does not raise the number of micro-batches.
        tail: "step" or "drop" a short last window.
        reasons: the caller's lines, such as where `limit` is from; under a name of the plan's own they replace that.
        by_length: where samples differ in length: pairs (length, samples), so many fit at once up to that padded
            length; `limit` is then for the longest samples seen.

    Raises:
        PlanError: a value out of range, or a target that cannot be cut, with the nearest that can.
    """
    world_size = split.whole("world_size", world_size, 1, split.MOST)
    target_batch = split.whole("target_batch", target_batch, 1)
    limits, minimum = _limits(limit, world_size), split.whole("minimum", minimum, 1)
    one_of("tail", tail, split.TAILS, PlanError)
    one_of("batch_norm", batch_norm, MODES, PlanError)
    lr_batch = None if lr_batch is None else split.whole("lr_batch", lr_batch, 1)
    samples = None if samples is None else split.whole("samples", samples, 1)
    layers = None if batch_norm_layers is None else split.whole("batch_norm_layers", batch_norm_layers, 0)
    split.check_target(target_batch, limits, minimum=minimum)
    window = split.Windows(target_batch, tail, minimum, max(limits)).usual(samples)
    rates = learning_rate.decide(
        window, lr_batch, rule=lr_rule, optimizer=optimizer, lr=lr, betas=betas, eps=eps, samples=samples
    )
    if reasons is not None and not isinstance(reasons, Mapping):
        raise PlanError(f'reasons={shown(reasons)}: give a dict of lines, such as {{"limit": "as measured by hand"}}')
    given = dict(reasons or {})
    arranged = _arranged(
        Plan(
            target_batch=target_batch,
            world_size=world_size,
            rank=_rank(rank, world_size),
            micro_batch=0,
            accumulation_steps=0,
            micro_batches=(),
            lr_batch=lr_batch,
            bn_momentum=None,
            layer_momentum=bn_momentum if layers != 0 else None,
            batch_norm=batch_norm,
            batch_norm_layers=layers,
            limits=limits,
            minimum=minimum,
            multiple_of=split.whole("multiple_of", multiple_of, 1),
            tail=tail,
            samples=samples,
            by_length=check_room(by_length),
            **{**rates, "reasons": {**rates["reasons"], **given}},
        )
    )
    return dataclasses.replace(arranged, reasons={**arranged.reasons, **given})


def _arranged(draft: Plan) -> Plan:
    """The draft with what follows from its target, limits and rank: sizes, BatchNorm momentum, and their reasons."""
    split.check_target(draft.target_batch, draft.limits, minimum=draft.minimum)
    sizes = draft.split(draft.usual_window)
    said = size_lines(draft, sizes) | {"tail": tail_line(draft)} | batch_norm_lines(draft, sizes)
    others = {name: line for name, line in draft.reasons.items() if name not in said}
    return dataclasses.replace(
        draft,
        micro_batch=max(sizes, default=0),
        accumulation_steps=len(sizes),
        micro_batches=sizes,
        bn_momentum=bn_momentum_for(draft.layer_momentum, len(sizes)),
        reasons={**said, **others},
    )


# --- what the caller gives -------------------------------------------------------------------------------------------


def _limits(limit: int | Sequence[int], world_size: int) -> tuple[int, ...]:
    if isinstance(limit, Sequence) and not isinstance(limit, str):
        limits = tuple(split.whole(f"limit[{rank}]", own, 1) for rank, own in enumerate(limit))
        if len(limits) != world_size:
            raise PlanError(
                f"{len(limits)} limits for world_size={world_size}: give one limit for each rank, or one int for all"
            )
        return limits
    return (split.whole("limit", limit, 1),) * world_size


def _rank(rank: int, world_size: int) -> int:
    rank = split.whole("rank", rank, 0)
    if rank >= world_size:
        raise PlanError(f"rank={rank} is not one of {world_size}: ranks count from 0 to {world_size - 1}")
    return rank


def _check(found: Plan) -> None:
    """That the values of a plan that was read, perhaps edited by hand, belong together."""
    split.whole("target_batch", found.target_batch, 1)
    _rank(found.rank, split.whole("world_size", found.world_size, 1, split.MOST))
    _limits(found.limits, found.world_size)
    for name in ("minimum", "multiple_of", "samples", "lr_batch"):
        if getattr(found, name) is not None:
            split.whole(name, getattr(found, name), 1)
    one_of("lr_rule", found.lr_rule, learning_rate.RULES[1:], PlanError)
    one_of("batch_norm", found.batch_norm, MODES, PlanError)
    one_of("tail", found.tail, split.TAILS, PlanError)
    one_of("gradient_sync", found.gradient_sync, ("micro-batch", "window"), PlanError)
    check_room(found.by_length)
    if (found.lr or 0.0) < 0:  # 0 is the rate of an optimizer whose loop warms up by hand
        raise PlanError(f"this plan's lr is {found.lr}: make it anew")
    for name in found.optimizer_overrides if found.lr_rule != "adam-sde" else ():
        raise PlanError(
            f"this plan's optimizer_overrides have {name!r:.80}, which lr_rule={found.lr_rule!r} leaves as the "
            "optimizer has it: set it there, and make the plan anew"
        )
    factor = learning_rate.lr_factor(found.lr_rule, found.usual_window, found.lr_batch)
    made = dataclasses.replace(_arranged(found), lr_scale=factor)
    for name in ("micro_batches", "micro_batch", "accumulation_steps", "bn_momentum", "lr_scale"):
        was, own = getattr(found, name), getattr(made, name)
        if was != own and not (isinstance(was, float) and isinstance(own, float) and math.isclose(was, own)):
            raise PlanError(
                f"this plan's {name} is {was!r:.80}, and its target, limits and rule make it {own!r:.80}: change a "
                "plan with Plan.with_limit, or make it anew"
            )
