"""Files that a command writes when its work is done.

The work may have taken days: what cannot be written then is told, the result is printed all the same, and the exit code
says that something is missing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autoaccum.errors import AutoaccumError
from autoaccum.files import whole_file

if TYPE_CHECKING:
    from torch import nn

__all__ = ["saved", "write_weights"]


def saved(path: Path | None, what: str, write: Callable[[Path], object]) -> bool:
    """Write one file, if it was asked for; False, and a line on stderr, where that fails."""
    if path is None:
        return True
    try:
        write(path)
    except (AutoaccumError, OSError) as error:
        click.echo(f"Error: {what} could not be saved to {str(path)!r}: {error}", err=True)
        return False
    click.echo(f"Saved {what} to {str(path)!r}.", err=True)
    return True


def write_weights(model: "nn.Module", path: Path) -> None:
    """The model's `state_dict()` by `torch.save`: whole, or the file that was there before stays."""
    import torch

    with whole_file(path) as file:
        torch.save(model.state_dict(), file)
