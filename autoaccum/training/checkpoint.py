"""Checkpoints in a folder: written whole or not at all, found again after whatever happened.

- A checkpoint is two files. `step-00000050-epoch-2-window-3.pt` is what `torch.load(weights_only=True)` reads; the
  `.json` beside it says what it is, how long, and its SHA-256. Both are written under other names, forced to the disk
  and renamed, the `.json` last: a checkpoint without one was never finished, one that does not match is damaged. Of a
  sharded model there is a folder too, `.shards`, which all ranks have written to and the `.json` vouches for as well.
- The training waits until the bytes are with the operating system. Forcing them to the disk, the checksum, the renaming
  and the clearing away of older ones go on beside it; `settle` says how that ended.
- Where one is damaged or half-written, the one before it is used, and that is said. One with code in it is no
  accident: nothing of it is run, and nothing goes on behind the user's back.
- Only names of ours are touched. What lacks its .json keeps its contents under another name, and what an earlier
  training left is never deleted: a new one moves it to `earlier-1`, `earlier-2`, ...
- Checkpoints are their owner's alone; the record beside them is for whoever the umask lets read it.
"""

import contextlib
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from autoaccum.checks import typed
from autoaccum.errors import CheckpointError, shown
from autoaccum.files import open_own, partial_of, partial_path, read_json, write_json

__all__ = ["KEPT", "Checkpoints", "Entry", "Failure"]

KEPT = 3  # the last ones; and the one with the lowest validation loss
SCHEMA = 1
SHARDS = ".shards"
RECORD_FILES = ("plan.json", "report.json", "environment.json", "metrics.jsonl")

# What writing a file can fail with: torch reports a full disk as a RuntimeError, a host without memory as either.
Failure = (OSError, RuntimeError, MemoryError)

# What reading a damaged file can fail with, as bits flipped at random have shown.
_DAMAGED = (OSError, RuntimeError, UnpicklingError, ValueError, LookupError, TypeError, AttributeError, EOFError,
            AssertionError)  # fmt: skip

