"""Aligned traces as one table, and a training's first windows played through the simulated allocator of a device.

The table has a row for each moment of the window, a column for each trace. A cell whose allocations and frees agree one
by one in all traces gives a row for each of them. Any other cell gives two rows: the most it held inside, and what it
left behind. The sum of a column down to a row is the memory in use there, so whatever is fitted to the rows can be
replayed by adding them up. Changes say whose the memory is: by how much a part, such as the gradients, grows at a row.

A training begins with an emptied cache and, most often, an optimizer without state. Its first window fills the cache,
the optimizer's state is born among what that left, and the second window runs in what both left: it is the second that
shows what a training reserves. So two windows are played, of two micro-batches each, as the traces recorded them. The
order of requests is the largest trace's, which is nearest to the sizes that are asked for, down to the staging of a few
bytes inside one kernel: a block that is 8 bytes larger than a free one is cut out of a larger one, and what is left of
that serves no equal one again. The size of each is fitted over the traces that have it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, repeat
from typing import NamedTuple

import torch

from autoaccum.memory.alignment import Cell
from autoaccum.memory.allocator import Block, CachingAllocator
from autoaccum.memory.fitting import Size, volume
from autoaccum.memory.trace import Event, Trace

__all__ = ["Column", "Playback", "Table", "matrix", "tabulate"]

WINDOWS = 2
_FREE, _TAKE, _KEEP = range(3)
_NEW, _OLDER = -1, -2  # where the block of an event is from: it is made there, or older than the trace


@dataclass
class Table:
    """`deltas` (rows × traces) and `sizes` (changes × traces) are bytes in float64, exact below 2⁵³.

    `phases` has that of each row; `changes` have a part and the row at which it grows or shrinks by a size.
    """

    phases: list[int]
    changes: list[tuple[str, int]]
    deltas: torch.Tensor
    sizes: torch.Tensor


class Column:
    """One trace while it is tabulated."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.parts = trace, trace.parts()
        self._births = [_OLDER] * len(self.parts)  # the row that each block was made at
        self.starts: list[int] = []  # the first event of each group, and where the last one ends
        for at, event in enumerate(trace.events):
            if event.group == len(self.starts):
                self.starts.append(at)
        self.starts.append(len(trace.events))

    def events(self, span: tuple[int, int]) -> Sequence[Event]:
        """Those of the groups [start, stop)."""
        return self.trace.events[self.starts[span[0]] : self.starts[span[1]]]

    def origins(self, events: Sequence[Event], rows: Iterable[int]) -> list[int]:
        """The row at which the block of each event was made; notes the rows at which these make one."""
        found = []
        for event, row in zip(events, rows):
            found.append(_NEW if event.bytes > 0 else self._births[event.block] if event.block >= 0 else _OLDER)
            if event.bytes > 0:
                self._births[event.block] = row
        return found


def tabulate(columns: Sequence[Column], cells: Sequence[Cell]) -> Table:
    """The table of traces that were aligned into `cells`."""
    phases: list[int] = []
    deltas: list[list[int]] = []
    changes: dict[tuple[str, int], list[int]] = {}
    for cell in cells:
        events = [column.events(span) for column, span in zip(columns, cell.spans)]
        if not any(events):
            continue
        owner, at = next((column, span[0]) for column, span in zip(columns, cell.spans) if span[1] > span[0])
        first = len(phases)
        origins = [column.origins(found, count(first)) for column, found in zip(columns, events)]
        alike = all(each == origins[0] for each in origins)
        if alike:
            rows = [[event.bytes for event in together] for together in zip(*events)]
        else:
            courses = [list(accumulate((event.bytes for event in found), initial=0)) for found in events]
            rows = [[max(course) for course in courses], [course[-1] - max(course) for course in courses]]
        for number, (column, found) in enumerate(zip(columns, events)):
            if not alike:
                column.origins(found, repeat(first + 1))
            for event, row in zip(found, count(first) if alike else repeat(first + 1)):
                part = "temporary" if event.block < 0 else column.parts[event.block]
                if part != "temporary":  # which is all the rest
                    changes.setdefault((part, row), [0] * len(columns))[number] += event.bytes
        deltas += rows
        phases += [owner.trace.groups[at].phase] * len(rows)
    return Table(phases, list(changes), matrix(deltas, len(columns)), matrix(list(changes.values()), len(columns)))


