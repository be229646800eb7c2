"""`autoaccum search`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoaccum.cli.command import Answer, Command
from autoaccum.cli.endings import NOT_SAVED
from autoaccum.cli.options import COUNT, given, new_file, takes, target_argument
from autoaccum.cli.saving import saved

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["search"]


@click.command(cls=Command, short_help="Search hyperparameters with Optuna.")
@target_argument
@click.option("--n-trials", type=COUNT, metavar="N", required=True, help="Trainings to run.")
@click.option("--workers", type=COUNT, metavar="N", help="Processes that train at once.")
@click.option("--storage", metavar="S", help="Where Optuna keeps the study, such as sqlite:///study.db.")
@click.option("--study-name", metavar="NAME", help="The study's name in that storage.")
@takes("target_batch", "epochs", "max_steps", "memory", "device", "precision", "max_batch", "cache", "check")
@new_file("save", "Save the result, with the best plan.")
def search(
    *,
    target: str,
    n_trials: int,
    workers: int | None,
    storage: str | None,
    study_name: str | None,
    save: Path | None,
    **options: Any,
) -> Answer:
    """Train with many hyperparameters and find the best.

    TARGET is called with an Optuna trial: `def build(trial): return {"lr": trial.suggest_float(...), ...}`.
    """
    import autoaccum
    from autoaccum.cli.target import Target

    setup = Target.parse(target, given(options))
    setup.load()  # a wrong TARGET is a usage error at once, and not one in every worker
    study = given({"workers": workers, "storage": storage, "study_name": study_name})
    result = autoaccum.search(setup, n_trials=n_trials, **study)
    done = saved(save, "the result", result.save)
    return Answer(result.to_dict(), _view, 0 if done else NOT_SAVED)


def _view(values: Mapping[str, Any]) -> "RenderableType":
    from autoaccum.display.terminal import search_view

    return search_view(values)
