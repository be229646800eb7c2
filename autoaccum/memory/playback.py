"""A training's first windows, as forecast, played through the simulated allocator of a device.

A training begins with an emptied cache and, most often, an optimizer without state. Its first window fills the cache,
the optimizer's state is born among what that left, and the second window runs in what both left: it is the second that
shows what a training reserves. So two windows are played, of two micro-batches each, as the traces recorded them.

The order of requests is the largest trace's, which is nearest to the sizes that are asked for, down to the staging of a
few bytes inside one kernel: a block that is 8 bytes larger than a free one is cut out of a larger one, and what is left
of that serves no equal one again. The size of each is fitted over the traces that have it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from autoaccum.memory.alignment import Cell
from autoaccum.memory.allocation_events import Event
from autoaccum.memory.allocator import Block, CachingAllocator
from autoaccum.memory.fitting import Size, volume
from autoaccum.memory.replay import Column, matrix
from autoaccum.memory.trace import Trace

__all__ = ["Playback"]

WINDOWS = 2
_FREE, _TAKE, _KEEP = range(3)


class Playback:
    """The requests of one window in the order of the largest trace, of sizes that are told when it is played.

    `sizes` (blocks × traces): bytes of each block that the largest trace allocates, to be fitted over the sizes.
    """

    def __init__(self, columns: Sequence[Column], cells: Sequence[Cell], sizes: Sequence[Size]) -> None:
        """From traces of `sizes` (batch,) or (batch, length), aligned into `cells`."""
        largest = max(range(len(sizes)), key=lambda at: volume(sizes[at]))
        trace = columns[largest].trace
        taken = [at for at, event in enumerate(trace.events) if event.bytes > 0]
        self._streams = [trace.events[at].stream for at in taken]
        shares = [volume(size) / volume(sizes[largest]) for size in sizes]
        lasting = _lasting(trace)
        # Where no other trace has the block: in proportion to the size, but for gradients and an optimizer's state.
        measured = [
            [event.bytes * (1.0 if event.block in lasting else share) for share in shares]
            for event in map(trace.events.__getitem__, taken)
        ]
        for cell in cells:
            born = [_born(column.events(span)) for column, span in zip(columns, cell.spans)]
            for at, other in enumerate(born):
                for mine, theirs in _pairs(born[largest], other):
                    measured[mine.block][at] = float(theirs.bytes)
        self.sizes = matrix(measured, len(sizes))
        self._script = _script(trace)
        self._kept = [each.bytes for each in trace.kept]

    def play(self, allocator: CachingAllocator, sizes: Sequence[int]) -> None:
        """Two windows from the cache emptied, of blocks of these `sizes` in bytes; the allocator holds what is there at
        first.

        SimulatedOutOfMemory where they do not fit under its limit.
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
                elif window == 0:
                    allocate(self._kept[at])


class _Born(NamedTuple):
    """A block that was allocated in a cell, its bytes, and whether the cell frees it."""

    block: int
    bytes: int
    brief: bool


def _born(events: Sequence[Event]) -> list[_Born]:
    """What a cell's events allocate, in order."""
    freed = {event.block for event in events if event.bytes <= 0}
    return [_Born(event.block, event.bytes, event.block in freed) for event in events if event.bytes > 0]


def _lasting(trace: Trace) -> set[int]:
    """The blocks that are made in a backward pass or by the optimizer, and outlive it."""
    phases = [trace.groups[event.group].phase for event in trace.events]
    born = {event.block: phase for event, phase in zip(trace.events, phases) if event.bytes > 0}
    freed = {event.block: phase for event, phase in zip(trace.events, phases) if event.bytes <= 0}
    made = {at for at, phase in enumerate(trace.phases) if phase.name in ("backward", "optimizer")}
    return {block for block, phase in born.items() if phase in made and freed.get(block) != phase}


def _pairs(mine: Sequence[_Born], theirs: Sequence[_Born]) -> Iterator[tuple[_Born, _Born]]:
    """The blocks of a cell in one trace with those of another: in order, or where one has more, the largest first.

    Those that outlive the cell are no partners of those that it frees. What has no partner is left out.
    """
    if [born.brief for born in mine] == [born.brief for born in theirs]:
        yield from zip(mine, theirs)
        return
    for brief in (False, True):
        of_mine, of_theirs = (
            sorted((born for born in each if born.brief == brief), key=lambda born: -born.bytes)
            for each in (mine, theirs)
        )
        yield from zip(of_mine, of_theirs)


def _script(trace: Trace) -> list[tuple[int, int]]:
    """What a window does in order: (_TAKE or _FREE, a block of the trace), or (_KEEP, what its first one keeps)."""
    kept: dict[int, list[int]] = defaultdict(list)  # by the event that it comes before
    for number, at in enumerate(_moments(trace)):
        kept[at].append(number)
    script: list[tuple[int, int]] = []
    for at, event in enumerate(trace.events):
        script += [(_KEEP, number) for number in kept[at]]
        if event.bytes > 0:
            script.append((_TAKE, event.block))
        elif event.block >= 0:
            script.append((_FREE, event.block))
    return script + [(_KEEP, number) for number in kept[len(trace.events)]]


def _moments(trace: Trace) -> Iterator[int]:
    """For each block that a first window keeps the event before which it is taken.

    That is in the first call of its operator in its phase, after as many events; where the trace has no such call, at
    the phase's beginning.
    """
    calls: dict[tuple[int, str], tuple[int, int]] = {}  # the first event of the first such call, and its group
    begins = [len(trace.events)] * len(trace.phases)
    events = Counter(event.group for event in trace.events)
    for at, event in enumerate(trace.events):
        group = trace.groups[event.group]
        calls.setdefault((group.phase, group.operator), (at, event.group))
        begins[group.phase] = min(begins[group.phase], at)
    phases = [phase.name for phase in trace.phases]
    for kept in trace.kept:
        phase = phases.index(kept.phase)
        call = calls.get((phase, kept.operator))
        yield min(begins[phase:]) if call is None else call[0] + min(kept.after, events[call[1]])
