"""The command line's options: fit's keywords under the same names, each described once for all commands.

Every default is None, which means "not given": a command gets what was given alone (command.py), so that the dict of
TARGET, and below it the library's own defaults, hold.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from autoaccum.errors import MissingExtraError, PlanError, SetupError
from autoaccum.settings import SETTINGS, taken_by
from autoaccum.units import check_memory

__all__ = ["COUNT", "Switch", "new_file", "read_by", "takes", "takes_all", "target_argument"]

Function = TypeVar("Function", bound=Callable[..., Any])

COUNT = click.IntRange(min=1)


def read_by(read: Callable[[Any], Any]) -> Callable[..., Any]:
    """An option's callback: what `read` makes of its value, where it stood there; what it refuses is a usage error."""

    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        try:
            return None if value in (None, ()) else read(value)
        except (PlanError, SetupError) as error:
            raise click.BadParameter(str(error), ctx, param) from None
        except MissingExtraError as error:  # no mistake in what was written
            raise click.ClickException(str(error)) from None

    return callback


def _memory(value: str) -> str:
    """Checked here, and passed on as it is."""
    check_memory(value)
    return value


def _in_a_folder(value: Path, *, picture: bool = False) -> Path:
    """A file that is written when the work is done has to be known to have a folder before it begins; and a picture to
    be of a kind that can be drawn.
    """
    if not value.parent.is_dir():
        raise SetupError(f"{str(value)!r}: there is no folder {str(value.parent)!r}; make it first")
    if picture:
        from autoaccum.display.plots import picture_format

        picture_format(value)
    return value


class Switch(click.Option):
    """`--check`, `--no-check`, and with a word of its own `--check=warn`."""

    def __init__(self, declarations: list[str], *, word: str, **keywords: Any) -> None:
        truth = {"yes": True, "no": False}  # as fit takes it: True, False or the word itself
        callback = lambda ctx, param, value: truth.get(value, value)  # noqa: E731
        super().__init__(declarations, type=click.Choice(["yes", word, "no"]), callback=callback, **keywords)
        self.on, self.off = declarations[0], f"--no-{declarations[0][2:]}"
        self.word = word

    def spelled_out(self, argument: str) -> str:
        """`argument` with the value that stands for it, where it is this option without one."""
        return {self.on: f"{self.on}=yes", self.off: f"{self.on}=no"}.get(argument, argument)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """The forms it has, for --help."""
        return f"{self.on}[={self.word}] / {self.off}", self.help or ""


def _option(name: str) -> Callable[[Any], Any]:
    """The option of a setting, of the kind that the setting says."""
    setting = SETTINGS[name]
    dashed = f"--{name.replace('_', '-')}"
    if setting.kind == "flag":
        return click.option(f"{dashed}/--no-{dashed[2:]}", name, default=None, help=setting.words)
    if setting.kind == "switch":
        return click.option(dashed, name, cls=Switch, word=setting.choices[0], help=setting.words)
    if setting.kind == "bytes":
        return click.option(dashed, name, metavar="SIZE", callback=read_by(_memory), help=setting.words)
    kind = click.Choice(setting.choices) if setting.kind == "word" else _KINDS[setting.kind]
    called = setting.metavar or _CALLED.get(setting.kind)
    return click.option(dashed, name, type=kind, metavar=called, help=setting.words)


_CALLED = {"count": "N", "steps": "N", "seed": "N", "text": "NAME", "file": "FILE", "folder": "DIR"}
_KINDS: dict[str, Any] = {
    "count": COUNT,
    "steps": click.IntRange(min=0),
    "number": click.FloatRange(min=0, min_open=True),
    "seed": click.IntRange(min=0),
    "text": str,
    "file": click.Path(exists=True, dir_okay=False),
    "folder": click.Path(file_okay=False),
}


def takes_all(function: str, *, but: Sequence[str] = ()) -> Callable[[Function], Function]:
    """The options of all settings that `autoaccum.<function>` takes and that can be written on a command line."""
    return takes(*(name for name in taken_by(function) if SETTINGS[name].kind != "python" and name not in but))


def takes(*names: str) -> Callable[[Function], Function]:
    """The options of these names, in this order."""

    def decorate(function: Function) -> Function:
        for name in reversed(names):
            function = _option(name)(function)
        return function

    return decorate


def new_file(name: str, text: str, *, picture: bool = False) -> Callable[[Function], Function]:
    """An option for a file that the command writes at its end."""
    read = read_by(functools.partial(_in_a_folder, picture=picture))
    kind = click.Path(dir_okay=False, writable=True, path_type=Path)
    return click.option(f"--{name}", type=kind, metavar="FILE", callback=read, help=text)


target_argument = click.argument("target", metavar="TARGET")
