"""Which groups of several traces are the same operator call.

At two batch sizes a step calls the same operators in the same order, almost always. Where it does not:

- What agrees before and after is matched (a kernel of another algorithm lies between: a reduction that stages its
  partial sums, an embedding's backward), and the stretch between becomes one cell of its own. How much was allocated
  in such stretches is handed back, not hidden.
- Where more than a hundredth of the bytes stays unmatched so, short agreements are taken for chance, and loops are
  looked for: one that runs more often (over the samples, or over the time steps of a recurrent layer) is found as a
  pattern that repeats, and becomes one cell, however often it ran. Not before, since a model's equal layers are such a
  pattern as well: as one cell they would match nothing where a single one of them differs, and nothing of their order
  would be left for an allocator.

A cell's net and inside figures follow the size as an operator's do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from autoaccum.memory.trace import Trace

__all__ = ["MOST_UNMATCHED", "Cell", "ForecastFailed", "align"]

MOST_UNMATCHED = 0.01  # of a trace's allocated bytes, up to which nothing better is looked for

_MOST_DIFFERENCES = 1000  # the search for common groups takes this squared; beyond, only both ends are matched
_LONGEST_PATTERN = 400  # groups in one turn of a loop
_SHORTEST_LOOP = 4  # groups in all turns together; shorter ones are as likely chance
# Fewer agreeing groups than this between two stretches may agree by chance: they join them. Where all that is unmatched
# weighs next to nothing, so does what chance matched.
_SHORTEST_RUN = 3

_Key = tuple[str, str]  # a group by the names of its operators
_Items = Callable[[Sequence[_Key]], list[tuple[object, int]]]  # what is matched: a name and its first group


class ForecastFailed(Exception):
    """The traces do not carry a forecast; the caller moves to larger sizes, or runs steps until one does not fit."""


class Cell(NamedTuple):
    """Groups [start, stop) of each trace that stand for the same, one in each or one loop; not `matched`: a stretch
    between.
    """

    spans: tuple[tuple[int, int], ...]
    matched: bool


def align(traces: Sequence[Trace]) -> tuple[list[Cell], float]:
    """The cells in time order, and the largest share of a trace's allocated bytes that lies in unmatched ones.

    A ForecastFailed where the traces went through different phases.
    """
    names = [tuple(phase.name for phase in trace.phases) for trace in traces]
    if len(set(names)) > 1:
        raise ForecastFailed(f"the traces went through different phases: {' against '.join(map(str, set(names)))}")
    plain = _align(traces, _single, shortest=1)
    if plain[1] <= MOST_UNMATCHED:
        return plain
    careful = (_align(traces, items, shortest=_SHORTEST_RUN) for items in (_loops, _single))
    return min(careful, key=lambda found: found[1])


def _align(traces: Sequence[Trace], items: _Items, *, shortest: int) -> tuple[list[Cell], float]:
    """As `align`, where `items` (groups one by one, or loops as well) are matched.

    In fewer than `shortest` agreeing items between two stretches no agreement is seen.
    """
    cells: list[Cell] = []
    starts = [[*(phase.first_group for phase in trace.phases), len(trace.groups)] for trace in traces]
    for phase in range(len(traces[0].phases)):
        bounds = [(start[phase], start[phase + 1]) for start in starts]
        keys = [
            [(group.innermost, group.operator) for group in trace.groups[start:stop]]
            for trace, (start, stop) in zip(traces, bounds)
        ]
        cells += _cells([start for start, _ in bounds], keys, items, shortest)
    spans = ([cell.spans[at] for cell in cells if not cell.matched] for at in range(len(traces)))
    return cells, max(map(_unmatched, traces, spans))


def _cells(starts: list[int], keys: list[list[_Key]], items: _Items, shortest: int) -> list[Cell]:
    """One phase's cells. `keys`: each trace's groups by name; `starts`: the number of its first group."""
    base = keys[0]
    if all(other == base for other in keys[1:]):
        return [Cell(tuple((start + at, start + at + 1) for start in starts), True) for at in range(len(base))]
    named = [items(each) for each in keys]
    names = [[name for name, _ in each] for each in named]
    firsts = [[*(first for _, first in each), len(every)] for each, every in zip(named, keys)]
    ends = tuple(map(len, names))
    cells: list[Cell] = []
    here = (0,) * len(keys)

    def add(there: tuple[int, ...], matched: bool) -> None:
        """A cell from `here` until `there`, counted in loops and groups outside of loops."""
        bounds = zip(starts, firsts, here, there)
        cells.append(Cell(tuple((start + each[a], start + each[b]) for start, each, a, b in bounds), matched))

    for there in [*_long_runs(_anchors(names), ends, shortest), ends]:
        if there != here:
            add(there, False)
            here = there
        if there != ends:
            after = tuple(at + 1 for at in there)
            add(after, True)
            here = after
    return cells


def _single(keys: Sequence[_Key]) -> list[tuple[object, int]]:
    """Each group by itself."""
    return [(key, at) for at, key in enumerate(keys)]


def _loops(keys: Sequence[_Key]) -> list[tuple[object, int]]:
    """The groups with repeating patterns put together.

    A loop is named by the operators in it, not by their order: where its first turn begins may differ.
    """
    found: list[tuple[object, int]] = []
    at = 0
    while at < len(keys):
        stop, pattern = at + 1, 0
        for length in range(1, min(_LONGEST_PATTERN, (len(keys) - at) // 2) + 1):
            if keys[at] != keys[at + length] or keys[at : at + length] != keys[at + length : at + 2 * length]:
                continue
            end = at + length
            while keys[end : end + length] == keys[at : at + length]:
                end += length
            if end > stop and end - at >= _SHORTEST_LOOP:
                stop, pattern = end, length
        name = frozenset(keys[at : at + pattern]) if pattern else keys[at]
        found.append((name, at))
        at = stop
    return found


def _anchors(names: list[list[object]]) -> list[tuple[int, ...]]:
    """Positions that match in all traces."""
    partners = [dict(common(names[0], other)) for other in names[1:]]
    return [
        (at, *(partner[at] for partner in partners))
        for at in range(len(names[0]))
        if all(at in partner for partner in partners)
    ]


def _long_runs(anchors: list[tuple[int, ...]], ends: tuple[int, ...], shortest: int) -> list[tuple[int, ...]]:
    """The anchors without those in runs below `shortest`; one that touches the phase's start or end is never short."""
    kept: list[tuple[int, ...]] = []
    for _, numbered in groupby(enumerate(anchors), key=lambda pair: [at - pair[0] for at in pair[1]]):
        run = [anchor for _, anchor in numbered]
        edge = not any(run[0]) or all(at + 1 == end for at, end in zip(run[-1], ends))
        if edge or len(run) >= shortest:
            kept += run
    return kept


