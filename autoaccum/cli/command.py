"""What every command has: `--json`, `--debug`, a result on stdout alone, and an exit code.

A command is a function that returns an `Answer`; it prints nothing itself. While it works, stdout leads to stderr, so
that whatever the user's code or a library prints, down to a child process, cannot get between the lines of a result.

Signals: Ctrl-C arrives as KeyboardInterrupt and ends in `Command.invoke` with 130. SIGTERM is left to the system, which
ends the process at once; a shell reports 143. `fit` listens to both itself, by `Stopping`: the window in progress is
finished and saved first. A second signal ends the program at once, and so does the first one where there is nothing to
save: before the training has begun, after it, and without a folder for checkpoints.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import click

from autoaccum.cli.options import Switch
from autoaccum.errors import AutoaccumError
from autoaccum.files import plain_json

__all__ = ["FAILED", "INTERRUPTED", "NOT_SAVED", "Answer", "ChildFailed", "Command", "Ended", "Stopping", "exit_code",
           "first_rank", "one_line", "saved"]  # fmt: skip

FAILED = 1
NOT_SAVED = 5  # trained, but something could not be saved
INTERRUPTED = 130
SCHEMA = 1  # of what --json prints
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Answer(NamedTuple):
    """What a command found: `values` for `--json`, the view of display/terminal.py that draws them, the exit code."""

    values: Mapping[str, Any]
    view: str
    code: int = 0


class ChildFailed(Exception):
    """What a child process failed with: `line` and `code` as they would have been here, its `trace` and `savers`."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        super().__init__(told["line"])
        self.code, self.trace, self.savers = told["code"], told["trace"], told["savers"]


class Command(click.Command):
    """A command that returns an Answer."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.params += [
            click.Option(["--json", "as_json"], is_flag=True, help="Print the result as one JSON object."),
            click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Spell out the options that may stand without their value, then parse."""
        switches = [param for param in self.params if isinstance(param, Switch)]
        end = args.index("--") if "--" in args else len(args)
        for switch in switches:
            args = [switch.spelled_out(word) for word in args[:end]] + args[end:]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> None:
        """Run the command, print its answer and exit with its code."""
        as_json, debug = ctx.params.pop("as_json"), ctx.params.pop("debug")
        ctx.params = {name: value for name, value in ctx.params.items() if value is not None}  # what was not given
        try:
            with _stdout_to_stderr():
                answer: Answer = super().invoke(ctx)
            if first_rank():
                _print(answer, as_json=as_json)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click reports its own usage errors well, and ends quietly where the result's reader went away
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(INTERRUPTED)
        except Ended as ended:
            click.echo(f"Ended by {ended}.", err=True)
            ctx.exit(ended.exit_code)
        except (Exception, SystemExit) as error:  # the edge of the program: every error becomes one line and a code
            if debug and isinstance(error, ChildFailed):
                click.echo(error.trace, err=True, nl=False)
            elif debug:
                sys.excepthook(type(error), error, error.__traceback__)
            click.echo(f"Error: {one_line(error)}", err=True)
            if savers := getattr(error, "savers", ()):
                from autoaccum.display.layout import open_console
                from autoaccum.display.terminal import savers_view

                open_console().print(savers_view(savers))
            ctx.exit(exit_code(error))
        ctx.exit(answer.code)


def first_rank() -> bool:
    """Whether this process is the one that speaks: of several that a launcher such as torchrun started, the first."""
    return os.environ.get("RANK", "0") == "0"


def saved(path: Path | None, what: str, write: Callable[[Path], object]) -> bool:
    """Write one file at the end of the work, if it was asked for; False, and a line on stderr, where that fails.

    The work may have taken days: what cannot be written is told, the result is printed all the same, and the exit code
    says that something is missing.
    """
    if path is None or not first_rank():
        return True
    try:
        write(path)
    except (AutoaccumError, OSError) as error:
        click.echo(f"Error: {what} could not be saved to {str(path)!r}: {error}", err=True)
        return False
    click.echo(f"Saved {what} to {str(path)!r}.", err=True)
    return True


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Lead what is printed to stderr: Python's stream, and below it the descriptor, which child processes inherit."""
    with contextlib.ExitStack() as stack:
        try:
            out, err = sys.stdout.fileno(), sys.stderr.fileno()
        except (AttributeError, OSError, ValueError):  # closed, or an object in memory
            out = err = -1
        if out >= 0:
            sys.stdout.flush()
            kept = os.dup(out)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, out)
            stack.callback(sys.stdout.flush)  # what was printed around the redirection belongs to stderr as well
            os.dup2(err, out)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def _print(answer: Answer, *, as_json: bool) -> None:
    if as_json:
        import json

        click.echo(json.dumps(plain_json({**answer.values, "schema": SCHEMA}), allow_nan=False))
        return
    from autoaccum.display import terminal
    from autoaccum.display.layout import open_console

    console, drawn = open_console(sys.stdout), getattr(terminal, answer.view)(answer.values)
    if console.is_terminal:
        console.print(drawn)
        return
    with console.capture() as capture:
        console.print(drawn)
    # Without the blanks that fill a table's cells, so that a result can be pasted anywhere.
    console.file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))
    console.file.flush()


# --- how a command ends when something goes wrong: one line for a person, one number for a script ---


def exit_code(error: BaseException) -> int:
    """What the process ends with: an error of ours knows its own, all others are a failure."""
    if isinstance(error, ChildFailed):
        return int(error.code)
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
    outside = [frame for frame in frames if not frame.filename.startswith("<")]
    theirs = [frame for frame in outside if not os.path.realpath(frame.filename).startswith(_not_the_users())]
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


# --- signals ---


class Ended(BaseException):
    """A signal that ends the program at once, with `exit_code`. No interruption: nothing is saved on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(_NAMES[signal.Signals(number)])
        self.exit_code = 128 + number


class Stopping:
    """A context in which signals wait for the window's end; given to the training as a listener of its events.

    `exit_code` is what the program ends with; None where no signal came.
    """

    def __init__(self, *, saves: bool) -> None:
        """`saves`: whether there is a folder for checkpoints, so that waiting is worth it."""
        self.exit_code: int | None = None
        self._saves, self._trains = saves, False
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():  # elsewhere signals are somebody else's
            for number in _NAMES:
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self, event: Any) -> None:
        """Asks the training to stop, if a signal did."""
        if event.name == "start":
            self._trains = True
        if self.exit_code is not None:
            from autoaccum.training.events import StopTraining

            raise StopTraining(f"ended by {_NAMES[signal.Signals(self.exit_code - 128)]}")
        if event.name == "end":
            self._trains = False

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked worker, which inherited this: its parent decides
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.exit_code is not None or not (self._trains and self._saves):
            raise Ended(number)
        self.exit_code = 128 + number
        name = _NAMES[signal.Signals(number)]
        click.echo(f"{name}: the window is finished and saved first; once more ends at once.", err=True)
