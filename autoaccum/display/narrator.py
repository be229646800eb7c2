"""A listener that shows a training as it happens: trials, the plan with its reasons, progress, what went wrong.

It knows events by their `name` and their plain values only, and writes to stderr: stdout belongs to results.
"""

from typing import Any

from rich.console import Console
from rich.text import Text

from autoaccum.display.layout import open_console
from autoaccum.display.progress import TrainingProgress, trial_line
from autoaccum.display.terminal import plan_view

__all__ = ["Narrator"]


class Narrator:
    """Tells a person what is going on; a function of events."""

    def __init__(self, console: Console | None = None, *, bar: bool = True) -> None:
        """Draws on `console`, or on stderr; without a `bar` where somebody else shows the progress."""
        self._console = console if console is not None else open_console()
        self._progress: TrainingProgress | None = None
        self._bar = bar

    def __call__(self, event: Any) -> None:
        """Shows one event."""
        if event.name == "step":
            if self._progress is not None:
                self._progress.step(event.record)
        elif event.name in ("trial", "start", "replay", "skip", "note", "epoch", "end"):
            self._show(event.name, event.to_dict())

    def close(self) -> None:
        """Ends the progress bar, also where the training was interrupted."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def _show(self, name: str, event: dict[str, Any]) -> None:
        if name == "trial":
            self._console.print(trial_line(event["trial"]), soft_wrap=True)
        elif name == "start":
            self._console.print(plan_view(event["plan"]))
            if self._bar:
                self._progress = TrainingProgress(
                    self._console, event["total_steps"], event["budget_bytes"], resumed_at=event["resumed_at"]
                )
        elif name == "epoch":
            if event["evaluation"] and self._progress is not None:
                self._progress.evaluation({"epoch": event["epoch"], **event["evaluation"]})
        elif name == "end":
            self.close()
        else:
            left_out = f"step {event['step'] + 1} left out: " if name == "skip" else ""
            self._console.print(Text(f"{left_out}{event['text']}", style="yellow"), soft_wrap=True)
