"""`autoaccum devices`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from autoaccum.cli.command import Answer, Command

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["devices"]


@click.command(cls=Command, short_help="List the devices and what is free on them.")
def devices() -> Answer:
    """List the devices that could be trained on, what is free on them, and who uses them."""
    from autoaccum.memory.device import devices as found

    return Answer({"devices": found()}, _view)


def _view(values: Mapping[str, Any]) -> "RenderableType":
    from autoaccum.display.terminal import devices_view

    return devices_view(values["devices"])
