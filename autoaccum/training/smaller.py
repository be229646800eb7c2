"""Smaller micro-batches for the same samples: of the window that failed, and of those to come; and larger ones again.

On several ranks each that ran out of memory halves its micro-batches, and the others keep theirs. All ranks learn all
limits, because the share of every rank in a window follows from them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from autoaccum.checks import typed
from autoaccum.data import tree
from autoaccum.errors import DataError, NothingFitsError, PlanError
from autoaccum.planning.length_rule import scaled
from autoaccum.planning.plan import Plan
from autoaccum.planning.split import even_split
from autoaccum.ranks import Ranks

__all__ = ["Replays", "cut_in_half", "cut_smaller", "plan_for", "with_floor"]


# Of a size that the probe ran, or that is nearly as large: memory was short by little, and half of it is not needed.
NOTCH, NEAR = 0.95, 0.9
# A retry of the allocator gives its cache back to the device and takes it anew, at every window: after so many in a row
# they will not end by themselves.
PERSISTENT = 3


class Replays:
    """How small micro-batches have become, and whether they may grow again.

    `before` is the plan before the first of the replays that count (None where there were none), `undisturbed` the
    number of windows since the last one.
    """

    def __init__(self, regrow_after: int | None, verified: int | None = None) -> None:
        """`verified` is a size that the probe ran on this rank; None: none was."""
        self._verified = verified
        self.before: Plan | None = None
        self.undisturbed = 0
        self._regrow_after = regrow_after

    def shrink(self, plan: Plan, largest: int, ran_out: bool, ranks: Ranks, step: int) -> tuple[Plan, int]:
        """The plan for going on, and the largest micro-batch of this rank's in the window that is replayed.

        All ranks call this, each with its largest micro-batch in the attempt that failed and whether it ran out.
        Gradients that wait whole for a window's end go first, and sizes stay; then these are halved. A NothingFitsError
        where it ran out at the smallest micro-batch that the plan allows.
        """
        if plan.gradient_sync == "window":
            text = (
                f"micro-batch: memory ran out in step {step} while gradients waited whole for the window's end; from "
                "here on each micro-batch sums them over the ranks, which keeps them sharded"
            )
            self.before, self.undisturbed = self.before or plan, 0
            reasons = {**plan.reasons, "gradient_sync": text, "limit": text.partition(": ")[2]}
            return dataclasses.replace(plan, gradient_sync="micro-batch", reasons=reasons), max(largest, 1)
        now = plan.limits[plan.rank]
        half = max((largest + 1) // 2, plan.minimum)
        if ran_out and self._verified is not None and NEAR * self._verified <= largest <= self._verified:
            half = max(min(int(largest * NOTCH), largest - 1), half)
            self._verified = None  # once: what fails again is not near
        if ran_out and half >= largest:
            raise NothingFitsError(
                f"step {step} ran out of memory at a micro-batch of {max(largest, 1)}, the smallest there is: "
                "something else has taken the memory, or a sample is larger than those probed. Free memory, or train "
                "a smaller model"
            )
        if plan.by_length:  # whichever length it was that ran out: half as many run at every length from here on
            largest, half = now, max((now + 1) // 2, plan.minimum)
        what = f"the replay of step {step}"
        tops = ranks.gather(what, largest if ran_out else now)
        limits = ranks.gather(what, half if ran_out else now)
        failed = [rank for rank, flag in enumerate(ranks.gather(what, int(ran_out))) if flag]
        where = "" if ranks.size == 1 else f" on rank {', '.join(map(str, failed))}"
        at = f" at a micro-batch of {max(tops[rank] for rank in failed)}"
        then = f"in micro-batches of at most {max(limits[rank] for rank in failed)}, and so do later windows"
        if plan.by_length:
            at = ""
            then = "with each micro-batch in two, and later windows run half as many samples at once at every length"
        text = (
            f"out of memory in step {step}{where}{at}: the same samples run again {then}; the batch stays "
            f"{plan.target_batch}"
        )
        smaller = _feasible(plan, limits, tops, text)
        if plan.by_length:
            smaller = dataclasses.replace(smaller, by_length=scaled(plan.by_length, 1, 2, plan.minimum))
        self.before, self.undisturbed = self.before or plan, 0
        return smaller, smaller.limits[plan.rank] if ran_out else max(largest, 1)

    def ease(self, plan: Plan, strained: bool, ranks: Ranks, step: int) -> Plan:
        """The plan with a somewhat smaller limit on each rank that is `strained`, whose allocator retries.

        All ranks call this. Where no smaller limit makes the batch, or windows are cut by length, it stays as it is.
        """
        now = plan.limits[plan.rank]
        less = max(min(int(now * NOTCH), now - 1), plan.minimum) if strained else now
        limits = ranks.gather(f"the allocator's retries by step {step}", less)
        if plan.by_length or tuple(limits) == tuple(plan.limits):
            return plan
        text = (
            f"the allocator emptied its cache in each of the last {PERSISTENT} windows, which is slow: micro-batches "
            f"of at most {max(limits)} from step {step} on; the batch stays {plan.target_batch}"
        )
        with suppress(PlanError):
            return _limited(plan, limits, text)
        return plan

    def grow(self) -> Plan | None:
        """Counts a window that ran; after enough of them, the plan from before, which is tried under the same guard."""
        self.undisturbed += 1
        if self._regrow_after is None or self.undisturbed < self._regrow_after:
            return None
        before, self.before, self.undisturbed = self.before, None, 0
        return before

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        before = None if self.before is None else self.before.to_dict()
        return {"before": before, "undisturbed": self.undisturbed}

    def load_state_dict(self, state: Mapping[str, Any], plan: Plan) -> None:
        """Goes on counting; `plan` is this training's."""
        before, undisturbed = state["before"], typed(state["undisturbed"], int)
        kept = None if before is None else plan_for(plan.rank, before)
        self.before = kept if kept is not None and kept.world_size == plan.world_size else None
        self.undisturbed = undisturbed


