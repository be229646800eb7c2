"""`autoaccum fit`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoaccum.cli.calling import arguments_of, call, need_target_batch
from autoaccum.cli.command import Answer, Command, first_rank, saved
from autoaccum.cli.endings import NOT_SAVED, one_line
from autoaccum.cli.options import new_file, takes_all, target_argument
from autoaccum.cli.stopping import Stopping
from autoaccum.files import whole_file

if TYPE_CHECKING:
    from autoaccum.training.fit_result import FitResult

__all__ = ["fit"]


@click.command(cls=Command, short_help="Probe, plan, check and train.")
@target_argument
@takes_all("fit")
@new_file("save", "Save the trained weights: the model's state_dict.")
@new_file("save-plan", "Save the plan, for fit --plan FILE.")
def fit(target: str, save: Path | None, save_plan: Path | None, **options: Any) -> Answer:
    """Train with exactly the target batch, in as few micro-batches as fit."""
    import autoaccum

    arguments = arguments_of(autoaccum.fit, target, options)
    need_target_batch(target, arguments, "fit", or_plan=True)
    result = _trained(arguments)
    done = result.unsaved is None
    if first_rank():
        done &= saved(save, "the weights", lambda path: _write_weights(result.model, path))
        done &= saved(save_plan, "the plan", result.plan.save)
    return Answer(result.to_dict(), "fit_view", 0 if done else NOT_SAVED)


def _trained(arguments: Mapping[str, Any]) -> "FitResult":
    """What `fit` returns, unless a signal ended it: then the program ends here."""
    import warnings

    import autoaccum
    from autoaccum.training.events import TrainingWarning

    folder = arguments.get("checkpoint")
    with Stopping(saves=folder is not None) as stopping, warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)  # told on stderr as events, one line each
        arguments = {**arguments, "callbacks": [*arguments.get("callbacks", ()), stopping]}
        try:
            result: FitResult = call(autoaccum.fit, arguments)
        except Exception as error:
            if stopping.exit_code is None:
                raise
            # Workers of a DataLoader get the signal too, and a window that needed them could not be finished.
            click.echo(f"The window was not finished: {one_line(error)}", err=True)
        else:
            if result.unsaved is not None:
                click.echo(f"Error: {result.unsaved}", err=True)
            if stopping.exit_code is None:
                return result
    if first_rank():
        click.echo(f"Stopped. The same command goes on from what is saved in {str(folder)!r}.", err=True)
    raise click.exceptions.Exit(stopping.exit_code)


def _write_weights(model: Any, path: Path) -> None:
    """The model's `state_dict()` by `torch.save`: whole, or the file that was there before stays."""
    import torch

    with whole_file(path) as file:
        torch.save(model.state_dict(), file)
