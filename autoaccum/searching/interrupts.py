"""Ctrl-C, where it must not break off what is under way, and where others have made another error of it.

Optuna's own handlers of errors do not expect one in the middle of a write: they raise something else, which would pass
for a failure of the trial, and the search would go on.
"""

import signal
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Deferral", "interruption_in"]


class Deferral:
    """Keeps Ctrl-C back from `begin` to `end`, which then lets it happen.

    Only where it would reach Python: one that is ignored, or ends the process, is left as it is; and so are threads,
    which it never reaches.
    """

    def __init__(self) -> None:
        self._before: Callable[[int, Any], Any] | None = None
        self._came = False

    def begin(self) -> None:
        """From here on it waits. Nothing where it waits already."""
        handler = signal.getsignal(signal.SIGINT)
        if self._before is not None or not callable(handler):
            return
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._note)
            self._before = handler

    def end(self) -> None:
        """Raises what came meanwhile. Nothing where nothing is kept back."""
        before = self._before
        if before is None:
            return
        self._before = None
        signal.signal(signal.SIGINT, before)
        came, self._came = self._came, False
        if came:
            before(signal.SIGINT, None)

    def _note(self, number: int, frame: Any) -> None:
        self._came = True


def interruption_in(error: BaseException, *, outer: BaseException | None = None) -> KeyboardInterrupt | None:
    """The Ctrl-C in whose handling an error arose, if there is one.

    `outer`: what was being handled before any of this began, which every later error carries along as its context.
    """
    seen, waiting = {id(outer)}, [error]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        if isinstance(one, KeyboardInterrupt):
            return one
        seen.add(id(one))
        waiting += [other for other in (one.__cause__, one.__context__) if other is not None]
    return None
