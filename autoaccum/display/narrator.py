"""A listener that shows a training as it happens: trials, the plan with its reasons, progress, what went wrong.

It knows events by their `name` and their plain values only, and writes to stderr: stdout belongs to results. A bar
appears only on a terminal. It is redrawn from the training loop itself, at most four times a second, and not from a
thread of its own: a thread would take the interpreter from the loop in the middle of its steps.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from autoaccum.display.layout import number, open_console, outcome_style, said
from autoaccum.display.terminal import plan_view
from autoaccum.units import format_bytes

__all__ = ["Narrator", "TrainingProgress", "trial_line"]

_REDRAW = 0.25  # seconds between two drawings of the bar
_LINE = 10.0  # seconds between two lines where there is no bar


def trial_line(trial: Mapping[str, Any]) -> Text:
    """One line for a Trial's `to_dict()`."""
    memory, seconds = said(trial.get("peak_bytes"), format_bytes), said(trial.get("seconds"), "  {:6.2f} s".format)
    line = Text("  ").append(f"{trial.get('kind', ''):<10}", style="dim").append(f" batch {trial['batch']:>6}")
    line.append(f" × {trial['length']:<5}" if trial.get("length") else "")
    line.append(f"  {memory:>11}").append(seconds, style="dim")
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
        shown = [f"loss {number(record.loss, 4)}", f"lr {number(record.lr, 4)}"]
        if speed := record.samples_per_second:
            shown.append(f"{speed:,.0f} samples/s" if speed >= 100 else f"{speed:.3g} samples/s")
        if peak := record.peak_bytes:
            share = f" of {format_bytes(self._budget)}" if self._budget else ""
            shown.append(format_bytes(peak) + share)
        figures = "  ".join(shown)
        if self._bar is None:
            self._console.print(Text(f"{step}  {figures}"), soft_wrap=True)
        else:
            self._bar.update(self._task, completed=record.step, description=step, figures=figures)
            self._bar.refresh()


class Narrator:
    """Tells a person what is going on; a function of events."""

    def __init__(self, *, bar: bool = True) -> None:
        """Draws on stderr; without a `bar` where somebody else shows the progress."""
        self._console = open_console()
        self._progress: TrainingProgress | None = None
        self._bar = bar

    def __call__(self, event: Any) -> None:
        """Shows one event."""
        name, progress = event.name, self._progress
        if name == "step":
            if progress is not None:
                progress.step(event.record)
        elif name == "trial":
            self._console.print(trial_line(event.to_dict()["trial"]), soft_wrap=True)
        elif name == "start":
            self._console.print(plan_view(event.plan))
            if self._bar:
                self._progress = TrainingProgress(
                    self._console, event.total_steps, event.budget_bytes, resumed_at=event.resumed_at
                )
        elif name == "epoch":
            if event.evaluation and progress is not None:
                progress.evaluation({"epoch": event.epoch, **event.evaluation})
        elif name == "end":
            self.close()
        elif name in ("replay", "skip", "note"):
            left_out = f"step {event.step + 1} left out: " if name == "skip" else ""
            self._console.print(Text(f"{left_out}{event.text}", style="yellow"), soft_wrap=True)

    def close(self) -> None:
        """Ends the progress bar, also where the training was interrupted."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None
