"""What runs by while a command works: a line for every trial, and a bar (or a line now and then) for training.

A bar appears only on a terminal. It is redrawn from the training loop itself, at most four times a second, and not from
a thread of its own: a thread would take the interpreter from the loop in the middle of its steps.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from autoaccum.display.layout import number, outcome_style
from autoaccum.units import format_bytes

__all__ = ["TrainingProgress", "trial_line"]

_REDRAW = 0.25  # seconds between two drawings of the bar
_LINE = 10.0  # seconds between two lines where there is no bar


def trial_line(trial: Mapping[str, Any]) -> Text:
    """One line for a Trial's `to_dict()`."""
    peak, seconds = trial.get("peak_bytes"), trial.get("seconds")
    memory = "" if peak is None else format_bytes(peak)
    line = Text("  ").append(f"{trial.get('kind', ''):<10}", style="dim").append(f" batch {trial['batch']:>6}")
    line.append(f" × {trial['length']:<5}" if trial.get("length") else "")
    line.append(f"  {memory:>11}").append(f"  {seconds:6.2f} s" if seconds is not None else "", style="dim")
    return line.append(f"  {trial.get('outcome', '')}", style=outcome_style(trial.get("outcome")))


class TrainingProgress:
    """The training as it goes: step, loss, learning rate, samples a second, memory against the budget.

    `total_steps` is None where nobody knows, `resumed_at` the steps taken before this run; `clock` tells seconds.
    """

    def __init__(
        self,
        console: Console,
        total_steps: int | None,
        budget_bytes: int | None = None,
        *,
        resumed_at: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._total, self._budget, self._clock = console, total_steps, budget_bytes, clock
        self._drawn: float | None = None
        self._last: Any = None  # the newest record, if it is not drawn yet
        self._bar: Progress | None = None
        self._task, self._wait = TaskID(0), _LINE
        if console.is_terminal and not console.is_dumb_terminal:
            self._wait = _REDRAW
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=12),
                TimeRemainingColumn(),
                # Cut where the terminal is narrow: a bar over two lines cannot be redrawn in place.
                TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
                console=console,
                auto_refresh=False,
                expand=True,
            )
            self._task = self._bar.add_task("step", total=total_steps, completed=resumed_at, figures="")
            self._bar.start()

    def close(self) -> None:
        """Draws the last step, and ends the bar."""
        if self._last is not None:
            self._draw(self._last)
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def step(self, record: Any) -> None:
        """Shows a StepRecord, unless something was drawn a moment ago: most steps draw nothing."""
        now = self._clock()
        if self._drawn is None or now - self._drawn >= self._wait:
            self._drawn = now
            self._draw(record)
        else:
            self._last = record

    def evaluation(self, values: Mapping[str, Any]) -> None:
        """A line with the values of an evaluation."""
        shown = "  ".join(f"{name} {number(value, 4)}" for name, value in values.items())
        self._console.print(Text("evaluation  ", style="bold").append(shown, style="not bold"), soft_wrap=True)

    def _draw(self, record: Any) -> None:
        self._last = None
        step = f"step {record.step}" + ("" if self._total is None else f"/{self._total}")
        figures = self._figures(record)
        if self._bar is None:
            self._console.print(Text(f"{step}  {figures}"), soft_wrap=True)
        else:
            self._bar.update(self._task, completed=record.step, description=step, figures=figures)
            self._bar.refresh()

    def _figures(self, record: Any) -> str:
        shown = [f"loss {number(record.loss, 4)}", f"lr {number(record.lr, 4)}"]
        if speed := record.samples_per_second:
            shown.append(f"{speed:,.0f} samples/s" if speed >= 100 else f"{speed:.3g} samples/s")
        if peak := record.peak_bytes:
            share = f" of {format_bytes(self._budget)}" if self._budget else ""
            shown.append(format_bytes(peak) + share)
        return "  ".join(shown)