def with_floor(plan: Plan) -> Plan:
    """The plan without micro-batches of 1, which a BatchNorm layer that sees one value a sample refuses."""
    limits = [max(limit, 2) for limit in plan.limits]
    try:
        text = f"{max(limits)}: a BatchNorm layer takes no micro-batch of 1"
        return _limited(plan, limits, text, minimum=2)
    except PlanError as error:
        raise NothingFitsError(f"memory ran out, and a BatchNorm layer takes no micro-batch of 1: {error}") from None


def plan_for(rank: int, values: Mapping[str, Any]) -> Plan:
    """The plan in a checkpoint, as this rank has it; as it was, where that had no such rank."""
    plan = Plan.from_dict(values)
    return plan if plan.rank == rank or rank >= plan.world_size else plan.on_rank(rank)


def _feasible(plan: Plan, limits: Sequence[int], tops: Sequence[int], text: str) -> Plan:
    """The plan with new limits; with a floor above 1 some cannot be met, and the next ones up are taken."""
    refusal: PlanError | None = None
    for more in range(max(top - limit for top, limit in zip(tops, limits, strict=True)) or 1):
        new = [min(limit + more, max(top - 1, limit)) for limit, top in zip(limits, tops, strict=True)]
        try:
            return _limited(plan, new, text)
        except PlanError as error:
            refusal = error
    raise NothingFitsError(f"memory ran out, and no smaller micro-batches make the same batch: {refusal}")


def _limited(plan: Plan, limits: Sequence[int], text: str, **changes: Any) -> Plan:
    # A limit that is the roomiest already changes nothing but the sizes that follow from all of them.
    return dataclasses.replace(plan, limits=tuple(limits), **changes).with_limit(max(limits), text)


def cut_in_half(batches: Sequence[Any], minimum: int) -> list[Any]:
    """Each micro-batch in two, its samples in their order, where each has its own length and its own limit."""
    pieces = []
    for batch in batches:
        size = tree.batch_size(batch)
        pieces += tree.split(batch, [(size + 1) // 2, size // 2]) if size // 2 >= minimum else [batch]
    if len(pieces) == len(batches):
        raise NothingFitsError(f"memory ran out, and the window cannot be cut smaller with at least {minimum} at once")
    return pieces


def cut_smaller(batches: Sequence[Any], limit: int, minimum: int) -> list[Any]:
    """The samples of `batches` in their order, in micro-batches of at most `limit`.

    Each micro-batch is cut by itself, since what was padded together need not match its neighbours. Only where one
    cannot be cut so, as 3 samples where at least 2 have to run together, they are joined first. A NothingFitsError
    where neither can be done.
    """
    try:
        return [
            piece
            for batch in batches
            for piece in tree.split(batch, even_split(tree.batch_size(batch), limit, minimum=minimum))
        ]
    except PlanError as error:
        refusal = error
    try:
        joined = tree.join(batches)
        return tree.split(joined, even_split(tree.batch_size(joined), limit, minimum=minimum))
    except (PlanError, DataError):
        raise NothingFitsError(f"memory ran out, and the window cannot be cut smaller: {refusal}") from refusal
