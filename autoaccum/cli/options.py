"""The command line's options: fit's keywords under the same names, each described once for all commands.

Every default is None, which means "not given": what was not given is not passed on, so that the dict of TARGET, and
below it the library's own defaults, hold.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from autoaccum.errors import AutoaccumError, SetupError, shown
from autoaccum.units import parse_bytes

__all__ = ["COUNT", "Switch", "given", "new_file", "new_picture", "takes", "target_argument"]

Function = TypeVar("Function", bound=Callable[..., Any])

COUNT = click.IntRange(min=1)
_ABOVE_0 = click.FloatRange(min=0, min_open=True)
_NEW = click.Path(dir_okay=False, writable=True, path_type=Path)


def _memory(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Bytes, a size such as "8GiB", or a share of the device such as "80%": checked here, and passed on as it is."""
    if value is None:
        return None
    try:
        if not value.endswith("%"):
            parse_bytes(value)
        elif not 0 < float(value[:-1]) <= 100:
            raise ValueError(value)
    except SetupError as error:
        raise click.BadParameter(str(error), ctx, param) from None
    except ValueError:
        text = f"{shown(value)} is not a share of the memory: write one above 0% and at most 100%, such as 80%"
        raise click.BadParameter(text, ctx, param) from None
    return value


def _folder_there(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """A file that is written when the work is done has to be known to have a folder before it begins."""
    if value is not None and not value.parent.is_dir():
        text = f"{str(value)!r}: there is no folder {str(value.parent)!r}; make it first"
        raise click.BadParameter(text, ctx, param)
    return value


def _picture(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """As `_folder_there`, and a picture has to be of a kind that can be drawn."""
    from autoaccum.display.plots import picture_format

    if value is not None:
        _folder_there(ctx, param, value)
        try:
            picture_format(value)
        except AutoaccumError as error:
            raise click.BadParameter(str(error), ctx, param) from error
    return value


def _truth(ctx: click.Context, param: click.Parameter, value: str | None) -> bool | str | None:
    """A Switch's word as fit takes it: True, False or the word itself."""
    return None if value is None else {"yes": True, "no": False}.get(value, value)


class Switch(click.Option):
    """`--check`, `--no-check`, and with a word of its own `--check=warn`."""

    def __init__(self, declarations: list[str], *, word: str, **keywords: Any) -> None:
        super().__init__(declarations, type=click.Choice(["yes", word, "no"]), callback=_truth, **keywords)
        self.on, self.off = declarations[0], f"--no-{declarations[0][2:]}"
        self.word = word

    def spelled_out(self, argument: str) -> str:
        """`argument` with the value that stands for it, where it is this option without one."""
        return {self.on: f"{self.on}=yes", self.off: f"{self.on}=no"}.get(argument, argument)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """The forms it has, for --help."""
        return f"{self.on}[={self.word}] / {self.off}", self.help or ""


def _choice(*words: str) -> "click.Choice[str]":  # quoted: generic for type checkers only in older click
    return click.Choice(words)


def _option(name: str, kind: Any, text: str, metavar: str | None = None) -> Callable[[Function], Function]:
    return click.option(f"--{name.replace('_', '-')}", name, type=kind, metavar=metavar, help=text)


def _flag(name: str, text: str) -> Callable[[Function], Function]:
    dashed = name.replace("_", "-")
    return click.option(f"--{dashed}/--no-{dashed}", name, default=None, help=text)


def _switch(name: str, word: str, text: str) -> Callable[[Function], Function]:
    return click.option(f"--{name}", name, cls=Switch, word=word, help=text)


_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "target_batch": _option("target_batch", COUNT, "Samples per optimizer step, over all ranks.", "N"),
    "memory": click.option(
        "--memory", metavar="SIZE", callback=_memory, help='A hard budget: "8GiB", bytes, or "80%" of the device.'
    ),
    "device": _option("device", str, '"cpu", "cuda:1", ...; the best there is if not given.', "NAME"),
    "precision": _option("precision", _choice("auto", "fp32", "bf16", "fp16"), "Autocast."),
    "accumulate": _option("accumulate", _choice("fp32", "native"), "What bf16 and fp16 gradients are summed in."),
    "reduction": _option(
        "reduction",
        _choice("auto", "sample_mean", "token_mean", "weighted_mean", "element_mean", "sum"),
        "What the loss is a mean over.",
    ),
    "optimizer": _option("optimizer", str, 'One of torch\'s by name: "adamw", "sgd", ...', "NAME"),
    "lr": _option("lr", _ABOVE_0, "Learning rate.", "LR"),
    "lr_batch": _option("lr_batch", COUNT, "The batch that the learning rate was tuned at.", "N"),
    "lr_rule": _option(
        "lr_rule",
        _choice("auto", "linear", "sqrt", "adam-sde", "none"),
        "How the learning rate goes from lr-batch to target-batch.",
    ),
    "schedule": _option("schedule", _choice("constant", "linear", "cosine"), "Learning rate over the steps."),
    "warmup_steps": _option("warmup_steps", click.IntRange(min=0), "Optimizer steps of warm-up.", "N"),
    "epochs": _option("epochs", COUNT, "Passes over the data.", "N"),
    "max_steps": _option("max_steps", COUNT, "Optimizer steps, over as many epochs as it takes.", "N"),
    "shuffle": _flag("shuffle", "Shuffle a Dataset or tensors; a DataLoader keeps its own order."),
    "clip_norm": _option("clip_norm", _ABOVE_0, "Clip the window's gradient to this norm.", "NORM"),
    "batch_norm": _option("batch_norm", _choice("pooled", "momentum", "keep"), "BatchNorm's running statistics."),
    "tail": _option("tail", _choice("step", "drop"), "What becomes of a short last window."),
    "prefer": _option("prefer", _choice("fewest", "fastest"), "Fewest micro-batches, or the fastest as measured."),
    "micro_batch": _option("micro_batch", COUNT, "Use this size: no probe.", "N"),
    "plan": _option(
        "plan", click.Path(exists=True, dir_okay=False), "A saved plan: neither probe nor arithmetic.", "FILE"
    ),
    "multiple_of": _option("multiple_of", COUNT, "Prefer micro-batches that are multiples of N.", "N"),
    "max_batch": _option("max_batch", COUNT, "No micro-batch above this size.", "N"),
    "isolate": _flag("isolate", "Run trials in a child process, which a kill may take."),
    "cache": _flag("cache", "Reuse answers of earlier probes."),
    "check": _switch("check", "warn", "Check the accumulated gradient before training, or only warn."),
    "checkpoint": _option("checkpoint", click.Path(file_okay=False), "Folder for checkpoints.", "DIR"),
    "checkpoint_every": _option("checkpoint_every", COUNT, "Optimizer steps between checkpoints.", "N"),
    "resume": _switch("resume", "auto", "Go on from the last checkpoint: it must be there, or only if it is."),
    "compile": _flag("compile", "Compile the model with torch.compile."),
    "ladder": _option(
        "ladder",
        _choice("auto", "bf16", "checkpointing", "save_on_cpu", "checkpointing+save_on_cpu"),
        "Where not even one sample fits: take the cheapest of these that does (auto), or this one.",
    ),
    "regrow_after": _option("regrow_after", COUNT, "Windows after which to try larger micro-batches again.", "N"),
    "on_nonfinite": _option("on_nonfinite", _choice("raise", "skip"), "What to do at a loss that is not finite."),
    "seed": _option("seed", click.IntRange(min=0), "Seed of all random numbers.", "N"),
    "progress": _flag("progress", "Tell on stderr what is going on."),
}


def takes(*names: str) -> Callable[[Function], Function]:
    """The options of these names, in this order."""

    def decorate(function: Function) -> Function:
        for name in reversed(names):
            function = _OPTIONS[name](function)
        return function

    return decorate


def new_file(name: str, text: str) -> Callable[[Function], Function]:
    """An option for a file that the command writes at its end."""
    return click.option(f"--{name}", type=_NEW, metavar="FILE", callback=_folder_there, help=text)


def new_picture(text: str) -> Callable[[Function], Function]:
    """`--plot`, for a picture that the command draws at its end."""
    return click.option("--plot", type=_NEW, metavar="FILE", callback=_picture, help=text)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that stood on the command line."""
    return {name: value for name, value in options.items() if value is not None}


target_argument = click.argument("target", metavar="TARGET")