def matrix(values: Sequence[Sequence[float]], columns: int) -> torch.Tensor:
    """Rows of bytes as a float64 tensor, (rows × columns) also where there are none."""
    return torch.tensor(values, dtype=torch.float64, device="cpu").reshape(len(values), columns)


class Playback:
    """The requests of one window in the order of the largest trace, of sizes that are told when it is played.

    `sizes` (blocks × traces): bytes of each block that the largest trace allocates, to be fitted over the sizes.
    """

    def __init__(self, columns: Sequence[Column], cells: Sequence[Cell], sizes: Sequence[Size]) -> None:
        """From traces of `sizes` (batch,) or (batch, length), aligned into `cells`."""
        largest = max(range(len(sizes)), key=lambda at: volume(sizes[at]))
        trace = columns[largest].trace
        taken = [event for event in trace.events if event.bytes > 0]
        self._streams = [event.stream for event in taken]
        shares = [volume(size) / volume(sizes[largest]) for size in sizes]
        # Where no other trace has the block: in proportion to the size, but for gradients and an optimizer's state.
        measured = [
            [event.bytes * (1.0 if part in ("gradients", "optimizer_state") else share) for share in shares]
            for event, part in zip(taken, columns[largest].parts)
        ]
        for cell in cells:
            born = [_born(column.events(span)) for column, span in zip(columns, cell.spans)]
            for at, other in enumerate(born):
                for mine, theirs in _pairs(born[largest], other):
                    measured[mine.block][at] = float(theirs.bytes)
        self.sizes = matrix(measured, len(sizes))
        self._script = _script(columns[largest])

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
            for what, number in self._script:
                if what == _TAKE:
                    if sizes[number] > 0:
                        before = blocks.get(number)
                        blocks[number] = allocate(sizes[number], streams[number])
                        if before is not None:  # of the window before, which this one replaces
                            free(before)
                elif what == _FREE:
                    block = blocks.pop(number, None)
                    if block is not None:
                        free(block)
                elif window == 0:
                    allocate(number)


class _Born(NamedTuple):
    """A block that was allocated in a cell, its bytes, and whether the cell frees it."""

    block: int
    bytes: int
    brief: bool


def _born(events: Sequence[Event]) -> list[_Born]:
    """What a cell's events allocate, in order."""
    freed = {event.block for event in events if event.bytes <= 0}
    return [_Born(event.block, event.bytes, event.block in freed) for event in events if event.bytes > 0]


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


def _script(column: Column) -> list[tuple[int, int]]:
    """What a window does in order: (_TAKE or _FREE, a block of the trace); (_KEEP, bytes) where it is the first."""
    trace = column.trace
    kept: dict[int, list[int]] = defaultdict(list)  # by the event that it comes before
    for each, at in zip(trace.kept, _moments(column)):
        kept[at].append(each.bytes)
    script: list[tuple[int, int]] = []
    for at, event in enumerate(trace.events):
        script += [(_KEEP, size) for size in kept[at]]
        if event.block >= 0:
            script.append((_TAKE if event.bytes > 0 else _FREE, event.block))
    return script + [(_KEEP, size) for size in kept[len(trace.events)]]


def _moments(column: Column) -> Iterator[int]:
    """For each block that a first window keeps the event before which it is taken.

    That is in the first call of its operator in its phase, after as many events; where the trace has no such call, at
    the phase's beginning.
    """
    trace, starts = column.trace, column.starts
    calls: dict[tuple[int, str], int] = {}
    for number, group in enumerate(trace.groups):
        calls.setdefault((group.phase, group.operator), number)
    phases = [phase.name for phase in trace.phases]
    for kept in trace.kept:
        phase = phases.index(kept.phase)
        call = calls.get((phase, kept.operator))
        if call is None:
            yield starts[trace.phases[phase].first_group]
        else:
            yield min(starts[call] + kept.after, starts[call + 1])
