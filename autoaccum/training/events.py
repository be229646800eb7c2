"""What the loop tells the world. It prints nothing itself: display, sinks and callbacks listen.

A listener is a function of one event. A sink is a listener with `close()`. What a listener raises is the user's error
and reaches them as it is, with one exception: `StopTraining` asks for an end after the window in progress.
"""

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol

from autoaccum.errors import MissingExtraError
from autoaccum.files import open_own, plain_json
from autoaccum.interrupts import interruptible
from autoaccum.window.record import StepRecord

__all__ = [
    "CheckpointSaved",
    "EpochEnded",
    "Event",
    "Events",
    "JsonlSink",
    "Listener",
    "Noted",
    "Sink",
    "StepTaken",
    "StopTraining",
    "TensorBoardSink",
    "TrainingEnded",
    "TrainingStarted",
    "TrainingWarning",
    "TrialRan",
    "WindowReplayed",
    "WindowSkipped",
]


class TrainingWarning(UserWarning):
    """Something went wrong that the training survived; listeners hear the same text as an event."""


class StopTraining(Exception):
    """Raised by a listener: the loop ends after the window in progress, saves a checkpoint and returns as usual."""


@dataclass(frozen=True)
class Event:
    """Something that happened; `name` says what."""

    name: ClassVar[str]

    def __init_subclass__(cls, *, name: str) -> None:
        cls.name = name

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the name under "event"."""
        return {"event": self.name, **asdict(self)}


@dataclass(frozen=True)
class TrialRan(Event, name="trial"):
    """A trial of the probe ended."""

    trial: dict[str, Any]


@dataclass(frozen=True)
class TrainingStarted(Event, name="start"):
    """The first window is about to run; `total_steps` is None for a stream without a length."""

    plan: dict[str, Any]
    total_steps: int | None
    resumed_at: int
    budget_bytes: int | None


@dataclass(frozen=True)
class StepTaken(Event, name="step"):
    """A window ended in an optimizer step."""

    record: StepRecord

    def to_dict(self) -> dict[str, Any]:
        """Plain values; made at every window, so not by way of a deep copy."""
        return {"event": self.name, "record": dict(vars(self.record))}


@dataclass(frozen=True)
class WindowSkipped(Event, name="skip"):
    """A window ended without a step."""

    step: int
    text: str


@dataclass(frozen=True)
class WindowReplayed(Event, name="replay"):
    """A window ran out of memory and runs again: the same samples in more micro-batches, or with less kept aside."""

    step: int
    micro_batch: int
    accumulation_steps: int
    text: str


@dataclass(frozen=True)
class EpochEnded(Event, name="epoch"):
    """An epoch ended; `evaluation` holds the validation metrics where there is validation data."""

    epoch: int
    step: int
    evaluation: dict[str, float] | None


@dataclass(frozen=True)
class CheckpointSaved(Event, name="checkpoint"):
    """A checkpoint is on disk."""

    step: int
    path: str


@dataclass(frozen=True)
class Noted(Event, name="note"):
    """Something a person should know, in one line."""

    text: str


@dataclass(frozen=True)
class TrainingEnded(Event, name="end"):
    """The last window ran."""

    steps: int
    seconds: float


Listener = Callable[[Event], None]


class Sink(Protocol):
    """A listener that holds something open."""

    def __call__(self, event: Event) -> None:
        """Takes one event."""

    def close(self) -> None:
        """Lets go of what is open."""


class Events:
    """Hands each event to every listener, in the order they were given.

    Attributes:
        stop: why a listener asked for the end of the training; None while none has.
    """

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self._listeners = list(listeners)
        self.stop: str | None = None

    def add(self, listener: Listener) -> None:
        """Adds a listener at the end."""
        self._listeners.append(listener)

    def tell(self, event: Event) -> None:
        """Tells all; what one raises ends the telling, unless it is StopTraining."""
        for listener in self._listeners:
            try:
                interruptible(listener, event)
            except StopTraining as asked:
                self.stop = str(asked) or "a listener asked for it"

    def note(self, text: str) -> None:
        """Tells a person something, in one line."""
        self.tell(Noted(text))

    def warn(self, text: str, event: Event | None = None) -> None:
        """Says loudly what the training survived: as an event, a note if no other is given, and as a Python warning."""
        self.tell(Noted(text) if event is None else event)
        warnings.warn(text, TrainingWarning, stacklevel=2)

    def close(self) -> None:
        """Closes the sinks among the listeners."""
        for listener in self._listeners:
            close = getattr(listener, "close", None)
            if close is not None:
                close()


class JsonlSink:
    """Every event as a JSON line in a file; a resumed run appends.

    A disk that is full costs lines, not the training: that is said once, and writing is tried again at each event.

    Attributes:
        failed: why lines are missing; None where none are.
    """

    def __init__(self, path: str | Path, *, follow: bool = True) -> None:
        """Makes the file's folder; the file is opened at the first event, and again at one after `close`.

        Args:
            path: of the file, also a device such as /dev/stdout.
            follow: through a symbolic link; without, one is refused.
        """
        self._path, self._open_file = Path(path), open if follow else open_own
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] | None = None
        self.failed: str | None = None

    def __call__(self, event: Event) -> None:
        """Writes one line."""
        try:
            if self._file is None:
                self._file = self._open()
            self._file.write(json.dumps(plain_json(event.to_dict())) + "\n")
            if not isinstance(event, StepTaken):
                self._file.flush()
        except OSError as error:
            self._lost(error)

    def _open(self) -> IO[str]:
        """The file at its end; a line that a kill or a full disk has cut off is closed."""
        whole = True
        if self._path.exists() and self._path.stat().st_size:
            with self._path.open("rb") as before:
                before.seek(-1, 2)
                whole = before.read(1) == b"\n"
        file: IO[str] = self._open_file(self._path, "a", encoding="utf-8")
        file.write("" if whole else "\n")
        return file

    def position(self) -> int:
        """Bytes written so far, all of them with the operating system."""
        try:
            if self._file is not None:
                self._file.flush()
            return self._path.stat().st_size
        except OSError as error:
            self._lost(error)
            return 0

    def cut(self, position: int) -> None:
        """Drops all that was written after `position`: steps that a resumed run takes again."""
        self.close()
        if self._path.exists() and self._path.stat().st_size > position:
            with self._open_file(self._path, "r+b") as file:
                file.truncate(position)

    def close(self) -> None:
        """Flushes and closes the file."""
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        if self.failed is None:
            warnings.warn(f"events are missing in {self._path}: {error}", TrainingWarning, stacklevel=3)
        self.failed = str(error)
        self.close()  # what it still holds cannot be written either


class TensorBoardSink:
    """Loss, LR, throughput and evaluations as TensorBoard scalars over optimizer steps."""

    def __init__(self, folder: str | Path) -> None:
        """Opens a writer.

        Raises:
            MissingExtraError: tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard", "TensorBoardSink") from error
        self._writer: Any = SummaryWriter(str(folder))

    def __call__(self, event: Event) -> None:
        """Writes what has a value over steps."""
        if isinstance(event, StepTaken):
            for name in ("loss", "lr", "grad_norm", "samples_per_second", "peak_bytes", "noise_scale"):
                value = getattr(event.record, name)
                if value is not None:
                    self._writer.add_scalar(f"train/{name}", value, event.record.step)
        elif isinstance(event, EpochEnded) and event.evaluation:
            for name, value in event.evaluation.items():
                self._writer.add_scalar(f"validation/{name}", value, event.step)

    def close(self) -> None:
        """Closes the writer."""
        self._writer.close()
