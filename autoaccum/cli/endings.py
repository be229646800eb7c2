"""How a command ends when something goes wrong: one line for a person, one number for a script."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoaccum.errors import AutoaccumError

__all__ = ["FAILED", "INTERRUPTED", "NOT_SAVED", "ChildFailed", "exit_code", "one_line"]

FAILED = 1
NOT_SAVED = 5  # trained, but something could not be saved
INTERRUPTED = 130


class ChildFailed(Exception):
    """What a child process failed with, told as it would have been here, with its traceback and that exit code."""

    def __init__(self, line: str, code: int, trace: str, savers: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(line)
        self.code, self.trace, self.savers = code, trace, savers


def exit_code(error: BaseException) -> int:
    """What the process ends with: an error of ours knows its own, all others are a failure."""
    if isinstance(error, ChildFailed):
        return error.code
    return error.exit_code if isinstance(error, AutoaccumError) else FAILED


def one_line(error: BaseException) -> str:
    """The error in one line; one that is not ours with its type, and the line of the user's code it passed through."""
    if isinstance(error, ChildFailed):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, AutoaccumError):
        return " ".join(lines)
    if isinstance(error, SystemExit):
        what = f"the code ended the program itself, with sys.exit({error.code!r})"
        return f'{what}{_where(error)}: put what a script does below `if __name__ == "__main__":`'
    text = lines[0] if lines else "no message"
    if any("Traceback (most recent call last)" in line for line in lines):
        text += f" {lines[-1]}"  # a DataLoader's worker failed: its own error stands at the end of its traceback
    where = "" if isinstance(error, SyntaxError) else _where(error)  # a SyntaxError's text names file and line
    return f"{type(error).__name__}: {text}{where}; --debug shows the traceback"


def _where(error: BaseException) -> str:
    """ " (train.py, line 12, in build)": the innermost line of the user's own code, else the innermost of all."""
    import traceback  # on use, as below: `--help` never needs it

    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    theirs = [
        frame
        for frame in frames
        if not frame.filename.startswith("<") and not os.path.realpath(frame.filename).startswith(_not_the_users())
    ]
    frame = (theirs or list(frames))[-1]
    path = os.path.relpath(frame.filename)
    return f" ({frame.filename if path.startswith(os.pardir) else path}, line {frame.lineno}, in {frame.name})"


@functools.cache
def _not_the_users() -> tuple[str, ...]:
    """The folders of Python, of what is installed, and of this package."""
    import sysconfig

    paths = sysconfig.get_paths()
    folders = (paths["stdlib"], paths["purelib"], paths["platlib"], Path(__file__).parent.parent)
    return tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
