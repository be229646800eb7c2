"""Samples of different lengths -> micro-batches that each fit at their own padded length. Integers only.

What fits is a table of pairs (length, samples), lengths rising and samples falling: so many samples fit at once where
none is longer than that length. It is read off the forecast once and kept in the plan, so that how a window is cut
follows from the plan and the samples' lengths alone: the same after a restart, and on any machine.

Choices made here:

- A micro-batch costs its samples times its longest, since all are padded to that. So a window is sorted by length and
  cut into runs: whatever cut is not into runs becomes no dearer by exchanging samples until it is.
- Each further micro-batch costs something too (launches, small matrix products). It is counted as a 32nd of what the
  fullest micro-batch of the window would hold: measured seconds would be nearer, and would not be the same twice.
- The cheapest cut is found exactly, from the short end on, where at most 128 samples fit at once; beyond that the ends
  of micro-batches are looked for in steps of a 128th of what fits.
- The longest run first: an allocator that has made room for them finds room for the rest.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import inf

from autoaccum.errors import PlanError, shown
from autoaccum.planning.bisection import largest

__all__ = ["LengthRule", "Room", "check_room", "limit_at", "narrowest", "room_of", "scaled"]

Room = tuple[tuple[int, int], ...]
"""(length, samples): up to this padded length so many samples fit at once; beyond the last length not one does."""

OVERHEAD = 32  # a micro-batch costs this part of the fullest one beside its tokens
_FINEST = 128  # ends of a micro-batch that are looked at
_COUNTED_SINGLY = 64  # samples: beyond, the table tells every 64th part
_LONGEST = 2**24  # no forecast is asked further


def limit_at(room: Room, length: int) -> int:
    """The most samples that fit at once at this padded length; 0 where not one does."""
    at = bisect_left(room, (length,))
    return room[at][1] if at < len(room) else 0


def room_of(fits: Callable[[int, int], bool], most: int, longest: int) -> Room:
    """The table of what fits, where `fits` tells whether so many samples of a length do; `most` are ever wanted at
    once.

    `longest` is a length that was seen; longer ones are looked for step by step, each twice the one before.
    """
    found: list[tuple[int, int]] = []
    reached, samples = 0, most
    while samples:
        low, high = 0, max(reached, longest)
        while high < _LONGEST and fits(samples, high):
            low, high = high, 2 * high
        length = largest(partial(fits, samples), high - 1, low)
        if length > reached:
            found.append((length, samples))
            reached = length
        samples -= max(1, samples // _COUNTED_SINGLY)
    return tuple(found)


def scaled(room: Room, numerator: int, denominator: int, minimum: int) -> Room:
    """So many times the samples at every length, at least `minimum` where those fitted before."""
    made: dict[int, int] = {}  # samples -> the longest such length
    for length, samples in room:
        made[max(samples * numerator // denominator, min(samples, minimum))] = length
    return tuple((length, samples) for samples, length in made.items())


def narrowest(rooms: Sequence[Room]) -> Room:
    """What fits on every rank."""
    lengths = sorted({length for room in rooms for length, _ in room})
    made: dict[int, int] = {}
    for length in lengths:
        samples = min(limit_at(room, length) for room in rooms)
        if samples:
            made[samples] = length
    return tuple((length, samples) for samples, length in made.items())


def check_room(room: Room) -> Room:
    """The table; a PlanError where lengths do not rise, or samples do not fall."""
    pairs = isinstance(room, (tuple, list)) and all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in room)
    whole = pairs and all(type(number) is int and 0 < number < 2**63 for pair in room for number in pair)
    if not whole or not all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(room)):
        raise PlanError(
            f"by_length={shown(room)} is no table of what fits: give pairs (length, samples) of whole numbers above "
            "0, by rising length and falling samples"
        )
    return room


@dataclass(frozen=True)
class LengthRule:
    """How a rank cuts its share of a window by length: by `room`, what fits, in micro-batches of `minimum` samples or
    more.

    `even`: the samples of a micro-batch whatever the lengths, had they not been looked at: for comparison.
    """

    room: Room
    minimum: int
    even: int

    @property
    def longest(self) -> int:
        """The longest sample that can be trained on; 0 where none can."""
        return max((length for length, samples in self.room if samples >= self.minimum), default=0)

    def limit(self, length: int) -> int:
        """The most samples at once at this padded length."""
        return limit_at(self.room, length)

    def split(self, lengths: Sequence[int]) -> list[list[int]]:
        """The places of the samples in each micro-batch, the longest samples first.

        A PlanError where a sample is too long to be run at all, or the samples cannot be cut with this minimum.
        """
        order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
        ends = self._ends([lengths[place] for place in order])
        pieces, start = [], 0
        while start < len(order):
            pieces.append(order[start : ends[start]])
            start = ends[start]
        return pieces

    def _ends(self, lengths: list[int]) -> list[int]:
        """For each place of lengths that fall: where the micro-batch ends that begins there, in the cheapest cut."""
        count = len(lengths)
        limits = {length: min(self.limit(length), count) for length in set(lengths)}
        overhead = max((length * limit for length, limit in limits.items()), default=0)
        costs: list[float] = [*[inf] * count, 0]
        ends = [0] * count
        for start in range(count - 1, -1, -1):
            length = lengths[start]
            reach = min(limits[length], count - start)
            weight = OVERHEAD * length
            step = max(1, reach // _FINEST)
            for end in range(start + reach, start + self.minimum - 1, -step):
                cost = costs[end] + weight * (end - start)
                if cost + overhead < costs[start]:
                    costs[start], ends[start] = cost + overhead, end
        if costs[0] == inf:
            raise PlanError(
                f"{count} samples of lengths {lengths[-1]} to {lengths[0]} cannot be cut into micro-batches of at "
                f"least {self.minimum}: up to a length of {self.longest} that many fit at once; shorten long samples"
            )
        return ends