_NAME = re.compile(r"step-([0-9]{8,18})-epoch-([0-9]{1,18})-window-([0-9]{1,18})")
_SUFFIXES = (".json", ".pt", SHARDS)
_ASIDE = re.compile(r"earlier-([0-9]{1,9})")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CODE = re.compile(r"Unsupported (global|class)|not an allowed global|unrecognized function", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Entry:
    """One checkpoint in the folder, by where in the training it is."""

    step: int
    epoch: int
    window: int

    @classmethod
    def of(cls, path: Path) -> "Entry | None":
        """What a checkpoint's or its .json's name says; None for any other file."""
        found = _NAME.fullmatch(path.stem) if path.suffix in _SUFFIXES else None
        entry = None if found is None else cls(*map(int, found.groups()))
        return entry if entry is not None and entry.name == path.stem else None

    @property
    def name(self) -> str:
        """Its files' name, without a suffix."""
        return f"step-{self.step:08}-epoch-{self.epoch}-window-{self.window}"

    def __str__(self) -> str:
        return f"step {self.step}"


class Checkpoints:
    """The checkpoints of one training, in a `folder` that is made for the first one; `last` is the newest known to be
    whole on the disk.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = KEPT) -> None:
        """Nothing is read or written yet; a CheckpointError where the path is a file, or none that the system takes."""
        self.folder = Path(folder)
        self.last: Path | None = None
        self._keep = keep
        self._worker: ThreadPoolExecutor | None = None
        self._finishing: tuple[Entry, Future[None]] | None = None
        told = f"checkpoint={shown(str(self.folder))}"
        try:
            is_file = not stat.S_ISDIR(os.stat(self.folder).st_mode)
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            is_file = False  # told where it is made
        except (OSError, ValueError) as error:  # too long, or with a null byte
            why = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{told} is no folder: {why}; give another one, which need not be there") from error
        if is_file:
            raise CheckpointError(f"{told} is a file: give a folder, which need not be there")

    def path(self, entry: Entry) -> Path:
        """Where the checkpoint is."""
        return self.folder / f"{entry.name}.pt"

    def entries(self) -> list[Entry]:
        """Those that were finished, oldest first; whether they are still whole is seen when one is read."""
        return sorted(entry for path in self.folder.glob("step-*.json") if (entry := Entry.of(path)) is not None)

    # --- reading ---

    def newest(self, say: Callable[[str], None]) -> tuple[Entry, dict[str, Any]] | None:
        """The newest that is whole, and what it holds; None where there is none. `say` hears of each that is not.

        A CheckpointError where one has code in it, or cannot be read for want of a permission.
        """
        for path in self._unfinished():
            say(f"{path} was being written when the training ended, and is left out")
        entries = self.entries()
        for entry in reversed(entries):
            try:
                damage = self._damage(entry)
                state = None if damage else self.read(entry)
            except OSError as error:
                raise CheckpointError(f"{self.path(entry)} cannot be read: {error}; repair that, then go on") from error
            if state is not None:
                self.last = self.path(entry)
                return entry, state
            then = "the training starts anew" if entry == entries[0] else "the one before it is looked at"
            say(f"the checkpoint {self.path(entry)} is damaged ({damage}), and {then}")
        return None

    def _unfinished(self) -> list[Path]:
        whole = set(self.entries())
        found = (path for path in self.folder.glob("step-*") if path.suffix in (".pt", SHARDS))
        orphans = (path for path in found if (entry := Entry.of(path)) is not None and entry not in whole)
        return sorted([*(path for path in self._partial() if path.name.startswith(".step-")), *orphans])

    def _partial(self) -> list[Path]:
        """Half-written files of a training's; whatever else is called .tmp is the user's."""
        found = ((path, partial_of(path)) for path in self.folder.glob(".*.tmp"))
        return [path for path, name in found if name in RECORD_FILES or (name and Entry.of(Path(name)))]

    def _about(self, entry: Entry) -> dict[str, Any]:
        """What a checkpoint's .json says, each value checked; a ValueError where it is none that was written here."""
        about: Any = read_json(self.path(entry).with_suffix(".json"))
        try:
            place = {name: typed(about[name], int) for name in asdict(entry)}
            digest, _ = typed(about["sha256"], str), typed(about["bytes"], int)
            typed(about.get("loss", 0.0), float), typed(about.get("shards", {}), dict)
        except (LookupError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if place != asdict(entry) or not _DIGEST.fullmatch(digest):
            raise ValueError(f"it is not of {entry}")
        return dict(about)

    def _damage(self, entry: Entry) -> str | None:
        """What is wrong with it; None where it is as it was written."""
        path = self.path(entry)
        try:
            about = self._about(entry)
        except ValueError as error:
            return f"its .json cannot be used: {error}"
        if not path.exists():
            return "its file is gone"
        size = about["bytes"]
        if path.stat().st_size == size and _digest(path) == about["sha256"]:
            shards = about.get("shards", {})
            found = _digests(path.with_suffix(SHARDS)) if shards else {}
            bad = next((name for name in shards if shards[name] != found.get(name)), None)
            return bad and f"{bad} in its {SHARDS} is {'another' if bad in found else 'gone'}"
        with contextlib.suppress(*_DAMAGED):
            self._read(path)  # which refuses code
        return f"{path.stat().st_size} bytes instead of {size}" if path.stat().st_size != size else "another checksum"

    def read(self, entry: Entry) -> dict[str, Any]:
        """What a checkpoint holds that was found whole; a CheckpointError where it cannot be read."""
        path = self.path(entry)
        try:
            state = self._read(path)
        except _DAMAGED as error:
            raise CheckpointError(
                f"{path} cannot be read by torch {torch.__version__}: {error}; go on with the version that wrote it, "
                "or delete it to go on from the one before"
            ) from error
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{path} holds a {type(state).__name__} and no training: it is not of this program")
        return state

    def _read(self, path: Path) -> dict[str, Any]:
        """The file's values; code in it is never run, and is a CheckpointError."""
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            code = _CODE.search(str(error))
            if code is None:
                raise
            line = next((line.strip() for line in str(error).splitlines() if _CODE.search(line)), str(error))
            raise CheckpointError(
                f"{path} has code in it, and nothing of it was run. {line.split('. Please')[0]}. It is not of this "
                "program: delete it to go on from the checkpoint before, or resume=False to start anew"
            ) from None
        return state

    # --- writing ---

    def begin(self, resumed: Entry | None) -> str | None:
        """Readies the folder: half-written files go, and what is not this training's is set aside; where to, if any.

        `resumed` is the checkpoint that this training goes on from; None: it is a new one. An OSError where the folder
        cannot be made or written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self._partial():
            _delete(path)
        for path in self._unfinished():  # without a .json nothing says for sure that it is none of the user's
            _mark_damaged(path)
        entries = self.entries()
        if resumed is not None:  # those behind it are damaged: this training will come to them again
            for entry in entries:
                if entry > resumed:
                    for path in self._files(entry):
                        if path.exists():
                            _mark_damaged(path)
            return None
        if not entries:
            return None
        numbers = [int(found[1]) for path in self.folder.iterdir() if (found := _ASIDE.fullmatch(path.name))]
        aside = self.folder / f"earlier-{max(numbers, default=0) + 1}"
        aside.mkdir()
        # The newest first: whatever ends this half-way, no other checkpoint of theirs becomes the newest.
        files = [path for entry in reversed(entries) for path in self._files(entry)]
        try:
            for path in (*files, *(self.folder / name for name in RECORD_FILES)):
                if path.exists():
                    path.rename(aside / path.name)
        except OSError:
            with contextlib.suppress(OSError):
                aside.rmdir()  # where nothing is in it
            raise
        return str(aside)

    def shards(self, entry: Entry) -> Path:
        """Where the shards of a checkpoint are, if it has any."""
        return self.path(entry).with_suffix(SHARDS)

    def write(
        self, entry: Entry, state: Mapping[str, Any], about: Mapping[str, Any], shards: Path | None = None
    ) -> None:
        """Writes a checkpoint; it is finished beside the training, and `settle` says how that went.

        Args:
            entry, state: where in the training it is, and its values.
            about: what else the `.json` is to say; the validation loss under "loss", where there is one.
            shards: the folder of a half-written name that has its shards, which all ranks have ended writing.

        Raises:
            OSError, RuntimeError, MemoryError: it cannot be written; what was written of it is gone again.
        """
        self.settle()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = partial_path(self.path(entry))
        try:
            with open_own(temporary, "xb", private=True) as file:
                torch.save(dict(state), file)
        except Failure:
            for left in (temporary, shards):
                _delete(left)
            raise
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="autoaccum-checkpoint")
        self._finishing = entry, self._worker.submit(self._finish, entry, temporary, shards, dict(about))

    def settle(self, *, wait: bool = True) -> Entry | None:
        """The checkpoint that was finished since this was last asked; None where none was.

        An OSError where it could not be finished; it is gone again, and those before it are as they were.
        """
        if self._finishing is None or not (wait or self._finishing[1].done()):
            return None
        entry, future = self._finishing
        self._finishing = None
        future.result()
        self.last = self.path(entry)
        return entry

    def close(self) -> None:
        """Waits for what is being finished, and lets the thread go."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    def _finish(self, entry: Entry, temporary: Path, shards: Path | None, about: dict[str, Any]) -> None:
        path = self.path(entry)
        try:
            for each in (temporary, *(() if shards is None else shards.iterdir())):
                with open_own(each, "r+b") as file:
                    os.fsync(file.fileno())
            if shards is not None:
                about["shards"] = _digests(shards)
            values = {
                "schema": SCHEMA,
                **asdict(entry),
                **about,
                "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "bytes": temporary.stat().st_size,
                "sha256": _digest(temporary),
            }
            # Of the same moment in the run before: its .json must not vouch for another file.
            path.with_suffix(".json").unlink(missing_ok=True)
            os.replace(temporary, path)
            _delete(self.shards(entry))
            if shards is not None:
                os.replace(shards, self.shards(entry))
            write_json(path.with_suffix(".json"), values, private=True)
        except OSError:
            for left in (temporary, path, shards, self.shards(entry)):
                _delete(left)
            raise
        self._clear(entry)

    def _clear(self, newest: Entry) -> None:
        """Deletes what need not be kept. One that cannot be deleted does no harm but take its place."""
        entries = [entry for entry in self.entries() if entry <= newest]
        kept = {*entries[-self._keep :], self.best()}
        for entry in entries:
            if entry not in kept:
                for path in self._files(entry):
                    _delete(path)

    def best(self) -> Entry | None:
        """The one with the lowest validation loss; None where none has one."""
        losses = {}
        for entry in self.entries():
            with contextlib.suppress(OSError, ValueError):  # damaged: not the best of anything
                about = self._about(entry)
                if "loss" in about:
                    losses[entry] = float(about["loss"])
        return min(losses, key=lambda entry: losses[entry], default=None)

    def _files(self, entry: Entry) -> list[Path]:
        """The .json first: without it the others are not a checkpoint."""
        return [self.path(entry).with_suffix(suffix) for suffix in _SUFFIXES]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _digests(folder: Path) -> dict[str, list[Any]]:
    """(bytes, SHA-256) of each file in a folder, by name."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    with ThreadPoolExecutor(4) as several:
        return {path.name: [path.stat().st_size, digest] for path, digest in zip(paths, several.map(_digest, paths))}


def _delete(path: Path | None) -> None:
    """A file or folder, as far as it is there and the system lets it go."""
    with contextlib.suppress(OSError):
        if path is not None:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _mark_damaged(path: Path) -> None:
    """Gives what cannot be used another name, in the place of an earlier one of that name."""
    damaged = path.with_name(f"{path.name}.damaged")
    if damaged.is_dir():
        _delete(damaged)  # over a folder nothing is renamed
    path.rename(damaged)
