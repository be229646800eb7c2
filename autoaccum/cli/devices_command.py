"""`autoaccum devices`."""

import click

from autoaccum.cli.command import Answer, Command

__all__ = ["devices"]


@click.command(cls=Command, short_help="List the devices and what is free on them.")
def devices() -> Answer:
    """List the devices that could be trained on, what is free on them, and who uses them."""
    from autoaccum.memory.device import devices as found

    return Answer({"devices": found()}, "devices_view")
