"""Which other process is gone: backends say that a connection closed, and not whose it was.

The processes of a group tell each other once who they are. Afterwards one on the same host can be looked for.
"""

import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import psutil

from autoaccum.errors import AutoaccumError
from autoaccum.ranks.places import listed, told

__all__ = ["PROCESSES", "LostRankError", "Process", "answering", "this_process"]

# How gloo, NCCL and the sockets below them say that another process is gone or silent.
_LOST = re.compile(
    r"connection (closed|reset|refused)|closed by peer|broken pipe|timed? ?out|socket|remote process|"
    r"nccl(remote|system|internal)error|communicator was aborted|unhandled system error|\beof\b",
    re.IGNORECASE,
)

Process = list[Any]
"""Host and PID namespace, process id, the second it was started in."""

PROCESSES: WeakKeyDictionary[Any, list[Process]] = WeakKeyDictionary()
"""Of each group, the processes that its ranks are."""


class LostRankError(AutoaccumError):
    """Another process of the group ended, or no longer answers."""


def this_process() -> Process:
    """This one."""
    space = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return [f"{socket.gethostname()} {space}", os.getpid(), int(psutil.Process().create_time())]


@contextmanager
def answering(group: Any, rank: int, size: int) -> Iterator[None]:
    """Around a group's collectives: says in our words that another process is gone.

    Raises:
        LostRankError: one is.
    """
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        others = [other for other in range(size) if other != rank]
        gone = others if len(others) == 1 else _gone(PROCESSES.get(group, []))
        which = listed(gone) if gone else f"one of the other {len(others)} ranks"
        answers = "no longer answer" if len(gone) > 1 else "no longer answers"
        raise told(
            LostRankError(f"{which} of {size} ended or {answers}; what ended it is in that rank's own output")
        ) from error


def _gone(processes: Sequence[Process]) -> list[int]:
    """The ranks whose processes have ended, as far as this host can tell; one that is ending has a second for it."""
    here = this_process()[0]
    for _ in range(20):
        found = [rank for rank, (host, pid, started) in enumerate(processes) if host == here and _ended(pid, started)]
        if found:
            return found
        time.sleep(0.05)
    return []


def _ended(pid: int, started: int) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) > 2 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
