"""Checkpoints in a folder: written whole or not at all, found again after whatever happened.

- A checkpoint is a folder, `step-00000050-epoch-2-window-3`. `torch.load(weights_only=True)` reads its `state.pt`; of a
  sharded model the shards that all ranks have written lie beside that. Its `about.json` says what it is, and of each
  file how long it is and its SHA-256. All of it is written into a folder of another name and forced to the disk, and
  that is renamed: what is not finished has no name, and what does not match its `about.json` is damaged.
- The training waits until the bytes are with the operating system. Forcing them to the disk, the checksum, the renaming
  and the clearing away of older ones go on beside it; `settle` says how that ended.
- Where one is damaged or half-written, the one before it is used, and that is said. One with code in it is no
  accident: nothing of it is run, and nothing goes on behind the user's back.
- Only names of ours are touched. What is damaged keeps its contents under another name, and what an earlier training
  left is never deleted: a new one moves it to `earlier-1`, `earlier-2`, ...
- Checkpoints are their owner's alone; the record beside them is for whoever the umask lets read it.
"""

import contextlib
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch

from autoaccum.checks import typed
from autoaccum.errors import CheckpointError, shown
from autoaccum.files import open_own, partial_of, partial_path, read_json, sync_folder, write_json

__all__ = ["ABOUT", "KEPT", "STATE", "Checkpoints", "Entry", "Failure"]

KEPT = 3  # the last ones; and the one with the lowest validation loss
SCHEMA = 2
STATE, ABOUT = "state.pt", "about.json"
RECORD_FILES = ("plan.json", "report.json", "environment.json", "metrics.jsonl")

# What writing a file can fail with: torch reports a full disk as a RuntimeError, a host without memory as either.
Failure = (OSError, RuntimeError, MemoryError)

# What reading a damaged file can fail with, as bits flipped at random have shown.
_DAMAGED = (OSError, RuntimeError, UnpicklingError, ValueError, LookupError, TypeError, AttributeError, EOFError,
            AssertionError)  # fmt: skip

_NAME = re.compile(r"step-([0-9]{8,18})-epoch-([0-9]{1,18})-window-([0-9]{1,18})")
_EARLIER = (".pt", ".json", ".shards")  # what a checkpoint was before it was a folder
_ASIDE = re.compile(r"earlier-([0-9]{1,9})")
_CODE = re.compile(r"Unsupported (global|class)|not an allowed global|unrecognized function", re.IGNORECASE)


