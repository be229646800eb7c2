"""Each trial written down before it starts, so that a hard kill costs one trial and teaches the next run.

One JSON line a trial, fsynced before the trial begins, with the process's id and start time; a second line when it
ends. A line without its end and whose process is gone is a trial that killed its process: once may be chance, so it is
tried again; twice means that the size does not fit, nor any larger one.

Whether a process is gone can be seen on its own machine and in its own container alone: each has a file of its own.
"""

import contextlib
import hashlib
import json
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from autoaccum.checks import typed
from autoaccum.errors import NothingFitsError
from autoaccum.files import open_own
from autoaccum.probing.outcome import FITS

__all__ = ["Journal", "Owner", "cache_folder", "journal_path"]

KILLS_BELIEVED = 2


class Owner(NamedTuple):
    """A process, told from all others: where its id is used again, on other machines, and in other containers.

    `started` is in seconds since 1970; `boot` names the running of the kernel, and `namespace` that of process ids, as
    a container has its own: both are empty where the system has none.
    """

    pid: int
    started: float
    host: str
    boot: str
    namespace: str

    @classmethod
    def here(cls) -> "Owner":
        """This process."""
        return cls(os.getpid(), psutil.Process().create_time(), *_surroundings(os.getpid()))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Owner":
        """The owner that `_asdict` wrote; a KeyError or TypeError where it is none."""
        return cls(*(typed(values[name], kind) for name, kind in cls.__annotations__.items()))

    @property
    def is_stranger(self) -> bool:
        """Whether nothing can be known of it from here: it is, or was, on another machine or in another container."""
        return self[2:] != _surroundings(os.getpid())

    @property
    def is_gone(self) -> bool:
        """Whether it has ended for sure, which is never known of a stranger."""
        if self.is_stranger:
            return False
        try:
            process = psutil.Process(self.pid)
            alike = abs(process.create_time() - self.started) < 1.0
            return not alike or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


@cache
def _surroundings(pid: int) -> tuple[str, str, str]:
    """(host, boot, namespace) of this process, whose id is `pid`; Linux tells the last two."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), boot, namespace


Begun = tuple[int, str, int | None]  # a trial's size, kind, and the length of its samples where that was chosen


def cache_folder() -> Path:
    """Where answers and journals are kept: $AUTOACCUM_CACHE, else the platform's cache folder."""
    given = os.environ.get("AUTOACCUM_CACHE")
    if given:
        return Path(given)
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "autoaccum"


def journal_path(key: str) -> Path:
    """The file for the trials of a training on this machine, since it was started, and in this container.

    The folder may be shared with others, whose processes cannot be seen from here.
    """
    place = hashlib.sha256(" ".join(_surroundings(os.getpid())).encode()).hexdigest()
    return cache_folder() / f"{key}-{place[:12]}.journal"


