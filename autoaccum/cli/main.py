"""The `autoaccum` command and its list of commands. Nothing here, nor in what it imports, imports torch."""

import click

from autoaccum.cli.devices_command import devices
from autoaccum.cli.fit_command import fit
from autoaccum.cli.plan_command import plan
from autoaccum.cli.probe_command import probe
from autoaccum.cli.search_command import search
from autoaccum.cli.verify_command import verify

__all__ = ["cli"]


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


for _command in (probe, plan, fit, verify, search, devices):
    cli.add_command(_command)
