"""A study in a journal file: one machine, no server. Its lock, and what a crash may have left in it.

Choices:
- The lock is the one that Optuna makes, a symbolic link beside the file, so that its dashboard and other programs see
  it; but Ctrl-C waits from the taking of it to the giving back, and a wait for it can be broken off.
- A lock whose holder was killed is broken, under every version of Optuna; 4.0 to 4.2 would wait for ever.
- A last line that was cut off by a crash is dropped before use: it was never acknowledged to anyone.
"""

import json
import os
import time
import uuid
import warnings
from pathlib import Path
from typing import Any

from autoaccum.errors import SetupError
from autoaccum.interrupts import Deferral
from autoaccum.searching.extra import load_optuna

__all__ = ["JournalLock", "broken_line", "open_journal"]

LOCK_GRACE = 10.0  # seconds until a lock whose holder is gone is broken; a line takes milliseconds to write
LONGEST_WAIT = 0.5  # seconds between two looks at a lock that another process has


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
    lock = JournalLock(path.absolute())
    _mend(path, lock)
    backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=lock)
    return optuna.storages.JournalStorage(backend)


class JournalLock:
    """One writer at a time, over all processes that write to the file."""

    def __init__(self, path: Path) -> None:
        """`path`: of the journal, absolute."""
        self._path, self._link = str(path), f"{path}.lock"
        self._deferral = Deferral()

    def acquire(self) -> bool:
        """Waits until nobody else has it; from then on Ctrl-C waits."""
        pause, holder, since = 0.001, None, time.monotonic()
        while not self._take():
            now = _identity(self._link)
            if now != holder:
                holder, since = now, time.monotonic()
            elif holder is not None and time.monotonic() - since > LOCK_GRACE:
                self._break()
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_WAIT)
        return True

    def _take(self) -> bool:
        self._deferral.begin()
        try:
            os.symlink(self._path, self._link)
        except FileExistsError:
            self._deferral.end()
            return False
        except BaseException:
            self._deferral.end()
            raise
        return True

    def release(self) -> None:
        """Gives it back; a Ctrl-C that came since it was taken is raised here."""
        try:
            if not self._break():
                raise RuntimeError(f"the journal's lock {self._link} was taken from this process")
        finally:
            self._deferral.end()

    def _break(self) -> bool:
        """Removes it, whoever has it; whether this process did that, and no other was first."""
        name = f"{self._link}{uuid.uuid4()}.rename"
        try:
            os.rename(self._link, name)  # of several that try, only one succeeds
        except FileNotFoundError:
            return False
        os.unlink(name)
        return True


def _identity(link: str) -> tuple[int, int] | None:
    """By which a lock is told from one that was taken later; None where there is none."""
    try:
        found = os.lstat(link)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _mend(path: Path, lock: JournalLock) -> None:
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
