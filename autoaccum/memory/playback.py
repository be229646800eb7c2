"""A training's first windows, as forecast, played through the simulated allocator of a device.

A training begins with an emptied cache and, most often, an optimizer without state. Its first window fills the cache,
the optimizer's state is born among what that left, and the second window runs in what both left: it is the second that
shows what a training reserves. So two windows are played, of two micro-batches each, as the traces recorded them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from autoaccum.memory.allocator import Block, CachingAllocator
from autoaccum.memory.replay import FOREVER, Table
from autoaccum.memory.trace import Kept

__all__ = ["Playback", "Reservation"]

WINDOWS = 2
_INSIDE, _FREE, _TAKE, _PHASE = range(4)


@dataclass(frozen=True)
class Reservation:
    """What the simulated allocator took: peaks in bytes, and how often it had to empty its cache."""

    reserved: int
    allocated: int
    retries: int


class Playback:
    """The requests of one window in order, of sizes that are told when it is played."""

    def __init__(self, table: Table, phases: Sequence[str]) -> None:
        """Puts what happens at each row of `table` in a line; `phases` names the phases that its rows count."""
        births: dict[int, list[int]] = defaultdict(list)
        deaths: dict[int, list[int]] = defaultdict(list)
        for at, flow in enumerate(table.flows):
            if flow.death > flow.birth:
                births[flow.birth].append(at)
            if flow.death < FOREVER:
                deaths[flow.death].append(at)
        self._streams = [flow.stream for flow in table.flows]
        self._script: list[tuple[int, int]] = []
        self._phases: list[str] = []  # each once, as it first comes
        for at, row in enumerate(table.rows):
            if phases[row.phase] not in self._phases:
                self._script.append((_PHASE, len(self._phases)))
                self._phases.append(phases[row.phase])
            if row.coarse:
                self._script.append((_INSIDE, at))
            self._script += ((_FREE, flow) for flow in deaths[at])
            self._script += ((_TAKE, flow) for flow in births[at])

    def play(
        self, allocator: CachingAllocator, sizes: Sequence[int], inside: Sequence[int], kept: Sequence[Kept]
    ) -> Reservation:
        """Two windows from the cache emptied.

        Args:
            allocator: holds what is there when a training begins.
            sizes: bytes of each flow.
            inside: bytes that each coarse row holds at most.
            kept: what the first window leaves for good.

        Raises:
            SimulatedOutOfMemory: the windows do not fit under the allocator's limit.
        """
        allocator.release_cached()
        allocator.peak_reserved = allocator.reserved
        blocks: dict[int, Block] = {}
        allocate, free, streams = allocator.allocate, allocator.free, self._streams
        for window in range(WINDOWS):
            for what, at in self._script:
                if what == _TAKE:
                    if sizes[at] > 0:
                        before = blocks.get(at)
                        blocks[at] = allocate(sizes[at], streams[at])
                        if before is not None:  # of the window before, which this one replaces
                            free(before)
                elif what == _FREE:
                    block = blocks.pop(at, None)
                    if block is not None:
                        free(block)
                elif what == _INSIDE:
                    if inside[at] > 0:
                        free(allocate(inside[at]))
                elif window == 0:
                    for phase, size in kept:
                        if phase == self._phases[at]:
                            allocate(size)
        return Reservation(allocator.peak_reserved, allocator.peak_allocated, allocator.retries)
