"""A listener that shows a training as it happens: trials, the plan with its reasons, progress, what went wrong.

It knows events by their `name` and their plain values only, and writes to stderr: stdout belongs to results.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from autoaccum.display.layout import open_console
from autoaccum.display.progress import TrainingProgress, TrialLines
from autoaccum.display.terminal import plan_view

__all__ = ["Narrator"]


class _Event(Protocol):
    @property
    def name(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


class Narrator:
    """Tells a person what is going on; a function of events."""

    def __init__(self, console: Console | None = None, *, bar: bool = True) -> None:
        """Draws on `console`, or on stderr; without a `bar` where somebody else shows the progress."""
        self._console = console if console is not None else open_console()
        self._trials = TrialLines(self._console)
        self._progress: TrainingProgress | None = None
        self._bar = bar

    def __call__(self, event: _Event) -> None:
        """Shows one event."""
        if event.name == "step":
            if self._progress is not None:
                self._progress.step(_Lazy(event.record))  # type: ignore[attr-defined]
            return
        show = getattr(self, f"_{event.name}", None)
        if show is not None:
            show(event.to_dict())

    def close(self) -> None:
        """Ends the progress bar, also where the training was interrupted."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None

    def _trial(self, event: Mapping[str, Any]) -> None:
        self._trials.trial(event["trial"])

    def _start(self, event: Mapping[str, Any]) -> None:
        self._console.print(plan_view(event["plan"]))
        if not self._bar:
            return
        self._progress = TrainingProgress(
            self._console, event["total_steps"], event["budget_bytes"], resumed_at=event["resumed_at"]
        )
        self._progress.__enter__()

    def _replay(self, event: Mapping[str, Any]) -> None:
        self._line(event["text"])

    def _skip(self, event: Mapping[str, Any]) -> None:
        self._line(f"step {event['step'] + 1} left out: {event['text']}")

    def _note(self, event: Mapping[str, Any]) -> None:
        self._line(event["text"])

    def _epoch(self, event: Mapping[str, Any]) -> None:
        if event["evaluation"] and self._progress is not None:
            self._progress.evaluation({"epoch": event["epoch"], **event["evaluation"]})

    def _end(self, event: Mapping[str, Any]) -> None:
        self.close()

    def _line(self, text: str) -> None:
        self._console.print(Text(text, style="yellow"), soft_wrap=True)


class _Lazy(Mapping[str, Any]):
    """A record's attributes as a mapping, read only when the bar is drawn: most steps draw nothing."""

    def __init__(self, record: Any) -> None:
        self._record = record

    def __getitem__(self, key: str) -> Any:
        return getattr(self._record, key)

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self._record, key, default)

    def __iter__(self) -> Any:
        return iter(vars(self._record))

    def __len__(self) -> int:
        return len(vars(self._record))
