"""`autoaccum search`."""

from pathlib import Path
from typing import Any

import click

from autoaccum.cli.command import Answer, Command, first_rank, saved
from autoaccum.cli.endings import NOT_SAVED
from autoaccum.cli.options import COUNT, given, new_file, new_picture, read_by, takes_all, target_argument
from autoaccum.cli.target import Target

__all__ = ["search"]

# Options that are the search's; the others are fit's, and each trial's.
OWN = ("metric", "direction", "budget", "sampler", "pruner", "workers", "storage", "study_name", "trust_storage",
       "seed", "progress")  # fmt: skip


def _space(values: tuple[str, ...]) -> dict[str, Any]:
    from autoaccum.searching.space import space_of_texts

    return space_of_texts(values)


@click.command(cls=Command, short_help="Search hyperparameters with Optuna.")
@target_argument
@click.option("--n-trials", type=COUNT, metavar="N", required=True, help="Trials in total, over restarts and workers.")
@click.option(
    "--space",
    metavar="NAME=VALUES",
    multiple=True,
    callback=read_by(_space),
    help="What to search, once a parameter: lr=1e-4:1e-1:log, layers=2:6, weight_decay=0,1e-4,1e-2.",
)
@click.option("--target-batch", type=COUNT, metavar="N", multiple=True, help="A batch to choose from; may be repeated.")
@click.option("--metric", metavar="NAME", help='"loss", one of the metrics, or "train_loss".')
@click.option("--direction", type=click.Choice(["minimize", "maximize"]), help="Whether less of the metric is better.")
@click.option("--budget", metavar="B", help='What a trial trains on: samples, or a time such as "90s".')
@click.option("--sampler", metavar="NAME", help="Draws the parameters: tpe, or one of Optuna's, such as random or gp.")
@click.option(
    "--pruner", metavar="NAME", help="Ends weak trials early: once, none, or one of Optuna's, such as median."
)
@click.option("--workers", metavar="N", help='Processes that train at once, or "gpus".')
@click.option("--storage", metavar="S", help="A journal file, sqlite:///study.db, postgresql://..., grpc://host:port.")
@click.option("--study-name", metavar="NAME", help="The study's name in that storage.")
@click.option("--trust-storage", is_flag=True, help="Let a sampler unpickle what stands in the study.")
@takes_all("search")
@new_file("save", "Save the result: the best plan and parameters, for fit --plan FILE.")
@new_picture("Draw history, importance, and values over batch and learning rate.")
def search(
    *,
    target: str,
    n_trials: int,
    space: dict[str, Any] | None,
    target_batch: tuple[int, ...],
    save: Path | None,
    plot: Path | None,
    **options: Any,
) -> Answer:
    """Train with many hyperparameters and find the best.

    TARGET is called for every trial, with those of the trial's parameters that it takes; the others are arguments of
    fit. Without --space they are the learning rate around the one it returns, and the target batch. The same command
    after an interruption goes on.
    """
    import autoaccum

    own = {name: options[name] for name in OWN if options[name] is not False}
    settings = given(own | {"space": space, "target_batch": target_batch or None})
    settings["progress"] = first_rank() if options["progress"] is None else options["progress"]
    for kind in {"sampler", "pruner"} & settings.keys():
        settings[kind] = _of_optuna(kind, settings[kind])
    for name in {"budget", "workers"} & settings.keys():  # numbers, or words of their own
        settings[name] = int(settings[name]) if settings[name].isdigit() else settings[name]
    if target_batch and "target_batch" in (space or {}):
        raise click.UsageError("--space target_batch=... and --target-batch say the same: leave one out")
    setup = Target.parse(target, given({name: value for name, value in options.items() if name not in OWN}))
    setup.load()  # a wrong TARGET is a usage error at once, and not one in every worker
    result = autoaccum.search(setup, n_trials=n_trials, **settings)
    done = True
    if first_rank():
        done = saved(save, "the result", result.save)
        done &= saved(plot, "the plot", result.plot)
    return Answer(result.to_dict(), "search_view", 0 if done else NOT_SAVED)


def _of_optuna(kind: str, name: str) -> Any:
    """A name of ours as it is; else the class of `optuna.samplers` or `optuna.pruners` of that name, made anew."""
    if name in ("tpe", "once", "none"):
        return name
    from autoaccum.searching.extra import optuna

    room = getattr(optuna, f"{kind}s")
    found = {each.lower().removesuffix(kind): each for each in room.__all__ if each.lower().endswith(kind)}
    key = name.lower().removesuffix(kind)
    if key not in found:
        raise click.UsageError(f"--{kind} {name}: is not known: choose {', '.join(sorted(found))}")
    try:
        return getattr(room, found[key])()
    except TypeError:
        raise click.UsageError(f"--{kind} {name}: needs settings of its own") from None
    except ImportError as error:
        raise click.UsageError(f"--{kind} {name}: {error}") from None
