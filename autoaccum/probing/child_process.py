"""Functions in spawned processes, which may be killed: what they say meanwhile, return or raise, as JSON.

A child whose parent is gone, however it went, ends: nobody waits for it, and its memory is wanted.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from autoaccum import errors
from autoaccum.errors import AutoaccumError, ProbeError, SetupError, TracebackText, shown
from autoaccum.interrupts import uninterrupted

__all__ = ["Child", "Killed", "before_ending_with_the_parent", "check_sendable", "run_in_child", "stop"]

LOOK_SECONDS = 0.2  # between two looks whether a silent child is alive

_last_calls: list[Callable[[], None]] = []  # of this process, where it is a child


class Killed(Exception):
    """The child ended without a word; `code` is its exit status, negative for a signal."""

    def __init__(self, code: int) -> None:
        known = code < 0 and -code in set(signal.Signals)
        super().__init__(signal.Signals(-code).name if known else f"exit status {code}")
        self.code = code


class Child:
    """`work(send, *arguments)` in a spawned process; `work` is a function at a module's top level, all is picklable.

    `on_interrupt` hears Ctrl-C there, which a terminal sends to both; it waits until then.
    """

    def __init__(
        self, work: Callable[..., Any], arguments: tuple[Any, ...], *, on_interrupt: Any = signal.SIG_IGN
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe(duplex=False)
        # No daemon, which could have no children of its own: the user's code may have some, to read data with.
        self.process = context.Process(target=_child, args=(there, work, arguments, on_interrupt))
        with _interrupts_wait():  # the child is born with them held back
            self.process.start()
        there.close()

    def answer(self, listen: Callable[[str, Any], None] = lambda name, value: None) -> Any:
        """What the function returns, as plain JSON values; `listen` is called for what it sends before.

        Raises:
            Killed: the child ended without saying why.
            AutoaccumError: of the kind the child raised; any other error of the child's comes as ProbeError. Its cause
                has the child's traceback.
        """
        while (said := self._heard()) is not None:
            name, value = json.loads(said)
            if name == "return":
                self.process.join()
                return value
            if name == "raise":
                self.process.join()
                raise _error(value["kind"], value["text"]) from TracebackText(value["trace"])
            listen(name, value)
        self.process.join()
        raise Killed(self.process.exitcode or 0)

    @property
    def has_spoken(self) -> bool:
        """Whether it has ended, or something that it said waits for `answer`."""
        return self._pipe.poll() or not self.process.is_alive()

    def _heard(self) -> bytes | None:
        """The child's next message; None where it is gone and left none."""
        # Processes that the child started have both of its pipes as well, so neither need end with it: it is looked at.
        while not self._pipe.poll(LOOK_SECONDS):
            if not self.process.is_alive() and not self._pipe.poll():
                return None
        with contextlib.suppress(EOFError):
            return self._pipe.recv_bytes()
        return None


@uninterrupted
def stop(children: Sequence[Child], number: int = signal.SIGTERM, patience: float = 5.0) -> None:
    """Asks them to go by a signal, and kills those that do not within `patience` seconds."""
    alive = [child.process for child in children if child.process.is_alive()]
    for process in alive:
        assert process.pid is not None
        os.kill(process.pid, number)
    deadline = time.monotonic() + patience
    for process in alive:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()


def run_in_child(
    work: Callable[..., Any], arguments: tuple[Any, ...], listen: Callable[[str, Any], None] = lambda name, value: None
) -> Any:
    """What a child answers, which ends with this call; as `Child.answer`."""
    child = Child(work, arguments)
    try:
        return child.answer(listen)
    finally:
        stop([child])


def check_sendable(values: Any, remedy: str) -> None:
    """Refuses, with a SetupError, what cannot be sent to a spawned process, or what that would not find."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    found = getattr(main, "__spec__", None) is not None or os.path.isfile(file or "")
    try:
        sent = pickle.dumps(values)
    except Exception as error:  # whatever a class of the user's raises where it is pickled
        raise SetupError(f"{shown(values)} cannot be sent to other processes: {error}; {remedy}") from error
    if not found and (file is not None or b"__main__" in sent):  # with <stdin> for a file no child can even start
        raise SetupError(
            f"{shown(values)} cannot be sent to other processes: this program is {file or 'typed in'}, which they "
            f"cannot read; {remedy}"
        )


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


def _child(there: Connection, work: Callable[..., Any], arguments: tuple[Any, ...], on_interrupt: Any) -> None:
    def send(name: str, value: Any) -> None:
        try:
            there.send_bytes(json.dumps([name, value]).encode())
        except BrokenPipeError:
            os._exit(1)  # the parent is gone

    signal.signal(signal.SIGINT, on_interrupt)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        send("return", work(send, *arguments))
    except KeyboardInterrupt:
        os._exit(130)
    except (Exception, SystemExit) as error:
        kind = next((base.__name__ for base in type(error).__mro__ if base.__name__ in errors.__all__), None)
        text = str(error) if kind else f"{type(error).__name__}: {error}"
        send("raise", {"kind": kind, "text": text, "trace": traceback.format_exc()})


def before_ending_with_the_parent(last: Callable[[], None]) -> None:
    """In a child: `last` is called before it ends because its parent is gone."""
    _last_calls.append(last)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    try:
        for last in _last_calls:
            last()
    finally:
        os._exit(1)


def _error(kind: str | None, text: str) -> AutoaccumError:
    if kind is None:
        return ProbeError(f"the probe's child process failed: {text}")
    known: type[AutoaccumError] = getattr(errors, kind)
    return known.__new__(known, text)  # not by its constructor, which may want what the text was made of
