"""The trials of a search as they come, and as a table."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from autoaccum.display.layout import columns, number, said
from autoaccum.units import format_bytes

__all__ = ["TrialLines", "table_of"]

_DUE = 2.0  # seconds between two looks at the trials
_ROWS = 20  # of the newest trials, in a table that is redrawn in place
_STYLES = {"complete": "green", "running": "cyan", "pruned": "dim", "error": "red", "killed": "red",
           "does not fit": "yellow", "diverged": "yellow"}  # fmt: skip


class TrialLines:
    """Tells of the trials as they come: a table that is redrawn in place; where there is no terminal, a line for each
    that has ended.

    `read` gives the rows, of which SearchResult.trials says what they hold; `note` is a line beside them. How long
    `n_trials` of them will take follows from those that have ended, `workers` at once.
    """

    def __init__(
        self, console: Console, read: Callable[[], Sequence[Mapping[str, Any]]], n_trials: int,
        note: str | None = None, *, workers: int = 1, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._console, self._read, self._clock, self._looked = console, read, clock, clock()
        self._n_trials, self._workers, self._note = n_trials, workers, Text(note or "", style="dim")
        self._told: set[int] = set()
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            # Drawn from the search itself and not by a thread, which would take the interpreter from the training.
            self._live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        elif note:
            console.print(self._note, soft_wrap=True)
        self.show()

    def look(self) -> None:
        """Shows what is new, unless it was looked a moment ago."""
        if self._clock() - self._looked >= _DUE:
            self.show()

    def close(self) -> None:
        """Shows how it ended, and leaves that standing; the cursor comes back also where that cannot be read."""
        try:
            self.show()
        finally:
            if self._live is not None:
                self._live.stop()

    def show(self) -> None:
        """Draws the table, or a line for each trial that has ended since the last time."""
        self._looked, rows = self._clock(), self._read()
        if self._live is not None:
            self._live.start()  # the first time
            self._live.update(self._table(rows), refresh=True)
            return
        for row in rows:
            if row["state"] != "running" and row["number"] not in self._told:
                self._told.add(row["number"])
                self._console.print(_line(row), soft_wrap=True)

    def _table(self, rows: Sequence[Mapping[str, Any]]) -> RenderableType:
        done = [row for row in rows if row["state"] not in ("running", "killed")]
        times, left = [row["seconds"] for row in done if row["seconds"] is not None], self._n_trials - len(done)
        title = Text.assemble(("Search  ", "bold"), f"{len(done)} of {self._n_trials} trials")
        if times and left > 0:
            seconds = sum(times) / len(times) * left / self._workers
            title.append(f", about {seconds:.0f} s left" if seconds < 90 else f", about {seconds / 60:.0f} min left")
        return Group(title, table_of(rows[-_ROWS:]), *([self._note] if self._note else []))


def _line(row: Mapping[str, Any]) -> Text:
    params = "  ".join(f"{name}={number(value, 4)}" for name, value in row["params"].items())
    text = Text(f"trial {row['number']:>3}  {number(row['value'], 5):>9}  ")
    text.append(f"{row['state']:<12}", style=_STYLES.get(row["state"], ""))
    text.append(f"  {_sizes(row):<12}  {_memory(row):>9}  {_time(row):>8}  {params}")
    error = row.get("error")
    return text if error is None else text.append(f"  {error['type']}: {error['message']}"[:200])


def table_of(rows: Sequence[Mapping[str, Any]], *, best: int | None = None) -> RenderableType:
    """Trials as a table: parameters, value, state, micro-batches, memory, time; the best one is marked."""
    names = list(dict.fromkeys(name for row in rows for name in row["params"]))
    cells: dict[str, Sequence[str | Text]] = {
        "trial": [Text(str(row["number"]), style="bold" if row["number"] == best else "") for row in rows],
        **{name.replace("_", " "): [number(row["params"].get(name, ""), 4) for row in rows] for name in names},
        "value": [said(row["value"], lambda value: number(value, 5)) for row in rows],
        "state": [Text(row["state"], style=_STYLES.get(row["state"], "")) for row in rows],
        "k × micro": list(map(_sizes, rows)),
        "memory": list(map(_memory, rows)),
        "time": list(map(_time, rows)),
    }
    return columns(cells)


def _sizes(row: Mapping[str, Any]) -> str:
    return "" if row["micro_batch"] is None else f"{row['accumulation_steps']} × {row['micro_batch']}"


def _memory(row: Mapping[str, Any]) -> str:
    return said(row["memory_bytes"], format_bytes)


def _time(row: Mapping[str, Any]) -> str:
    return said(row["seconds"], "{:.1f} s".format)
