"""A study in a journal file, one machine, no server: opened, and what a crash may have left in it.

Choices:
- The lock is Optuna's, which breaks one whose holder was killed after half a minute, from version 4.3 on. Ctrl-C waits
  from the asking for it to the giving back: in between, Optuna leaves the lock behind or makes another error of it.
- A last line that was cut off by a crash is dropped before use: it was never acknowledged to anyone.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from autoaccum.errors import SetupError
from autoaccum.interrupts import Deferral
from autoaccum.searching.extra import load_optuna

__all__ = ["broken_line", "open_journal"]


def open_journal(path: Path) -> Any:
    """Optuna's storage over this file, which is made where it is not there.

    Raises:
        SetupError: a folder, in no folder, or another kind of file.
    """
    optuna = load_optuna()
    if path.is_dir():
        raise SetupError(f"storage={str(path)!r} is a folder: give the path of a journal file in it")
    if not path.parent.is_dir():
        raise SetupError(f"storage={str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    if path.exists():
        with path.open("rb") as file:
            head = file.read(16)
        if head.startswith(b"SQLite format 3"):
            raise SetupError(f"storage={str(path)!r} is an SQLite database: write sqlite:///{path}")
        if head and not head.startswith(b"{"):
            raise SetupError(f"storage={str(path)!r} is not a journal file: give another path")
    path = path.absolute()
    lock = _lock(str(path))
    _mend(path, lock)
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path), lock_obj=lock))


def _lock(path: str) -> Any:
    base: Any = load_optuna().storages.journal.JournalFileSymlinkLock

    class Lock(base):  # type: ignore[misc]  # the base is known when Optuna is loaded, and not before
        """Optuna's, with Ctrl-C held back."""

        _waits = False

        def __init__(self) -> None:
            super().__init__(path)
            self._deferral = Deferral()

        def acquire(self) -> bool:
            self._waits = True
            self._deferral.begin()
            try:
                super().acquire()
            except BaseException:
                self._deferral.end()
                raise
            self._waits = False
            return True

        def release(self) -> None:
            try:
                super().release()
            finally:
                if not self._waits:  # else Optuna breaks another's lock from within `acquire`
                    self._deferral.end()

    return Lock()


def _mend(path: Path, lock: Any) -> None:
    """Cuts off a last line without its end: whoever wrote it was killed before it counted."""
    if not path.exists() or not _torn(path):
        return
    lock.acquire()  # whoever may be writing that line now is done after this
    try:
        if _torn(path):
            text = path.read_bytes()
            kept = text.rfind(b"\n") + 1
            warnings.warn(
                f"the journal {path} ended in the middle of a line, which a crash had cut off: its last "
                f"{len(text) - kept} bytes were dropped",
                stacklevel=2,
            )
            with path.open("r+b") as file:
                file.truncate(kept)
    finally:
        lock.release()


def _torn(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(0, 2)
        if file.tell() == 0:
            return False
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def broken_line(path: Path) -> int | None:
    """The number of the first line that is none of a journal's; None where all are, or there is no file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
            except ValueError:
                return number
            if not isinstance(entry, dict) or not {"op_code", "worker_id"} <= entry.keys():
                return number
    return None
