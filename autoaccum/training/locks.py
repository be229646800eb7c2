"""A lock between the processes of one machine that no kill can leave behind: the system frees it with its holder.

It is the holder's alone: neither another lock of the same process has it, nor a process that the holder forks. What
stands in the file says who had it last: a process, and its machine, since two containers on one volume may both be
process 1.
"""

import json
import os
import socket
from pathlib import Path
from typing import IO
from weakref import WeakSet

from autoaccum.files import open_own, read_json

__all__ = ["FolderLock"]

try:
    import fcntl
except ImportError:  # Windows: there the ledger's rules alone keep the workers apart
    fcntl = None  # type: ignore[assignment]


_held: "WeakSet[FolderLock]" = WeakSet()


def _let_go() -> None:
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    # A data loader's workers outlive a killed training by seconds, and would keep its lock from the one that goes on.
    os.register_at_fork(after_in_child=_let_go)


class FolderLock:
    """One at a time, on this machine. Not for nesting."""

    def __init__(self, folder: Path, name: str) -> None:
        """The lock is a file in `folder`, which is made when it is taken."""
        self._path = folder / f".{name}.lock"
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Waits until nobody else has it."""
        self._take(wait=True)

    def holder(self) -> str | None:
        """Takes the lock unless this object has it already, and then None; else who has it, in words."""
        if self._file is not None:
            return None
        try:
            self._take(wait=False)
        except BlockingIOError:
            try:  # as the last holder wrote them
                pid, host = read_json(self._path)
                pid, host = int(pid), str(host)
            except (OSError, ValueError, TypeError):  # not there, or just being written
                return "another process"
            here = (pid, host) == (os.getpid(), socket.gethostname())
            return "a loop of this same process" if here else f"process {pid} on {host}"
        return None

    @property
    def held(self) -> bool:
        """Whether this object has the lock."""
        return self._file is not None

    def _take(self, *, wait: bool) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = open_own(self._path, "ab", private=True)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            file.truncate(0)
            file.write(json.dumps([os.getpid(), socket.gethostname()]).encode())
            file.flush()
        except BaseException:
            file.close()
            raise
        self._file = file
        _held.add(self)

    def release(self) -> None:
        """Lets go; nothing where it is not held."""
        if self._file is not None:
            self._file.close()
            self._file = None
            _held.discard(self)
