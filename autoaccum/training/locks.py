"""A lock between the processes of one machine that no kill can leave behind: the system frees it with its holder.

It is the holder's alone: a process that the holder forks does not have it.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import IO
from weakref import WeakSet

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
        """The lock is a file in `folder`, which is made."""
        self._path = folder / f".{name}.lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Waits until nobody else has it."""
        self._take(wait=True)

    def holder(self) -> int | None:
        """Takes it if it is free, and then None; else the process id of who has it, which may be this one."""
        try:
            self._take(wait=False)
        except BlockingIOError:
            written = self._path.read_text()
            return int(written) if written.isdigit() else -1
        return None

    def _take(self, *, wait: bool) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            file.truncate(0)
            file.write(str(os.getpid()))
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
