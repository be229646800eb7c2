"""The trials of a search as they come: a table on a terminal, redrawn in place; elsewhere a line at each one's end."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from autoaccum.display.layout import number, table_with
from autoaccum.units import format_bytes

__all__ = ["SearchTable", "table_of"]

_DUE = 0.5  # seconds between two drawings on a terminal
_DUE_LINES = 2.0  # and between two looks for ended trials elsewhere
_ROWS = 16  # trials in the live table: those that run, the best, and the newest
_ENDED = ("complete", "pruned", "does not fit", "diverged", "error", "killed")
_STYLES = {"complete": "green", "running": "cyan", "pruned": "dim", "error": "red", "killed": "red",
           "does not fit": "yellow", "diverged": "yellow"}  # fmt: skip


class SearchTable:
    """Draws the rows of a search; see `SearchResult.trials` for what a row holds.

    `workers` train at once, which tells the time left; `note` is a line below the table; `clock` tells seconds.
    """

    def __init__(
        self,
        console: Console,
        n_trials: int,
        direction: str,
        *,
        workers: int = 1,
        note: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._n_trials, self._sign = console, n_trials, 1 if direction == "minimize" else -1
        self._workers, self._note, self._clock = workers, note, clock
        self._drawn: float | None = None
        self._told: set[int] = set()
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            # Redrawn from the search itself and not by a thread, which would take the interpreter from the training.
            self._live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._live.start()

    def close(self) -> None:
        """Leaves the table as it was drawn last."""
        if self._live is not None:
            self._live.stop()

    def is_due(self) -> bool:
        """Whether enough time has passed since the last drawing."""
        wait = _DUE if self._live is not None else _DUE_LINES
        return self._drawn is None or self._clock() - self._drawn >= wait

    def show(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Draws what has become of the trials."""
        first, self._drawn = self._drawn is None, self._clock()
        if self._live is not None:
            self._live.update(self._table(rows), refresh=True)
            return
        if first and self._note:
            self._console.print(Text(self._note, style="dim"), soft_wrap=True)
        for row in rows:
            if row["state"] in _ENDED and row["number"] not in self._told:
                self._told.add(row["number"])
                self._console.print(self._line(row), soft_wrap=True)

    def _line(self, row: Mapping[str, Any]) -> Text:
        params = "  ".join(f"{name}={number(value, 4)}" for name, value in row["params"].items())
        text = Text(f"trial {row['number']:>3}  {number(row['value'], 5):>9}  ")
        text.append(f"{row['state']:<12}", style=_STYLES.get(row["state"], ""))
        text.append(f"  {_sizes(row):<12}  {params}")
        error = row.get("error")
        return text if error is None else text.append(f"  {error['type']}: {error['message']}"[:200])

    def _table(self, rows: Sequence[Mapping[str, Any]]) -> RenderableType:
        done = [row for row in rows if row["state"] in _ENDED and row["state"] != "killed"]
        title = Text.assemble(("Search  ", "bold"), f"{len(done)} of {self._n_trials} trials", self._left(done))
        blocks = [title, table_of(self._chosen(rows), best=self._best(rows))]
        return Group(*blocks, *([Text(self._note, style="dim")] if self._note else []))

    def _left(self, done: Sequence[Mapping[str, Any]]) -> str:
        times = [row["seconds"] for row in done if row["seconds"] is not None]
        left = self._n_trials - len(done)
        if not times or left <= 0:
            return ""
        seconds = sum(times) / len(times) * left / self._workers
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"

    def _best(self, rows: Sequence[Mapping[str, Any]]) -> int | None:
        complete = [row for row in rows if row["state"] == "complete"]
        best = min(complete, key=lambda row: (self._sign * row["value"], row["number"]), default=None)
        return None if best is None else best["number"]

    def _chosen(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The running ones, the best, and of the others the newest, by number."""
        best = self._best(rows)
        first = [row for row in rows if row["state"] == "running" or row["number"] == best]
        others = [row for row in rows if row not in first]
        room = max(0, _ROWS - len(first))
        return sorted([*first, *others[len(others) - room :]], key=lambda row: row["number"])


def table_of(rows: Sequence[Mapping[str, Any]], *, best: int | None = None) -> RenderableType:
    """Trials as a table: parameters, value, state, micro-batches, memory, time; the best one is marked."""
    names = list(dict.fromkeys(name for row in rows for name in row["params"]))
    table = table_with("trial", *(name.replace("_", " ") for name in names), "value")
    table.add_column("state", no_wrap=True)
    for name in ("k × micro", "memory", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        memory, seconds = row["memory_bytes"], row["seconds"]
        table.add_row(
            str(row["number"]),
            *(number(row["params"][name], 4) if name in row["params"] else "" for name in names),
            number(row["value"], 5) if row["value"] is not None else "",
            Text(row["state"], style=_STYLES.get(row["state"], "")),
            _sizes(row),
            "" if memory is None else format_bytes(memory),
            "" if seconds is None else f"{seconds:.1f} s",
            style="bold" if row["number"] == best else "",
        )
    return table


def _sizes(row: Mapping[str, Any]) -> str:
    return "" if row["micro_batch"] is None else f"{row['accumulation_steps']} × {row['micro_batch']}"
