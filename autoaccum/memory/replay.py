"""Aligned traces as one table: a row for each moment of the window, a column for each trace.

A cell whose allocations and frees agree one by one in all traces gives a row for each of them. Any other
cell gives two rows: the most it held inside, and what it left behind. The sum of a column down to a row is
the memory in use there, so whatever is fitted to the rows can be replayed by adding them up.

A flow is a block, or several, that lives from one row to another: what is in use at a row is what was born
at or before it and dies after it. Flows say whose the memory at the peak is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from autoaccum.memory.alignment import Cell
from autoaccum.memory.allocation_events import Event
from autoaccum.memory.trace import Trace

__all__ = ["Column", "Flow", "Table", "matrix", "tabulate"]

FOREVER = 2**62


class Flow(NamedTuple):
    """Memory that lives from row `birth` until row `death` (FOREVER: it was not freed), and what it is."""

    birth: int
    death: int
    part: str


@dataclass
class Table:
    """`deltas` (rows × traces) and `sizes` (flows × traces) are bytes in float64, exact below 2⁵³.

    `phases` has that of each row.
    """

    phases: list[int]
    flows: list[Flow]
    deltas: torch.Tensor
    sizes: torch.Tensor


class Column:
    """One trace while it is tabulated."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.births = [-1] * sum(event.bytes > 0 for event in trace.events)  # the row each block was born at,
        self.deaths = [FOREVER] * len(self.births)  # and died at
        self.released: dict[int, int] = {}  # row -> bytes freed there that are older than the trace
        self._starts: list[int] = []  # the first event of each group
        for at, event in enumerate(trace.events):
            if event.group == len(self._starts):
                self._starts.append(at)
        self._starts.append(len(trace.events))

    def events(self, span: tuple[int, int]) -> Sequence[Event]:
        """Those of the groups [start, stop)."""
        return self.trace.events[self._starts[span[0]] : self._starts[span[1]]]


def tabulate(columns: Sequence[Column], cells: Sequence[Cell]) -> Table:
    """The table of traces that were aligned into `cells`."""
    phases: list[int] = []
    deltas: list[list[int]] = []
    for cell in cells:
        events = [column.events(span) for column, span in zip(columns, cell.spans)]
        if not any(events):
            continue
        owner, at = next((column, span[0]) for column, span in zip(columns, cell.spans) if span[1] > span[0])
        phase = owner.trace.groups[at].phase
        if _alike(columns, events, len(phases)):
            rows = [[event.bytes for event in together] for together in zip(*events)]
        else:
            inside, net = zip(*(_figures(column, found, len(phases) + 1) for column, found in zip(columns, events)))
            rows = [list(inside), [after - most for most, after in zip(inside, net)]]
        deltas += rows
        phases += [phase] * len(rows)
    flows, sizes = _flows(columns, phases)
    return Table(phases, flows, matrix(deltas, len(columns)), matrix(sizes, len(columns)))


def _alike(columns: Sequence[Column], events: Sequence[Sequence[Event]], row: int) -> bool:
    """Whether all traces allocate and free alike here; notes births and deaths, from `row` on, on the way."""
    if any(len(found) != len(events[0]) for found in events):
        return False
    for at, together in enumerate(zip(*events)):
        origins = set[int]()
        for column, event in zip(columns, together):
            if event.bytes > 0:
                origins.add(FOREVER)
                column.births[event.block] = row + at
            elif event.block >= 0:
                origins.add(column.births[event.block])
                column.deaths[event.block] = row + at
            else:
                origins.add(-1)
        if len(origins) > 1:
            return False
    for column, found in zip(columns, events):
        for at, event in enumerate(found):
            if event.block < 0:
                column.released[row + at] = event.bytes
    return True


def _figures(column: Column, events: Sequence[Event], row: int) -> tuple[int, int]:
    """The most held inside a stretch and what it left behind; births and deaths are noted (anew) at `row`."""
    net = inside = 0
    for event in events:
        net += event.bytes
        inside = max(inside, net)
        if event.bytes > 0:
            column.births[event.block] = row
        elif event.block >= 0:
            column.deaths[event.block] = row
        else:
            column.released[row] = column.released.get(row, 0) + event.bytes
    return inside, net


def _flows(columns: Sequence[Column], of_rows: Sequence[int]) -> tuple[list[Flow], list[list[int]]]:
    found: dict[tuple[int, int, bool], list[int]] = {}
    for at, column in enumerate(columns):
        for event in column.trace.events:
            if event.bytes > 0:
                key = (column.births[event.block], column.deaths[event.block], False)
                found.setdefault(key, [0] * len(columns))[at] += event.bytes
        for row, size in column.released.items():
            found.setdefault((row, FOREVER, True), [0] * len(columns))[at] += size
    phases = [phase.name for phase in columns[0].trace.phases]
    flows: list[Flow] = []
    for birth, death, released in found:
        last = of_rows[death] if death < FOREVER else len(phases)
        part = "released" if released else _part(phases[of_rows[birth]], last > of_rows[birth])
        flows.append(Flow(birth, death, part))
    return flows, list(found.values())


def _part(phase: str, outlives: bool) -> str:
    """What memory is, told from the phase it was allocated in and whether it outlives it."""
    if not outlives:
        return "temporary"
    return {"batch": "batch", "backward": "gradients", "optimizer": "optimizer_state"}.get(phase, "activations")


def matrix(values: Sequence[Sequence[float]], columns: int) -> torch.Tensor:
    """Rows of bytes as a float64 tensor, (rows × columns) also where there are none."""
    return torch.tensor(values, dtype=torch.float64, device="cpu").reshape(len(values), columns)
