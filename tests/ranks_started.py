"""Starts real processes, one for each rank, and waits for them."""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.warm import WARM

__all__ = ["started"]


def started(
    work: Callable[[int, str], Any], count: int, folder: Path, seconds: float = 300.0, killed: Sequence[int] = ()
) -> None:
    """Runs `work(rank, folder)` in `count` processes at once; a rank that hangs fails the test.

    Those in `killed` are to end by SIGKILL, all others well.
    """
    processes = [WARM.Process(target=work, args=(rank, str(folder))) for rank in range(count)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [process.pid for process in processes if process.exitcode is None]
    for process in processes:
        process.kill()
    assert not hung, "a rank waits for one that does not come"
    expected = [-signal.SIGKILL if rank in killed else 0 for rank in range(count)]
    assert [process.exitcode for process in processes] == expected
