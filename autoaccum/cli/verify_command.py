"""`autoaccum verify`."""

from typing import Any

import click

from autoaccum.cli.calling import arguments_of, call
from autoaccum.cli.command import Answer, Command
from autoaccum.cli.endings import FAILED
from autoaccum.cli.options import takes_all, target_argument

__all__ = ["verify"]


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
