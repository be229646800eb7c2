"""Samples into windows, windows over ranks, a rank's share into micro-batches. Integers only.

Choices made here:

- The number of micro-batches is chosen first and is the least that fits; the samples are then spread evenly over it.
  256 samples with at most 100 at once are 86 + 85 + 85: no more passes than 100 + 100 + 56, and the least memory of
  any three.
- A layer may forbid small micro-batches (BatchNorm refuses a single value per channel), so sizes have a floor,
  `minimum`. Not every batch can be cut then: k micro-batches hold from k * minimum to k * limit samples, and what lies
  between two such ranges has no answer. The error names the nearest batch that has one.
- Over ranks the most micro-batches that any rank runs is kept least, since that decides the time of a step. A rank may
  be left without samples, never with fewer than the floor.
- A short last window is a window. Only one that cannot be cut (a single sample before BatchNorm) is merged into the
  window before it, and dropped where that is not possible either. On a stream this needs a look ahead, `look_ahead`
  samples.
"""

import operator
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

from autoaccum.errors import PlanError, shown

__all__ = [
    "MOST",
    "TAILS",
    "Windows",
    "can_split",
    "check_target",
    "counts",
    "even_split",
    "nearest_targets",
    "shares",
    "usable_size",
    "whole",
]

TAILS = ("step", "drop")
MOST = 2**20  # micro-batches of a window, and ranks: a plan lists them
_LARGEST = 2**63 - 1  # of any count: PyTorch's own integers, and floats hold it


