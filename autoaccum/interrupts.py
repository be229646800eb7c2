"""Ctrl-C: where it must not break off what is under way, and where others have made another error of it.

Python raises KeyboardInterrupt between any two instructions, also in a `finally` that puts something back. So the
library's own code is `uninterrupted`, and only the user's code and long waits, which it calls as `interruptible`, are
broken off at once. What comes elsewhere is raised at the next `check_interrupt`, or at the very end.

Which of the two runs is read off the stack when the signal arrives, and not from a flag: between raising a flag and the
`try` beside it there is always a moment more. Threads other than the main one never get the signal.
"""

import _signal  # type: ignore[import-not-found]
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeVar

__all__ = ["check_interrupt", "interruptible", "interruption_in", "uninterrupted"]

P = ParamSpec("P")
R = TypeVar("R")


class _Held:
    """What the handler knows. Only the main thread touches it."""

    before: Any = None  # the handler that was there; None while nothing is uninterrupted
    came = False
    owner = 0


def uninterrupted(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that Ctrl-C breaks off only inside its `interruptible` calls.

    One that came elsewhere is raised by the next `check_interrupt`, or when the outermost such function ends. Ctrl-C
    that is ignored, or ends the process, is left as it is.
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _begin():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        finally:
            _end()

    _CLOSED.add(guarded.__code__)  # type: ignore[attr-defined]
    return guarded


def interruptible(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls `function`, which Ctrl-C breaks off at once."""
    return function(*args, **kwargs)


def check_interrupt() -> None:
    """Raises a Ctrl-C that was held back, where nothing is under way."""
    if _Held.came and _in_main_thread():
        _Held.came = False
        _Held.before(signal.SIGINT, sys._getframe())


_CLOSED = set[Any]()  # code of the functions that are uninterrupted
_OPEN = interruptible.__code__


def _begin() -> bool:
    """Takes the signal over; False where that was done before, or it is not ours to take."""
    if _Held.before is not None or not _in_main_thread():
        return False
    # The C functions: what signal.py puts around them makes enumeration members, at 30 µs a call.
    before: Any = _signal.getsignal(signal.SIGINT)
    if not callable(before):
        return False
    _Held.before, _Held.came, _Held.owner = before, False, os.getpid()
    try:
        _signal.signal(signal.SIGINT, _heard)
    except BaseException:  # an earlier signal was waiting to be handled, and its handler raised
        _Held.before = None
        raise
    return True


def _end() -> None:
    """Gives the signal back, and raises what was held back."""
    before = _Held.before
    try:
        if _signal.getsignal(signal.SIGINT) is _heard:  # else the user's code has put another there
            _signal.signal(signal.SIGINT, before)
    finally:  # from there on it may come here too
        came, _Held.before, _Held.came = _Held.came, None, False
    if came:
        before(signal.SIGINT, sys._getframe())


def _heard(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _Held.owner or _may_break_off(frame or sys._getframe(1)):
        _Held.before(number, frame)  # in a forked child nobody waits for what came
    else:
        _Held.came = True


def _may_break_off(frame: FrameType | None) -> bool:
    """Whether the innermost of our functions on the stack is an interruptible one, which has begun its call."""
    if frame is not None and frame.f_code is _OPEN:
        return False
    while frame is not None and frame.f_code is not _OPEN:
        if frame.f_code in _CLOSED or _is_dropped(frame):
            return False
        frame = frame.f_back
    return frame is not None


def _is_dropped(frame: FrameType) -> bool:
    """Whether Python would drop what is raised in there: at the end of an object, nobody is there to hear it."""
    name, module = frame.f_code.co_name, frame.f_globals.get("__name__")
    if module == "torch._dynamo.utils":  # its dictionary of weak keys calls these
        return name in ("<lambda>", "_remove_id")
    return name == "__del__" or module in ("weakref", "_weakrefset")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


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
