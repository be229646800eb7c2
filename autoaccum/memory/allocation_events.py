"""The allocations and frees of one recorded step, kept small: a trace of a large model has tens of thousands.

A limit on the process counts what the records themselves take, so they lie in columns of machine numbers.
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

__all__ = ["Event", "Events"]


class Event(NamedTuple):
    """One allocation (bytes > 0) or free (bytes < 0). `block` numbers the allocations of the trace from 0;
    a free has its allocation's number, or -1 where that was before the recording."""

    bytes: int
    block: int
    group: int
    stream: int = 0


class Events:
    """Events in time order."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._columns = tuple(array("q") for _ in Event._fields)
        for event in events:
            self.append(event)

    def append(self, event: Event) -> None:
        """Adds an event at the end."""
        for column, value in zip(self._columns, event):
            column.append(value)

    def __len__(self) -> int:
        return len(self._columns[0])

    def __iter__(self) -> Iterator[Event]:
        return map(Event, *self._columns)

    def __getitem__(self, span: slice) -> list[Event]:
        return list(map(Event, *(column[span] for column in self._columns)))