def _unmatched(trace: Trace, spans: list[tuple[int, int]]) -> float:
    inside = {group for start, stop in spans for group in range(start, stop)}
    allocated = sum(event.bytes for event in trace.events if event.bytes > 0)
    return sum(event.bytes for event in trace.events if event.bytes > 0 and event.group in inside) / max(1, allocated)


def common(first: Sequence[object], second: Sequence[object]) -> list[tuple[int, int]]:
    """Positions of a longest common subsequence of two sequences, in order.

    Myers, "An O(ND) difference algorithm and its variations" (1986), between what agrees at both ends; where
    more than 1000 items differ, only that.
    """
    head = 0
    while head < min(len(first), len(second)) and first[head] == second[head]:
        head += 1
    tail = 0
    while tail < min(len(first), len(second)) - head and first[-1 - tail] == second[-1 - tail]:
        tail += 1
    middle = _myers(first[head : len(first) - tail], second[head : len(second) - tail])
    return [
        *((at, at) for at in range(head)),
        *((head + a, head + b) for a, b in middle),
        *((len(first) - tail + at, len(second) - tail + at) for at in range(tail)),
    ]


def _myers(first: Sequence[object], second: Sequence[object]) -> list[tuple[int, int]]:
    # By diagonal (position in first minus in second): the longest prefix of `first` reached on it, and the runs of
    # equal items on the way there, the last first: (those before, start in first, stop, diagonal).
    furthest: dict[int, tuple[int, Any]] = {1: (0, None)}
    for differences in range(min(len(first) + len(second), _MOST_DIFFERENCES) + 1):
        for diagonal in range(-differences, differences + 1, 2):
            above, below = furthest.get(diagonal + 1, (-1, None)), furthest.get(diagonal - 1, (-1, None))
            at, runs = above if diagonal == -differences or below[0] < above[0] else (below[0] + 1, below[1])
            start = at
            while at < len(first) and at - diagonal < len(second) and first[at] == second[at - diagonal]:
                at += 1
            furthest[diagonal] = at, runs if at == start else (runs, start, at, diagonal)
            if at >= len(first) and at - diagonal >= len(second):
                found: list[tuple[int, int]] = []
                runs = furthest[diagonal][1]
                while runs is not None:
                    runs, start, stop, on = runs
                    found = [(at, at - on) for at in range(start, stop)] + found
                return found
    return []