class Journal:
    """The trials of one training, over all the processes that tried it.

    A journal that cannot be written or read costs a warning that names its path, never the probe.
    """

    def __init__(self, path: Path | None, key: str, owner: Owner | None = None) -> None:
        """Opens the file, or keeps no journal. Trials of other keys in it do not count; `owner` None: this process."""
        self.path, self.key, self.owner = path, key, owner or Owner.here()

    def least_killed(self, length: int | None = None) -> int:
        """From this size on none fits: the second least that killed its process, each kill counted; or no size at all.

        Where trials chose a length, those of samples of this `length`: what shorter ones did counts for it as well.
        """
        alike = sorted(
            size for size, _, chosen in self.unfinished()
            if (chosen is None) == (length is None) and (chosen or 0) <= (length or 0)
        )  # fmt: skip
        return alike[KILLS_BELIEVED - 1] if len(alike) >= KILLS_BELIEVED else sys.maxsize

    def lived(self, below: int) -> int:
        """The largest size below `below` that fitted, of samples whose length was not chosen; 0 where none did."""
        ends = [entry for entry in self._entries() if entry.get("outcome") == FITS and entry.get("length") is None]
        return max((entry["size"] for entry in ends if entry["size"] < below), default=0)

    def unfinished(self) -> list[Begun]:
        """Each trial that a process began which is gone and never ended it."""
        return [trial for owner, trial in self._begun().items() if owner.is_gone]

    def begun(self) -> Begun | None:
        """The trial that the journal's owner began and has not ended."""
        return self._begun().get(self.owner)

    def forgive(self) -> None:
        """Ends the trial that the owner is in: what stopped it, an error or the user, was no kill."""
        trial = self.begun()
        if trial is not None:
            self.end(trial[0], "stopped")
        self.close(answered=False)

    def close(self, *, answered: bool) -> None:
        """Takes the file away where there is an answer, or nothing in it to learn from.

        It stays where another process that is alive has begun trials in it.
        """
        if self.path is not None and (answered or not self.unfinished()):
            owners = {Owner.of(entry) for entry in self._entries() if entry["event"] == "start"}
            if all(owner.pid == self.owner.pid or owner.is_gone for owner in owners):
                self.path.unlink(missing_ok=True)

    @contextmanager
    def probing(self, *, closes: bool) -> Iterator[None]:
        """Around a probe: its end is written down, however it comes, as long as the process lives to see it.

        `closes`: the file goes once there is an answer, which may be that nothing fits; else someone else takes it.
        """
        answered = False
        try:
            yield
            answered = True
        except NothingFitsError:
            answered = True
            raise
        finally:
            if not answered:
                self.forgive()  # and kept, where it tells of kills
            elif closes:
                self.close(answered=True)

    def start(self, size: int, kind: str, length: int | None = None) -> None:
        """Writes down that a trial begins; on disk before this returns."""
        self._append({"event": "start", "size": size, "kind": kind}, length)

    def end(self, size: int, outcome: str, length: int | None = None) -> None:
        """Writes down how the trial ended."""
        self._append({"event": "end", "size": size, "outcome": outcome}, length)

    def _append(self, entry: dict[str, Any], length: int | None) -> None:
        if self.path is None:
            return
        entry |= {} if length is None else {"length": length}
        line = json.dumps({"key": self.key, **self.owner._asdict(), **entry}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open_own(self.path, "a", private=True, encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            warnings.warn(
                f"the trial journal {self.path} cannot be written ({error}): going on without it", stacklevel=2
            )
            self.path = None

    def _begun(self) -> dict[Owner, Begun]:
        """The trial that each process began and did not end; a process runs one at a time."""
        begun: dict[Owner, Begun] = {}
        for entry in self._entries():
            if entry["event"] == "start":
                begun[Owner.of(entry)] = entry["size"], entry["kind"], entry.get("length")
            else:
                begun.pop(Owner.of(entry), None)
        return begun

    def _entries(self) -> list[dict[str, Any]]:
        if self.path is None or not self.path.exists():
            return []
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            warnings.warn(f"the trial journal {self.path} cannot be read ({error}): going on without it", stacklevel=2)
            return []
        entries, cut, wrong = [], 0, 0
        for line in lines:
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict) or entry.get("key") == self.key:
                    _check(entry)
                    entries.append(entry)
            except (ValueError, RecursionError):
                cut += 1
            except (KeyError, TypeError, OverflowError):
                wrong += 1
        if wrong or cut > 1:  # a kill can cut one line short
            many = "1 line" if cut + wrong == 1 else f"{cut + wrong} lines"
            warnings.warn(f"{many} of the trial journal {self.path} cannot be used: passed over", stacklevel=2)
        return entries


def _check(entry: Any) -> None:
    """A KeyError, TypeError or OverflowError where a line is not what this module writes: others may write there."""
    Owner.of(entry)
    typed(entry[{"start": "kind", "end": "outcome"}[entry["event"]]], str)
    if min(typed((entry["size"], entry.get("length", 1)), tuple[int, ...])) < 1:
        raise TypeError("a count is 1 or more")
