"""A plan, or a target, as it was given: what it says, and what follows for this training."""

from __future__ import annotations

import math
import os
from dataclasses import fields, replace
from typing import Any

from autoaccum.checks import check_counts
from autoaccum.errors import PlanError
from autoaccum.planning.learning_rate import number
from autoaccum.planning.plan import Plan

__all__ = [
    "beside_own_rate",
    "differs",
    "for_ranks",
    "given_plan",
    "on_other_ranks",
    "share_of",
    "target_of",
    "total_steps",
]


def given_plan(given: Plan | str | os.PathLike[str], target_batch: int | None) -> Plan:
    """The plan that the user gave, or its file; a PlanError where it is for another target batch, or cannot be read."""
    made = given if isinstance(given, Plan) else Plan.load(given)
    if target_batch is not None and target_batch != made.target_batch:
        raise PlanError(f"target_batch={target_batch}, but the plan given is for {made.target_batch}: give one of them")
    return made


def differs(one: Plan, other: Plan) -> bool:
    """Whether they train in another way; their `lr` alone is of the optimizers they were made for."""
    names = {field.name for field in fields(Plan)} - {"lr", "reasons"}
    return any(getattr(one, name) != getattr(other, name) for name in names)


def target_of(given: Plan | None, target_batch: int | None) -> int:
    """The target batch, which a plan knows; a PlanError where neither says it, or it is not a whole number above 0."""
    if given is not None:
        return given.target_batch
    if target_batch is None:
        raise PlanError("target_batch is missing: give the samples of one optimizer step, such as target_batch=256")
    check_counts(target_batch=target_batch)
    return target_batch


def beside_own_rate(given: Plan, optimizer: Any) -> Plan:
    """The plan with the rate that is trained with: its factor on the optimizer's own, which need not be the plan's."""
    rates = {float(group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None}
    if given.lr is None or len(rates) != 1:
        return given
    (own,) = rates
    lr = own * given.lr_scale
    if math.isclose(lr, given.lr, rel_tol=1e-9):
        return given
    factor = number(given.lr_scale)
    reason = f"{number(lr)} = {number(own)}, the rate given beside the plan, × {factor}, the plan's factor"
    return replace(given, lr=lr, reasons={**given.reasons, "lr": reason})


def for_ranks(given: Plan, rank: int, ranks: int) -> Plan:
    """The plan as one of several ranks has it; a PlanError where it is for another number of ranks."""
    if given.world_size != ranks:
        raise PlanError(f"the plan given is for {given.world_size} ranks, and there are {ranks}: make one for these")
    return given.on_rank(rank)


def on_other_ranks(kept: Plan, found: Plan) -> Plan:
    """A checkpoint's plan, cut for another number of ranks: sizes as `found` on them, rates and all else as it was."""
    own = ("world_size", "rank", "limits", "minimum", "by_length", "ladder")
    names = ("budget", "limit", "ladder", "precision")
    reasons = {name: line for name, line in kept.reasons.items() if name not in names}
    reasons |= {name: found.reasons[name] for name in names if name in found.reasons}
    reasons["ranks"] = (
        f"{found.world_size}, and {kept.world_size} when it was saved: windows hold the same samples, of which each "
        "rank's share is cut anew"
    )
    sizes = {name: getattr(found, name) for name in own}
    return replace(kept, **sizes, reasons=reasons).on_rank(found.rank)


def share_of(target_batch: int, length: int | None, ranks: int) -> int:
    """The most samples of a window that one of equal ranks takes: of the target, or of an epoch that has fewer."""
    return -(-min(target_batch, length or target_batch) // ranks)


def total_steps(made: Plan, length: int | None, epochs: int, max_steps: int | None) -> int | None:
    """Optimizer steps in the whole training; None for a stream without a length."""
    if max_steps is not None:
        return max_steps
    return None if length is None else sum(count for _, count in made.windows.runs(length)) * epochs
