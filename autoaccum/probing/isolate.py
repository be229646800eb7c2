"""A probe in a child process: a hard kill takes the child, not the training.

The child writes each trial into the journal before it starts, and tells which journal that is. When the system kills
it, the next child reads there which trial that was, tries it once more, and takes a second kill for a size that does
not fit. What the child has to say comes back as JSON: nothing is unpickled here.

Ctrl-C is the parent's to hear, also where a terminal sends it to both. A child whose parent is gone, however it went,
ends at once and in silence: nobody waits for it, and its memory is wanted.
"""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from autoaccum import errors
from autoaccum.errors import AutoaccumError, NothingFitsError, ProbeError, SetupError, shown
from autoaccum.probing.journal import Journal, Owner
from autoaccum.probing.outcome import KILLED, Trial
from autoaccum.settings import taken_by

__all__ = ["MOST_KILLS", "InChild", "Isolation", "Killed", "Send", "answer_of_children", "isolation", "run_in_child"]

Send = Callable[[str, Any], None]

# Two for each size that kills: halving a size from the largest that any probe starts with comes to one in 16 steps.
MOST_KILLS = 40
LOOK_SECONDS = 0.2  # between two looks whether a silent child is alive


_kept_here: list[Journal] = []  # by this process, where it is a child


class Killed(Exception):
    """The child ended without a word; `code` is its exit status, negative for a signal."""

    def __init__(self, code: int) -> None:
        super().__init__(signal.Signals(-code).name if code < 0 else f"exit status {code}")
        self.code = code


@dataclass(frozen=True)
class InChild:
    """What a probe has to know that runs in a child.

    Attributes:
        send: how it tells its parent which journal it keeps.
        climbs: whether it looks at the ladder's rungs itself where nothing fits; else its parent does, by a child each.
    """

    send: Send
    climbs: bool = True

    def keeps(self, journal: Journal) -> None:
        """Tells which one. The parent takes it away at the end: a ladder's later rungs rest on the kills before."""
        _kept_here.append(journal)
        self.send("journal", {"path": str(journal.path), "key": journal.key, "owner": journal.owner._asdict()})


@dataclass(frozen=True)
class Isolation:
    """A probe in a child process: the function that probes there, and what gives it fit's arguments there."""

    work: Callable[..., Any]
    factory: Callable[[], Mapping[str, Any]]


class Packed:
    """The arguments themselves, for a child process: its copies share no memory with what is trained here."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Packs them.

        Raises:
            SetupError: one cannot be pickled; which, and why.
        """
        try:
            self._bytes = _packed(arguments)
        except Exception as error:  # whatever a class of the user's raises where it is pickled
            for name, value in arguments.items():
                try:
                    _packed(value)
                except Exception as own:
                    raise _unsendable(name, value, own) from own
            raise _unsendable("these arguments", dict(arguments), error) from error

    def __call__(self) -> dict[str, Any]:
        """Copies of them, in the host's memory.

        Raises:
            SetupError: a class or function among them cannot be found again here.
        """
        import torch

        try:
            found: dict[str, Any] = torch.load(io.BytesIO(self._bytes), map_location="cpu", weights_only=False)
        except (AttributeError, ImportError) as error:
            raise SetupError(
                f"what isolate=True sent to a child process is not found there ({error}): define it in a file that can "
                "be imported, or give isolate=f, a function that returns fit's arguments anew"
            ) from error
        return found


def _packed(value: Any) -> bytes:
    import torch  # in here: the command line's parent does without it

    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unsendable(name: str, value: Any, error: Exception) -> SetupError:
    return SetupError(
        f"isolate=True: {name}={shown(value)} cannot be sent to a child process: {error}. Define it at a module's top "
        "level, or give isolate=f, a function there that returns fit's arguments anew"
    )


def isolation(
    isolate: Any, work: Callable[..., Any], model: Any, data: Any, asked: Mapping[str, Any]
) -> Isolation | InChild | None:
    """How a probe runs that `isolate` asks for.

    Args:
        isolate: as in `prepare`.
        work: probes in the child.
        model: without a wrapper that communicates.
        data, asked: the arguments of `probe`, which a child gets copies of where isolate is True.

    Raises:
        SetupError: nothing that a child could build the model with, or arguments that cannot be sent there.
    """
    if isolate is None or isolate is False:
        return None
    if isinstance(isolate, InChild):
        return isolate
    if isolate is not True and not callable(isolate):
        raise SetupError(
            f"isolate={shown(isolate)}: give True, or a function at a module's top level that returns fit's arguments "
            "as a dict, with which a child process builds a model of its own"
        )
    if isolate is not True:
        return Isolation(work, isolate)
    here = {"isolate", "callbacks", "progress", "group", "cache", "memory", "device"}  # which the child is told or not
    names = [name for name in taken_by("probe") if name in asked and name not in here]
    return Isolation(work, Packed({"model": model, "data": data, **{name: asked[name] for name in names}}))


