"""A function in a spawned process, which may be killed: what it says meanwhile, returns or raises, as JSON.

Ctrl-C is the parent's to hear, also where a terminal sends it to both. A child whose parent is gone, however it went,
ends at once and in silence: nobody waits for it, and its memory is wanted.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from autoaccum import errors
from autoaccum.errors import AutoaccumError, ProbeError

__all__ = ["Killed", "before_ending_with_the_parent", "run_in_child"]

LOOK_SECONDS = 0.2  # between two looks whether a silent child is alive

_last_calls: list[Callable[[], None]] = []  # of this process, where it is a child


class Killed(Exception):
    """The child ended without a word; `code` is its exit status, negative for a signal."""

    def __init__(self, code: int) -> None:
        super().__init__(signal.Signals(-code).name if code < 0 else f"exit status {code}")
        self.code = code


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


def before_ending_with_the_parent(last: Callable[[], None]) -> None:
    """In a child: `last` is called before it ends because its parent is gone."""
    _last_calls.append(last)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    wait([parent.sentinel])
    try:
        for last in _last_calls:
            last()
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
