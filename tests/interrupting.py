"""Real SIGINTs: at the n-th call or return of a Python or C function, or whenever another process sends one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Sender", "events_in", "interrupted_at", "python_handles_it"]


@contextmanager
def python_handles_it() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt inside; a shell's background job inherits that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def events_in(work: Callable[[], Any]) -> int:
    """How many calls and returns `work` is made of."""
    count = [0]

    def see(frame: Any, event: str, argument: Any) -> None:
        count[0] += frame.f_code is not events_in.__code__

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count[0]


def interrupted_at(number: int, work: Callable[[], Any]) -> bool | None:
    """Runs `work`, with a SIGINT at that event in it; whether it was broken off, None where it has fewer events."""
    left = [number]

    def see(frame: Any, event: str, argument: Any) -> None:
        left[0] -= frame.f_code is not interrupted_at.__code__
        if left[0] == 0:
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGINT)

    sys.setprofile(see)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False if left[0] <= 0 else None


_SENDS = """
import os, signal, sys, time
for line in sys.stdin:
    delay, target = line.split()
    time.sleep(float(delay))
    os.kill(int(target), signal.SIGINT)
"""


class Sender:
    """A process that sends this one a SIGINT after a while: at any moment, as a terminal does."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", _SENDS], stdin=subprocess.PIPE, text=True)

    def interrupts(self, delay: float, work: Callable[[], Any]) -> bool:
        """Runs `work`, with a SIGINT after `delay` seconds, which is waited for; whether that broke it off."""
        assert self._process.stdin is not None
        done = False
        try:
            self._process.stdin.write(f"{delay} {os.getpid()}\n")
            self._process.stdin.flush()
            work()
            done = True
            time.sleep(60)
        except KeyboardInterrupt:
            return not done
        raise RuntimeError("the SIGINT never came")

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