class Entry(NamedTuple):
    """One checkpoint in the folder, by where in the training it is."""

    step: int
    epoch: int
    window: int

    @classmethod
    def of(cls, name: str) -> "Entry | None":
        """What a checkpoint's name says; None for any other."""
        found = _NAME.fullmatch(name)
        entry = None if found is None else cls(*map(int, found.groups()))
        return entry if entry is not None and entry.name == name else None

    @property
    def name(self) -> str:
        """Its folder's name."""
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
        self._finishing: tuple[Entry, Future[None]] | None = None
        told = f"checkpoint={shown(str(self.folder))}"
        try:
            is_folder = stat.S_ISDIR(os.stat(self.folder).st_mode)
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            return  # told where it is made
        except (OSError, ValueError) as error:  # too long, or with a null byte
            why = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{told} is no folder: {why}; give another one, which need not be there") from error
        if not is_folder:
            raise CheckpointError(f"{told} is a file: give a folder, which need not be there")

    def path(self, entry: Entry) -> Path:
        """Where the checkpoint is."""
        return self.folder / entry.name

    def entries(self) -> list[Entry]:
        """Those that were finished, oldest first; whether they are still whole is seen when one is read."""
        found = (Entry.of(path.name) for path in self.folder.glob("step-*") if path.is_dir())
        return sorted(entry for entry in found if entry is not None)

    # --- reading ---

    def newest(self, say: Callable[[str], None]) -> tuple[Entry, dict[str, Any]] | None:
        """The newest that is whole, and what it holds; None where there is none. `say` hears of each that is not.

        A CheckpointError where one has code in it, cannot be read for want of a permission, or is from before
        checkpoints were folders.
        """
        older = self._older()
        if older and not self.entries():
            raise CheckpointError(
                f"{older[0]} is a checkpoint of an earlier development version, which this one does not read: give "
                "another folder, or resume=False to start anew"
            )
        for path in self._partial():
            if path.is_dir():
                say(f"{path} was being written or cleared away when the training ended, and is left out")
        entries = self.entries()
        for entry in reversed(entries):
            path = self.path(entry)
            try:
                damage = self._damage(entry)
                if damage is None:
                    state = self._read(path)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error}; repair that, then go on") from error
            except _DAMAGED as error:  # though it is as it was written
                raise CheckpointError(
                    f"{path} cannot be read by torch {torch.__version__}: {error}; go on with the version that wrote "
                    "it, or delete it to go on from the one before"
                ) from error
            if damage is not None:
                then = "the training starts anew" if entry == entries[0] else "the one before it is looked at"
                say(f"the checkpoint {path} is damaged ({damage}), and {then}")
                continue
            if not isinstance(state, Mapping):
                is_ = f"{path} holds a {type(state).__name__} and no training"
                raise CheckpointError(f"{is_}: it is not of this program")
            self.last = path
            return entry, dict(state)
        return None

    def _partial(self) -> list[Path]:
        """What a training has left half-written; whatever else is called .tmp is the user's."""
        found = ((path, partial_of(path)) for path in self.folder.glob(".*.tmp"))
        return [path for path, name in found if name in RECORD_FILES or (name and Entry.of(name))]

    def _older(self) -> list[Path]:
        """What checkpoints were made of before they were folders, the newest first."""
        found = (path for path in self.folder.glob("step-*") if path.suffix in _EARLIER and Entry.of(path.stem))
        return sorted(found, reverse=True)

    def _about(self, entry: Entry) -> dict[str, Any]:
        """What a checkpoint's about.json says, each value checked; a ValueError where it was not written here."""
        try:
            about: Any = read_json(self.path(entry) / ABOUT)
            place = {name: typed(about[name], int) for name in entry._asdict()}
            typed(about["files"], dict[str, tuple[int, str]]), typed(about.get("loss", 0.0), float)
            holds = place == entry._asdict() and STATE in about["files"]
        except (LookupError, TypeError, AttributeError, OverflowError, FileNotFoundError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if not holds:
            raise ValueError(f"it is not of {entry}")
        return dict(about)

    def _damage(self, entry: Entry) -> str | None:
        """What is wrong with it; None where it is as it was written."""
        try:
            said = self._about(entry)["files"]
        except ValueError as error:
            return f"its {ABOUT} cannot be used: {error}"
        with ThreadPoolExecutor(4) as several:
            found = _digests(self.path(entry), several.map)
        for name, (size, digest) in said.items():
            if name not in found:
                return f"its {name} is gone"
            if found[name] != [size, digest]:
                with contextlib.suppress(*_DAMAGED):
                    self._read(self.path(entry))  # which refuses code
                what = "another checksum" if found[name][0] == size else f"{found[name][0]} bytes instead of {size}"
                return f"its {name} has {what}"
        return None

    def _read(self, path: Path) -> Any:
        """A checkpoint's values; code in it is never run, and is a CheckpointError."""
        try:
            return torch.load(path / STATE, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            code = _CODE.search(str(error))
            if code is None:
                raise
            line = next((line.strip() for line in str(error).splitlines() if _CODE.search(line)), str(error))
            raise CheckpointError(
                f"{path} has code in it, and nothing of it was run. {line.split('. Please')[0]}. It is not of this "
                "program: delete it to go on from the checkpoint before, or resume=False to start anew"
            ) from None

    # --- writing ---

    def begin(self, resumed: Entry | None) -> str | None:
        """Readies the folder: what is half-written goes, what is another training's is set aside; where to, if any.

        `resumed` is the checkpoint that this training goes on from; None: it is a new one. An OSError where the folder
        cannot be made or written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self._partial():
            _delete(path)
        for entry in self.entries():
            behind = resumed is not None and entry > resumed  # damaged: this training will come to it again
            if behind or not (self.path(entry) / ABOUT).exists():
                damaged = self.path(entry).with_name(f"{entry.name}.damaged")
                _delete(damaged)  # over a folder nothing is renamed
                self.path(entry).rename(damaged)
        theirs = [entry.name for entry in reversed(self.entries())] + [path.name for path in self._older()]
        if resumed is not None or not theirs:
            return None
        numbers = [int(found[1]) for path in self.folder.iterdir() if (found := _ASIDE.fullmatch(path.name))]
        aside = self.folder / f"earlier-{max(numbers, default=0) + 1}"
        aside.mkdir()
        # The newest first: whatever ends this half-way, no other checkpoint of theirs becomes the newest.
        try:
            for name in (*theirs, *RECORD_FILES):
                if (self.folder / name).exists():
                    (self.folder / name).rename(aside / name)
        except OSError:
            with contextlib.suppress(OSError):
                aside.rmdir()  # where nothing is in it
            raise
        return str(aside)

    def write(
        self, entry: Entry, state: Mapping[str, Any], about: Mapping[str, Any], begun: Path | None = None
    ) -> None:
        """Writes a checkpoint; it is finished beside the training, and `settle` says how that went.

        Args:
            entry, state: where in the training it is, and its values.
            about: what else the `about.json` is to say; the validation loss under "loss", where there is one.
            begun: its folder, of a half-written name, with the shards that all ranks have ended writing; None: none
                have.

        Raises:
            OSError, RuntimeError, MemoryError: it cannot be written; what was written of it is gone again.
        """
        self.settle()
        temporary = begun or partial_path(self.path(entry))
        try:
            temporary.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open_own(temporary / STATE, "xb", private=True) as file:
                torch.save(dict(state), file)
        except Failure:
            _delete(temporary)
            raise
        worker = ThreadPoolExecutor(1, thread_name_prefix="autoaccum-checkpoint")
        self._finishing = entry, worker.submit(self._finish, entry, temporary, dict(about))
        worker.shutdown(wait=False)  # once that is done

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

    def _finish(self, entry: Entry, temporary: Path, about: dict[str, Any]) -> None:
        path = self.path(entry)
        replaced = partial_path(path)
        try:
            for each in temporary.iterdir():
                with open_own(each, "r+b") as file:
                    os.fsync(file.fileno())
            saved = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            versions = {"schema": SCHEMA, "torch": torch.__version__}
            values = {**versions, **entry._asdict(), **about, "saved": saved, "files": _digests(temporary)}
            write_json(temporary / ABOUT, values, private=True)  # last: it vouches for what is on the disk by now
            with contextlib.suppress(FileNotFoundError):
                path.rename(replaced)  # of the same moment in the run before: over a folder nothing is renamed
            os.replace(temporary, path)
            sync_folder(self.folder)
        except OSError:
            _delete(temporary)
            with contextlib.suppress(OSError):
                replaced.rename(path)
            raise
        _delete(replaced)
        self._clear(entry)

    def _clear(self, newest: Entry) -> None:
        """Deletes what need not be kept. One that cannot be deleted does no harm but take its place."""
        entries = [entry for entry in self.entries() if entry <= newest]
        kept = {*entries[-self._keep :], self.best()}
        for entry in entries:
            if entry not in kept:
                with contextlib.suppress(OSError):  # without its name first: what is half gone would look damaged
                    _delete(self.path(entry).rename(partial_path(self.path(entry))))

    def best(self) -> Entry | None:
        """The one with the lowest validation loss; None where none has one."""
        losses = {}
        for entry in self.entries():
            with contextlib.suppress(OSError, ValueError):  # damaged: not the best of anything
                about = self._about(entry)
                if "loss" in about:
                    losses[entry] = float(about["loss"])
        return min(losses, key=lambda entry: losses[entry], default=None)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _digests(folder: Path, each: Callable[..., Iterable[str]] = map) -> dict[str, list[Any]]:
    """(bytes, SHA-256) of each file in a folder, by name.

    `each`: map, or that of several threads, of which none can be begun any more while Python ends.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != ABOUT)
    return {path.name: [path.stat().st_size, digest] for path, digest in zip(paths, each(_digest, paths))}


def _delete(path: Path) -> None:
    """A file or folder, as far as it is there and the system lets it go."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
