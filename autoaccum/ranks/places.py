"""Where each rank is and what each one says, in words; errors that all ranks know of; and which process is gone.

Backends say that a connection closed, and not whose it was. So the processes of a group tell each other once who they
are, and afterwards one on the same host can be looked for.
"""

import ctypes
import json
import os
import re
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import psutil
import torch.distributed as dist
from torch import Tensor

from autoaccum.errors import AutoaccumError

__all__ = [
    "PROCESSES", "LostRankError", "Process", "answering", "by_rank", "bytes_of", "digest", "listed", "short",
    "this_process", "told", "was_told",
]  # fmt: skip

# Marks an error that all ranks know of.
_TOLD = "_autoaccum_told_to_all_ranks"

E = TypeVar("E", bound=BaseException)


def told(error: E) -> E:
    """Marks an error that every rank knows of, so that nobody is told twice; returns it."""
    setattr(error, _TOLD, True)
    return error


def was_told(error: BaseException | None) -> bool:
    """Whether every rank knows of the error."""
    return hasattr(error, _TOLD)


def digest(value: Any) -> int:
    """A number below 2**32 that tells `value` from others: a tensor by its bytes, bytes as they are, else its text."""
    if isinstance(value, Tensor):
        value = bytes_of(value)
    return zlib.crc32(value if isinstance(value, bytes) else str(value).encode())


def bytes_of(tensor: Tensor) -> bytes:
    """A dense tensor's elements in order, as they lie in memory."""
    host = tensor.detach().cpu().contiguous()
    return ctypes.string_at(host.data_ptr(), host.numel() * host.element_size()) if host.numel() else b""


def listed(ranks: Sequence[int]) -> str:
    """Ranks in words, the first eight of them by number."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def by_rank(texts: Sequence[str], one: str, several: str) -> str:
    """What each rank says, ranks that say the same together: `rank 0 is in evaluate, ranks 1, 2 are in step 4`."""
    alike: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        alike.setdefault(text, []).append(rank)
    return ", ".join(f"{listed(ranks)} {several if len(ranks) > 1 else one} {text}" for text, ranks in alike.items())


def short(value: Any) -> str:
    """A plain value in at most 120 characters."""
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


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
def answering(group: Any) -> Iterator[None]:
    """Around a group's collectives: says in our words, as a LostRankError, that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        size = dist.get_world_size(group)
        others = [other for other in range(size) if other != dist.get_rank(group)]
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
