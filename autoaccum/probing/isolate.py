"""A probe in a child process: a hard kill takes the child, not the training.

The child writes each trial into the journal before it starts. When the system kills it, the next child reads there
which trial that was, tries it once more, and takes a second kill for a size that does not fit. What the
child has to say comes back as JSON: nothing is unpickled here.
"""

import json
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from autoaccum import errors
from autoaccum.errors import AutoaccumError, ProbeError

__all__ = ["Killed", "run_in_child"]

Send = Callable[[str, Any], None]


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
        AutoaccumError: of the kind the child raised; any other error of the child's comes as ProbeError.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(there, work, arguments), daemon=True)
    child.start()
    there.close()
    try:
        while True:
            try:
                name, value = json.loads(here.recv_bytes())
            except EOFError:
                child.join()
                raise Killed(child.exitcode or 0) from None
            if name == "return":
                child.join()
                return value
            if name == "raise":
                child.join()
                raise _error(value)
            if listen is not None:
                listen(name, value)
    finally:
        if child.is_alive():
            child.terminate()
            child.join()
        here.close()


def _child(there: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    def send(name: str, value: Any) -> None:
        there.send_bytes(json.dumps([name, value]).encode())

    try:
        send("return", work(send, *arguments))
    except Exception as error:
        known = type(error).__name__ if isinstance(error, AutoaccumError) else None
        send("raise", {"kind": known, "text": str(error), "traceback": traceback.format_exc()})


def _error(value: Mapping[str, Any]) -> AutoaccumError:
    if value["kind"] in errors.__all__:
        made: AutoaccumError = getattr(errors, value["kind"])(value["text"])
        return made
    return ProbeError(f"the probe's child process failed:\n{value['traceback']}")
