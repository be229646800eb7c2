"""The `autoaccum` command and its commands. Nothing here, nor in what it imports, imports torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoaccum.cli.command import FAILED, NOT_SAVED, Answer, Command, Stopping, first_rank, one_line, saved
from autoaccum.cli.options import COUNT, new_file, read_by, takes, takes_all, target_argument
from autoaccum.cli.probe_command import probe
from autoaccum.cli.target import Target, arguments_of, call, need_target_batch
from autoaccum.files import whole_file
from autoaccum.planning.trainer_config import TRAINERS

if TYPE_CHECKING:
    from autoaccum.training.fit_result import FitResult

__all__ = ["cli", "fit", "search", "verify"]


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


cli.add_command(probe)


@cli.command(cls=Command, short_help="Work out the plan for a target batch: arithmetic only.")
@click.option(
    "--limit", type=COUNT, metavar="N", multiple=True, required=True,
    help="The largest micro-batch that fits; once, or once for every rank.",
)  # fmt: skip
@click.option("--target-batch", type=COUNT, metavar="N", required=True, help="Samples per optimizer step.")
@click.option("--world-size", type=COUNT, metavar="N", help="Ranks that train together.")
@click.option("--rank", type=click.IntRange(min=0), metavar="N", help="Whose plan; 0 if not given.")
@click.option("--samples", type=COUNT, metavar="N", help="Samples in an epoch.")
@takes("optimizer", "lr", "lr_batch", "lr_rule")
@click.option("--betas", type=(float, float), metavar="B1 B2", help="The optimizer's betas, where a rule changes them.")
@click.option("--eps", type=float, metavar="EPS", help="The optimizer's eps, where a rule changes it.")
@click.option("--bn-momentum", type=float, metavar="M", help="BatchNorm's own momentum.")
@takes("batch_norm")
@click.option("--minimum", type=COUNT, metavar="N", help="No micro-batch below this size.")
@takes("multiple_of", "tail")
@click.option(
    "--as", "trainer", type=click.Choice(list(TRAINERS)), metavar="TRAINER",
    help=f"Print the lines to put into another trainer's configuration: {', '.join(TRAINERS)}.",
)  # fmt: skip
@new_file("save-plan", "Save the plan, for fit --plan FILE.")
def plan(
    limit: tuple[int, ...],
    target_batch: int,
    trainer: str | None = None,
    save_plan: Path | None = None,
    **options: Any,
) -> Answer:
    """Work out micro-batches, learning rate and BatchNorm momentum for a target batch, each with its reason."""
    from autoaccum.planning.plan import plan as make

    if len(limit) > 1:
        options.setdefault("world_size", len(limit))
    made = make(limit[0] if len(limit) == 1 else limit, target_batch, **options)
    code = 0 if saved(save_plan, "the plan", made.save) else FAILED
    if trainer is None:
        return Answer(made.to_dict(), "plan_view", code)
    return Answer({**made.to_dict(), "config": made.as_config(trainer)}, "config_view", code)


@cli.command(cls=Command, short_help="Probe, plan, check and train.")
@target_argument
@takes_all("fit")
@new_file("save", "Save the trained weights: the model's state_dict.")
@new_file("save-plan", "Save the plan, for fit --plan FILE.")
def fit(target: str, save: Path | None = None, save_plan: Path | None = None, **options: Any) -> Answer:
    """Train with exactly the target batch, in as few micro-batches as fit."""
    import autoaccum

    arguments = arguments_of(autoaccum.fit, target, options)
    if arguments.get("plan") is None:
        need_target_batch(target, arguments, "fit")
    result = _trained(arguments)
    done = result.unsaved is None
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
        try:
            listening = {**arguments, "callbacks": [*arguments.get("callbacks", ()), stopping]}
            result: FitResult = call(autoaccum.fit, listening)
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


@cli.command(cls=Command, short_help="Check that the accumulated gradient is the large batch's.")
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


@cli.command(cls=Command, short_help="List the devices and what is free on them.")
def devices() -> Answer:
    """List the devices that could be trained on, what is free on them, and who uses them."""
    from autoaccum.memory.device import devices as found

    return Answer({"devices": found()}, "devices_view")


# --- search ---

# Options that are the search's; the others are fit's, and each trial's.
OWN = ("space", "target_batch", "metric", "direction", "budget", "sampler", "pruner", "workers", "storage",
       "study_name", "trust_storage", "seed", "progress")  # fmt: skip


def _space(values: tuple[str, ...]) -> dict[str, Any]:
    from autoaccum.searching.space import space_of_texts

    return space_of_texts(values)


@cli.command(cls=Command, short_help="Search hyperparameters with Optuna.")
@target_argument
@click.option("--n-trials", type=COUNT, metavar="N", required=True, help="Trials in total, over restarts and workers.")
@click.option(
    "--space",
    metavar="NAME=VALUES",
    multiple=True,
    callback=read_by(_space),
    help="What to search, once a parameter: lr=1e-4:1e-1:log, layers=2:6, weight_decay=0,1e-4,1e-2.",
)
@click.option(
    "--target-batch", type=COUNT, metavar="N", multiple=True, callback=read_by(tuple),
    help="A batch to choose from; may be repeated.",
)  # fmt: skip
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
@click.option("--trust-storage", is_flag=True, default=None, help="Let a sampler unpickle what stands in the study.")
@takes_all("search")
@new_file("save", "Save the result: the best plan and parameters, for fit --plan FILE.")
@new_file("plot", "Draw history, importance, and values over batch and learning rate.", picture=True)
def search(*, target: str, n_trials: int, save: Path | None = None, plot: Path | None = None, **options: Any) -> Answer:
    """Train with many hyperparameters and find the best.

    TARGET is called for every trial, with those of the trial's parameters that it takes; the others are arguments of
    fit. Without --space they are the learning rate around the one it returns, and the target batch. The same command
    after an interruption goes on.
    """
    import autoaccum

    settings = {name: options.pop(name) for name in OWN if name in options}
    settings.setdefault("progress", first_rank())
    for kind in {"sampler", "pruner"} & settings.keys():
        settings[kind] = _of_optuna(kind, settings[kind])
    for name in {"budget", "workers"} & settings.keys():  # numbers, or words of their own
        settings[name] = int(settings[name]) if settings[name].isdigit() else settings[name]
    if "target_batch" in settings and "target_batch" in settings.get("space", {}):
        raise click.UsageError("--space target_batch=... and --target-batch say the same: leave one out")
    setup = Target.parse(target, options)
    setup.load()  # a wrong TARGET is a usage error at once, and not one in every worker
    result = autoaccum.search(setup, n_trials=n_trials, **settings)
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