def answer_of_children(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    listen: Callable[[str, Any], None],
    lost: Callable[[Trial], None] = lambda trial: None,
) -> Any:
    """What `work(send, *arguments, killed)` returns in a child that lives to its end; a new one for each killed.

    Args:
        work: as for `run_in_child`; it probes with an InChild, and is given the trials that killed a child before.
        arguments: picklable.
        listen: called for what the children send beside their journals.
        lost: told of each trial that killed a child.

    Raises:
        ProbeError: a child was killed outside of any trial, or too many were.
        SetupError: an argument cannot be pickled.
        AutoaccumError: as `run_in_child`.
    """
    for argument in arguments:
        try:
            pickle.dumps(argument)
        except Exception as error:
            raise SetupError(
                f"{shown(argument)} cannot be sent to a child process: {error}; isolate= takes a function with a name, "
                "at a module's top level"
            ) from error
    killed: list[Trial] = []
    journals: list[Journal] = []
    answered = False
    try:
        while len(killed) < MOST_KILLS:
            fresh = _Attempt(listen)
            try:
                answer = run_in_child(work, (*arguments, [trial.to_dict() for trial in killed]), fresh.heard)
                answered = True
                return answer
            except NothingFitsError:
                answered = True
                raise
            except Killed as error:
                trials = fresh.lost(str(error))
            except BaseException:  # an interrupt, or what a listener raises: the child was stopped, and did not fail
                fresh.forgive()
                raise
            finally:
                journals += fresh.journals
            killed += trials
            for trial in trials:
                lost(trial)
        raise ProbeError(
            f"{len(killed)} child processes were killed one after another, the last at {killed[-1].batch} samples: "
            "give memory= a smaller budget, or max_batch= a smaller size"
        )
    finally:
        for journal in journals:
            journal.clear() if answered else journal.clear_if_idle()


class _Attempt:
    """What one child tells while it runs, its journals kept aside."""

    def __init__(self, listen: Callable[[str, Any], None]) -> None:
        self._listen = listen
        self.journals: list[Journal] = []

    def heard(self, name: str, value: Any) -> None:
        if name == "journal":
            self.journals.append(Journal(Path(value["path"]), value["key"], Owner.of(value["owner"])))
        else:
            self._listen(name, value)

    def lost(self, why: str) -> list[Trial]:
        """The trial that the child was in when it was killed.

        Raises:
            ProbeError: it was in none.
        """
        begun = dict.fromkeys(trial for trial in (journal.begun() for journal in self.journals) if trial is not None)
        if not begun:
            raise ProbeError(
                f"the probe's child process ended outside of any trial: {why}; it was killed while the model was "
                "built, or its trials could not be written down: look at what builds it, or probe without a child "
                "(isolate=False, --no-isolate)"
            )
        return [Trial(size, kind, None, None, 0.0, KILLED, length) for size, kind, length in begun]

    def forgive(self) -> None:
        for journal in self.journals:
            journal.forgive()


def run_in_child(
    work: Callable[..., Any], arguments: tuple[Any, ...], listen: Callable[[str, Any], None] | None = None
) -> Any:
    """`work(send, *arguments)` in a spawned process; what it returns, as plain JSON values.

    Args:
        work: a function at a module's top level; `send(name, value)` calls `listen` here while it runs.
        arguments: picklable.
        listen: called for what the child sends.

    Raises:
        Killed: the child ended without saying why.
        AutoaccumError: of the kind the child raised; any other error of the child's comes as ProbeError. Its cause has
            the child's traceback.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    # No daemon, which could have no children of its own: the user's code may have some, to read data with.
    child = context.Process(target=_child, args=(there, work, arguments))
    with _interrupts_wait():  # the child is born with them held back
        child.start()
    there.close()
    try:
        while True:
            said = _heard(here, child)
            if said is None:
                child.join()
                raise Killed(child.exitcode or 0)
            name, value = json.loads(said)
            if name == "return":
                child.join()
                return value
            if name == "raise":
                child.join()
                raise _error(value) from _InChild(value["traceback"])
            if listen is not None:
                listen(name, value)
    finally:
        if child.is_alive():
            child.terminate()
            child.join(timeout=5.0)
            child.kill()  # what hears no SIGTERM, or takes too long over it
            child.join()
        here.close()


def _heard(here: Connection, child: Any) -> bytes | None:
    """The child's next message; None where it is gone and left none.

    Processes that the child started have both of its pipes as well, so neither need end with it: it is looked at.
    """
    while not here.poll(LOOK_SECONDS):
        if not child.is_alive() and not here.poll():
            return None
    try:
        return here.recv_bytes()
    except EOFError:
        return None


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Holds Ctrl-C back, where the system can: a process that begins inside begins so, and here it comes afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # which, where it is started, lets interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(there: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_the_parent, daemon=True).start()

    def send(name: str, value: Any) -> None:
        try:
            there.send_bytes(json.dumps([name, value]).encode())
        except BrokenPipeError:
            os._exit(1)  # the parent is gone

    try:
        send("return", work(send, *arguments))
    except (Exception, SystemExit) as error:
        known = type(error).__name__ if isinstance(error, AutoaccumError) else None
        text = str(error) if known else f"{type(error).__name__}: {error}"
        send("raise", {"kind": known, "text": text, "traceback": traceback.format_exc()})


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    wait([parent.sentinel])
    try:
        for journal in _kept_here:
            journal.forgive()  # it was no kill of a trial's
    finally:
        os._exit(1)


class _InChild(Exception):
    """Stands for the child's own error as the cause of one raised here."""

    def __init__(self, text: str) -> None:
        super().__init__(f"in the child process:\n\n{text}")


def _error(value: Mapping[str, Any]) -> AutoaccumError:
    if value["kind"] in errors.__all__:
        made: AutoaccumError = getattr(errors, value["kind"])(value["text"])
        return made
    return ProbeError(f"the probe's child process failed: {value['text']}")
