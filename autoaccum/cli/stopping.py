"""Signals while `autoaccum fit` trains: the window in progress is finished and saved first.

SIGTERM ends with 143, Ctrl-C with 130. A second signal ends the program at once, and so does the first one where there
is nothing to save: before the training has begun, after it, and without a folder for checkpoints. The handlers that
were there before come back at the end.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import click

__all__ = ["Ended", "Stopping"]

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Ended(BaseException):
    """A signal that ends the program at once, with `exit_code`. No interruption: nothing is saved on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(_NAMES[signal.Signals(number)])
        self.exit_code = 128 + number


class Stopping:
    """A context in which signals wait for the window's end; given to the training as a listener of its events.

    `exit_code` is what the program ends with; None where no signal came.
    """

    def __init__(self, *, saves: bool) -> None:
        """`saves`: whether there is a folder for checkpoints, so that waiting is worth it."""
        self.exit_code: int | None = None
        self._saves, self._trains = saves, False
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():  # elsewhere signals are somebody else's
            for number in _NAMES:
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self, event: Any) -> None:
        """Asks the training to stop, if a signal did."""
        if event.name == "start":
            self._trains = True
        if self.exit_code is not None:
            from autoaccum.training.events import StopTraining

            raise StopTraining(f"ended by {_NAMES[signal.Signals(self.exit_code - 128)]}")
        if event.name == "end":
            self._trains = False

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked worker, which inherited this: its parent decides
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.exit_code is not None or not (self._trains and self._saves):
            raise Ended(number)
        self.exit_code = 128 + number
        name = _NAMES[signal.Signals(number)]
        click.echo(f"{name}: the window is finished and saved first; once more ends at once.", err=True)
