"""Each trial written down before it starts, so that a hard kill costs one trial and teaches the next run.

One JSON line a trial, fsynced before the trial begins, with the process's id and start time; a second line when it
ends. A line without its end and whose process is gone is a trial that killed its process: once may be chance, so it is
tried again; twice means that the size does not fit.
"""

import json
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Journal", "cache_folder"]

KILLS_BELIEVED = 2


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


class Journal:
    """The trials of one training, over all the processes that tried it.

    A journal that cannot be written or read costs a warning that names its path, never the probe.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        """Opens the journal.

        Args:
            path: the file; None keeps no journal.
            key: what decides the answer: trials of other trainings in the same file do not count.
        """
        self._path, self._key = path, key
        self._owner = {"pid": os.getpid(), "started": psutil.Process().create_time()}

    def killed_sizes(self, length: int | None = None) -> set[int]:
        """The sizes that killed their process twice; those of samples of a `length`, where trials chose one."""
        kills: Counter[int] = Counter()
        for (size, _, own), times in self._unfinished().items():
            kills[size] += times if own == length else 0
        return {size for size, times in kills.items() if times >= KILLS_BELIEVED}

    def unfinished(self) -> list[tuple[int, str]]:
        """(size, kind) of each trial that a process which is gone began and never ended."""
        return [(size, kind) for (size, kind, _), times in self._unfinished().items() for _ in range(times)]

    def clear(self) -> None:
        """Takes the file away once the answer is found, unless another process is in the middle of a trial."""
        if self._path is None or any(entry["event"] == "start" and self._others(entry) for entry in self._entries()):
            return
        self._path.unlink(missing_ok=True)

    def start(self, size: int, kind: str, length: int | None = None) -> None:
        """Writes down that a trial begins; on disk before this returns."""
        chosen = {} if length is None else {"length": length}
        self._append({"event": "start", "size": size, "kind": kind, **chosen})

    def end(self, size: int, outcome: str) -> None:
        """Writes down how the trial ended."""
        self._append({"event": "end", "size": size, "outcome": outcome})

    def _append(self, entry: dict[str, Any]) -> None:
        if self._path is None:
            return
        line = json.dumps({"key": self._key, **self._owner, **entry}) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            warnings.warn(
                f"the trial journal {self._path} cannot be written ({error}): going on without it", stacklevel=2
            )
            self._path = None

    def _unfinished(self) -> Counter[tuple[int, str, int | None]]:
        """How often each trial was started by a process that died before its end."""
        begun: dict[tuple[int, float], tuple[int, str, int | None]] = {}  # a process runs one trial at a time
        counted: Counter[tuple[int, str, int | None]] = Counter()
        for entry in self._entries():
            owner = (entry["pid"], entry["started"])
            if entry["event"] == "start":
                begun[owner] = (entry["size"], entry.get("kind", "verify"), entry.get("length"))
            else:
                begun.pop(owner, None)
        for (pid, started), trial in begun.items():
            if not _alive(pid, started):
                counted[trial] += 1
        return counted

    def _others(self, entry: dict[str, Any]) -> bool:
        return entry["pid"] != self._owner["pid"] and _alive(entry["pid"], entry["started"])

    def _entries(self) -> list[dict[str, Any]]:
        if self._path is None or not self._path.exists():
            return []
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            warnings.warn(f"the trial journal {self._path} cannot be read ({error}): going on without it", stacklevel=2)
            return []
        entries, damaged = [], 0
        for line in text.splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # a kill can cut the last line short
                damaged += 1
                continue
            if (
                isinstance(entry, dict)
                and entry.get("key") == self._key
                and {"pid", "started", "size", "event"} <= entry.keys()
            ):
                entries.append(entry)
        if damaged > 1:
            warnings.warn(
                f"{damaged} lines of the trial journal {self._path} are damaged and were passed over", stacklevel=2
            )
        return entries


def _alive(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
