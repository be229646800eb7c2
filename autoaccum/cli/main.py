"""The `autoaccum` command and its list of commands. Nothing here, nor in what it imports, imports torch."""

from typing import Any

import click

from autoaccum.cli.calling import arguments_of, call
from autoaccum.cli.command import Answer, Command
from autoaccum.cli.endings import FAILED
from autoaccum.cli.fit_command import fit
from autoaccum.cli.options import takes_all, target_argument
from autoaccum.cli.plan_command import plan
from autoaccum.cli.probe_command import probe
from autoaccum.cli.search_command import search

__all__ = ["cli", "verify"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="autoaccum")
def cli() -> None:
    """Train a PyTorch model with exactly the batch you ask for, on the memory you have.

    \b
    TARGET names a function that returns a dict of fit's arguments:
      train.py:build      a function in a file
      package.train:build a function in a module that can be imported
    \b
      def build():
          return {"model": model, "data": dataset, "loss": torch.nn.CrossEntropyLoss()}

    An option given here wins over the same key of that dict. The result goes to stdout, all else to stderr.

    \b
    Exit codes: 0 done, 1 failure, 2 usage, 3 nothing fits at micro-batch 1, 4 no such device,
    5 trained but something could not be saved, 130 interrupted, 143 terminated.
    """


@click.command(cls=Command, short_help="Check that the accumulated gradient is the large batch's.")
@target_argument
@takes_all("verify")
def verify(target: str, **options: Any) -> Answer:
    """Check on your own model and data that the accumulated gradient is the large batch's gradient.

    TARGET may also be a Transformers Trainer (train.py:trainer, or a function that returns one), or a tuple of a
    Lightning Trainer and its module: then that trainer's own accumulation is checked, on a few of its own samples.

    Ends with 1 where it is not, and with 0 where it is or where it cannot be told, which is then said.
    """
    import autoaccum

    report = call(autoaccum.verify, arguments_of(autoaccum.verify, target, options))
    return Answer(report.to_dict(), "verify_view", 0 if report.ok or not report.verifiable else FAILED)


@click.command(cls=Command, short_help="List the devices and what is free on them.")
def devices() -> Answer:
    """List the devices that could be trained on, what is free on them, and who uses them."""
    from autoaccum.memory.device import devices as found

    return Answer({"devices": found()}, "devices_view")


for _command in (probe, plan, fit, verify, search, devices):
    cli.add_command(_command)
