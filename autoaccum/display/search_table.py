"""The trials of a search: a line as each one ends, and all of them as a table."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from autoaccum.display.layout import columns, number
from autoaccum.units import format_bytes

__all__ = ["TrialLines", "table_of"]

_DUE = 2.0  # seconds between two looks for ended trials
_STYLES = {"complete": "green", "running": "cyan", "pruned": "dim", "error": "red", "killed": "red",
           "does not fit": "yellow", "diverged": "yellow"}  # fmt: skip


class TrialLines:
    """Tells of each trial that has ended; `read` gives the rows, of which SearchResult.trials says what they hold."""

    def __init__(
        self, console: Console, read: Callable[[], Sequence[Mapping[str, Any]]], note: str | None = None,
        *, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._console, self._read, self._clock, self._looked = console, read, clock, clock()
        self._told: set[int] = set()
        if note:
            console.print(Text(note, style="dim"), soft_wrap=True)
        self.show()

    def look(self) -> None:
        """Shows what is new, unless it was looked a moment ago."""
        if self._clock() - self._looked >= _DUE:
            self.show()

    def show(self) -> None:
        """A line for each trial that has ended since the last time."""
        self._looked = self._clock()
        for row in self._read():
            if row["state"] != "running" and row["number"] not in self._told:
                self._told.add(row["number"])
                self._console.print(_line(row), soft_wrap=True)


def _line(row: Mapping[str, Any]) -> Text:
    params = "  ".join(f"{name}={number(value, 4)}" for name, value in row["params"].items())
    text = Text(f"trial {row['number']:>3}  {number(row['value'], 5):>9}  ")
    text.append(f"{row['state']:<12}", style=_STYLES.get(row["state"], ""))
    text.append(f"  {_sizes(row):<12}  {params}")
    error = row.get("error")
    return text if error is None else text.append(f"  {error['type']}: {error['message']}"[:200])


def table_of(rows: Sequence[Mapping[str, Any]], *, best: int | None = None) -> RenderableType:
    """Trials as a table: parameters, value, state, micro-batches, memory, time; the best one is marked."""
    names = list(dict.fromkeys(name for row in rows for name in row["params"]))
    cells: dict[str, Sequence[str | Text]] = {
        "trial": [Text(str(row["number"]), style="bold" if row["number"] == best else "") for row in rows],
        **{name.replace("_", " "): [number(row["params"].get(name, ""), 4) for row in rows] for name in names},
        "value": ["" if row["value"] is None else number(row["value"], 5) for row in rows],
        "state": [Text(row["state"], style=_STYLES.get(row["state"], "")) for row in rows],
        "k × micro": list(map(_sizes, rows)),
        "memory": ["" if row["memory_bytes"] is None else format_bytes(row["memory_bytes"]) for row in rows],
        "time": ["" if row["seconds"] is None else f"{row['seconds']:.1f} s" for row in rows],
    }
    return columns(cells)


def _sizes(row: Mapping[str, Any]) -> str:
    return "" if row["micro_batch"] is None else f"{row['accumulation_steps']} × {row['micro_batch']}"
