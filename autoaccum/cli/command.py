"""What every command has: `--json`, `--debug`, a result on stdout alone, and an exit code.

A command is a function that returns an `Answer`; it prints nothing itself. While it works, stdout leads to stderr, so
that whatever the user's code or a library prints, down to a child process, cannot get between the lines of a result.

Signals: Ctrl-C arrives as KeyboardInterrupt and ends in `Command.invoke` with 130. SIGTERM is left to the system, which
ends the process at once; a shell reports 143. `fit` listens to both itself (stopping.py).
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from autoaccum.cli.endings import INTERRUPTED, ChildFailed, exit_code, one_line
from autoaccum.cli.options import Switch
from autoaccum.cli.stopping import Ended
from autoaccum.errors import AutoaccumError
from autoaccum.files import plain_json

__all__ = ["Answer", "Command", "first_rank", "saved"]

SCHEMA = 1  # of what --json prints


class Answer(NamedTuple):
    """What a command found: `values` for `--json`, the view of display/terminal.py that draws them, the exit code."""

    values: Mapping[str, Any]
    view: str
    code: int = 0


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
        try:
            with _stdout_to_stderr():
                answer: Answer = super().invoke(ctx)
            if first_rank():
                _print(answer, as_json=as_json)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise  # click's own usage errors, which it reports well
        except BrokenPipeError:
            raise  # whoever read the result went away: click ends quietly
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(INTERRUPTED)
        except Ended as signal:
            click.echo(f"Ended by {signal}.", err=True)
            ctx.exit(signal.exit_code)
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
    if path is None:
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