def whole(name: str, value: object, least: int, most: int = _LARGEST) -> int:
    """`value` as an int from `least` to `most`; booleans, floats and texts are a PlanError, however whole they look."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]  # NumPy's integers count, floats and texts do not
    except TypeError:
        kind = type(value).__name__
        raise PlanError(
            f"{name}={shown(value)} is a {kind}: it counts samples or ranks, so give an int such as 64"
        ) from None
    if number < least:
        raise PlanError(f"{name}={shown(number)} is too small: it must be {least} or more")
    if number > most:
        raise PlanError(f"{name}={shown(number)} is too large: it must be {most} or less")
    return number


# --- one share into micro-batches ------------------------------------------------------------------------------------


def can_split(samples: int, limit: int, minimum: int = 1) -> bool:
    """Whether `samples` can be cut into micro-batches of `minimum` to `limit` samples; none at all (0) can."""
    return -(-samples // limit) * minimum <= samples


def nearest_targets(samples: int, limit: int, minimum: int) -> tuple[int, ...]:
    """The batch nearest to an uncuttable `samples` that can be cut; two, the smaller first, where both are as near."""
    steps = -(-samples // limit)
    below, above = (steps - 1) * limit, steps * minimum
    if below == 0 or above - samples < samples - below:
        return (above,)
    return (below, above) if above - samples == samples - below else (below,)


def even_split(samples: int, limit: int, *, minimum: int = 1, multiple_of: int = 1) -> tuple[int, ...]:
    """The sizes of the fewest micro-batches of `minimum` to `limit` that hold `samples`: even, larger ones first.

    They are multiples of `multiple_of`, all but one at most that takes the remainder, where this neither adds a
    micro-batch nor leaves that range. Sizes then differ by up to `multiple_of`, else by up to one. None for 0 samples.

    Raises:
        PlanError: no number of micro-batches holds so many samples (the nearest that can be held is named), or an
            argument is not a count.
    """
    samples, minimum = whole("samples", samples, 0), whole("minimum", minimum, 1)
    limit, multiple_of = whole("limit", limit, 1), whole("multiple_of", multiple_of, 1)
    if samples == 0:
        return ()
    check_target(samples, [limit], minimum=minimum)
    if -(-samples // limit) > MOST:
        raise PlanError(
            f"a batch of {samples} in micro-batches of at most {limit} is {-(-samples // limit)} of them, and a plan "
            f"lists at most {MOST}: lower the target batch to {MOST * limit} or less, or let more samples run at once"
        )
    return tuple(size for size, count in _runs(samples, limit, minimum, multiple_of) for _ in range(count))


def usable_size(samples: int, limit: int, *, minimum: int = 1, multiple_of: int = 1) -> int:
    """The first of `even_split`'s sizes, however many there are; 0 for no samples.

    Where `samples` cannot be cut so, the most that fit: the plan will say which targets can be.
    """
    if not samples or limit < minimum or not can_split(samples, limit, minimum):
        return min(limit, samples)
    return _runs(samples, limit, minimum, multiple_of)[0][0]


def _runs(samples: int, limit: int, minimum: int, multiple_of: int) -> list[tuple[int, int]]:
    """`even_split`'s sizes as (size, how many), larger ones first."""
    steps = -(-samples // limit)
    runs = _spread(samples, steps, multiple_of)
    sizes = [size for size, _ in runs]
    return runs if max(sizes) <= limit and min(sizes) >= minimum else _spread(samples, steps, 1)


def _spread(samples: int, steps: int, unit: int) -> list[tuple[int, int]]:
    """`samples` over `steps` sizes in whole units, what is left of a unit added to one of the smaller sizes."""
    units, rest = divmod(samples, unit)
    low, larger = divmod(units, steps)
    runs = [((low + 1) * unit, larger), (low * unit + rest, 1), (low * unit, steps - larger - 1)]
    return [(size, count) for size, count in runs if count]


def check_target(samples: int, limits: Sequence[int], *, minimum: int = 1) -> None:
    """Refuses a window of `samples` that cannot be cut where so many fit at once on each rank, with the nearest."""
    if 0 < samples < minimum:
        raise PlanError(
            f"a batch of {samples} is too small for one micro-batch, which needs {minimum} samples or more "
            f"(minimum={minimum}; BatchNorm needs two values a channel): the nearest target batch that can be cut is "
            f"{minimum}"
        )
    least, limit = min(limits), max(limits)
    if least < minimum:
        where = f" on rank {limits.index(least)}" if len(limits) > 1 else ""
        raise PlanError(
            f"limit={least}{where} is less than minimum={minimum}, the fewest samples that a micro-batch may have "
            f"(BatchNorm needs two values a channel): let {minimum} or more run at once (micro_batch=, max_batch=), "
            "or give the model a layer without that minimum (GroupNorm for BatchNorm)"
        )
    if not can_split(samples, limit, minimum):
        steps, nearest = -(-samples // limit), nearest_targets(samples, limit, minimum)
        raise PlanError(
            f"a batch of {samples} cannot be cut into micro-batches of {minimum} to {limit} samples, since "
            f"{steps - 1} × {limit} samples are fewer and {steps} × {minimum} are more: the nearest target batch that "
            f"can be cut is {' or '.join(map(str, nearest))}"
        )


# --- one window over ranks -------------------------------------------------------------------------------------------


def shares(samples: int, limits: Sequence[int], *, minimum: int = 1) -> tuple[int, ...]:
    """How many of a window's samples each rank takes: even where the limits are equal, else in proportion to them.

    `limits` are the most samples in one micro-batch on each rank. Every share can be cut for its rank. With more ranks
    than samples some have a share of 0. The most micro-batches on any rank is the least possible.

    Raises:
        PlanError: no way of sharing leaves every rank with what it can cut; the nearest window that can is named.
    """
    samples, minimum = whole("samples", samples, 0), whole("minimum", minimum, 1)
    check_target(samples, limits, minimum=minimum)  # the roomiest rank alone can do all that ranks can do together
    proposal = _proportional(samples, limits)
    if all(can_split(share, limit, minimum) for share, limit in zip(proposal, limits)):
        return proposal
    return _dealt(samples, limits, minimum)


def counts(samples: int, limits: Sequence[int], *, minimum: int = 1) -> tuple[int, ...]:
    """How many micro-batches each rank runs of a window of `samples` samples, with the arguments of `shares`."""
    parts = shares(samples, limits, minimum=minimum)
    return tuple(-(-part // limit) for part, limit in zip(parts, limits, strict=True))


def _proportional(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """`total` shared by weight, in whole numbers: all rounded down, the rest to the largest fractions, earlier first.

    No part exceeds its exact share rounded up. With total <= sum(weights), no part exceeds its weight therefore; in
    general a weight w gets at most ceil(total / sum(weights)) * w.
    """
    whole_weight = sum(weights)
    if whole_weight == 0:
        return (0,) * len(weights)
    parts = [total * weight // whole_weight for weight in weights]
    by_fraction = sorted(range(len(weights)), key=lambda i: -(total * weights[i] % whole_weight))
    for index in by_fraction[: total - sum(parts)]:
        parts[index] += 1
    return tuple(parts)


def _dealt(samples: int, limits: Sequence[int], minimum: int) -> tuple[int, ...]:
    """Shares built of whole micro-batches, for windows so small or floors so high that plain proportion fails.

    At most samples // minimum micro-batches can be had. They are dealt in rounds to the ranks, roomier ranks first and
    evenly to those that are equally roomy, with as few rounds as will hold the samples; each starts at the floor, and
    what is left goes in proportion to the room above it. So every share is a sum of sizes from minimum to limit.
    """
    for rounds in count(-(-samples // sum(limits))):  # ends: with enough rounds the roomiest rank is dealt all
        dealt = _deal(samples // minimum, rounds, limits)
        if sum(number * limit for number, limit in zip(dealt, limits)) >= samples:
            break
    room = [number * (limit - minimum) for number, limit in zip(dealt, limits)]
    extra = _proportional(samples - sum(dealt) * minimum, room)
    return tuple(number * minimum + more for number, more in zip(dealt, extra))


def _deal(micro_batches: int, rounds: int, limits: Sequence[int]) -> list[int]:
    """How many micro-batches each rank gets of at most `micro_batches`, none more than `rounds`, the roomiest first."""
    dealt = [0] * len(limits)
    for limit in sorted(set(limits), reverse=True):
        alike = [rank for rank, own in enumerate(limits) if own == limit]
        here = min(micro_batches, rounds * len(alike))
        micro_batches -= here
        for position, rank in enumerate(alike):
            dealt[rank] = here // len(alike) + (position < here % len(alike))
    return dealt


# --- an epoch into windows -------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """How epochs are cut into windows: by one rule for lists and streams.

    Attributes:
        target: samples of a full window.
        tail: "step": a short last window is a window; "drop": it is not.
        minimum: the fewest samples in a micro-batch. A tail that cannot be cut because of it joins the window before.
        limit: the most samples in a micro-batch, on the roomiest rank.
    """

    target: int
    tail: str = "step"
    minimum: int = 1
    limit: int = _LARGEST

    def next(self, ahead: int, *, ended: bool) -> int | None:
        """How many samples the next window takes, with `ahead` known to lie ahead, and no more to come where `ended`.

        0: the epoch is over, and what is still ahead is dropped. None: it cannot be told yet; draw more of the stream,
        until `target + look_ahead` samples are there or it ends.
        """
        target = self.target
        if not ended:
            return target if ahead >= target + self.look_ahead else None
        rest = ahead - target
        if rest < 0 and self.tail == "step":
            return ahead if self._can(ahead) else (-(-ahead // self.limit) - 1) * self.limit
        if rest < 0:
            return 0
        # A tail that cannot be cut alone belongs to the window before it, where they can together.
        joins = 0 < rest < target and not self._can(rest) and self._can(ahead)
        return ahead if self.tail == "step" and joins else target

    @property
    def look_ahead(self) -> int:
        """Samples to know of beyond a window before it is cut off a stream: more than any tail that would join it.

        0 where every tail stands for itself, as always with a minimum of 1; otherwise `minimum` as a rule.
        """
        room = self.limit - self.minimum
        if self.tail == "drop" or room <= 0:  # with one size only, what cannot be cut alone cannot with others
            return 0
        # Tails that cannot be cut lie between the ranges k * minimum .. k * limit; from this k on the ranges touch.
        return min(-(-(self.minimum - 1) // room) * self.minimum, self.target)

    def sizes(self, length: int) -> Iterator[int]:
        """The windows of `length` samples in order: `target` each, then what `next` makes of the rest."""
        while window := self.next(length, ended=True):
            yield window
            length -= window

    def runs(self, length: int) -> list[tuple[int, int]]:
        """`sizes` as (size, how many), however many windows there are: full ones first, then what the end gives."""
        target = self.target
        before = max(length // target - 1, 0)  # windows that are full whatever follows: only the last may take a tail
        last = list(self.sizes(length - before * target))
        full = before + last.count(target)
        return [(target, full)] * (full > 0) + [(size, 1) for size in last if size != target]

    def usual(self, samples: int | None) -> int:
        """Samples of the windows that an epoch of `samples` is cut into first: the target, unless that is shorter."""
        runs = [] if samples is None else self.runs(samples)
        return runs[0][0] if runs else self.target

    def _can(self, samples: int) -> bool:
        return can_split(samples, self.limit, self.minimum)
