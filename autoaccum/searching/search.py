"""`search`: settles what all trials have in common, opens the study, lets the workers run, and reads the result."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from autoaccum.checks import check_kind, check_seed, check_switches, one_of
from autoaccum.errors import SetupError, shown
from autoaccum.ranks import here, join
from autoaccum.searching.extra import hushed
from autoaccum.searching.job import Job, check_targets, default_space, sample_arguments, settle
from autoaccum.searching.recipe import Recipe
from autoaccum.searching.samplers import check_sampler, make_pruner
from autoaccum.searching.search_result import SearchResult, result_of, rows_of
from autoaccum.searching.space import read_space
from autoaccum.searching.storage import dashboard_line, telling_of
from autoaccum.searching.study import open_study
from autoaccum.searching.study_trial import GivenUp, Trainer
from autoaccum.searching.worker import Worker, tell
from autoaccum.searching.worker_pool import places, run_pool

__all__ = ["search"]

TARGETS = (64, 128, 256)  # this very tuple means that none were given


def search(
    setup: Callable[..., Mapping[str, Any]],
    *,
    n_trials: int,
    space: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] | None = None,
    target_batch: int | Sequence[int] = TARGETS,
    direction: str = "minimize",
    metric: str = "loss",
    storage: Any = None,
    study_name: str | None = None,
    sampler: Any = None,
    pruner: Any = "once",
    budget: int | str | None = None,
    workers: int | str = 1,
    resume: bool = True,
    seed: int | None = None,
    folder: "str | os.PathLike[str] | None" = None,
    trust_storage: bool = False,
    progress: bool | None = None,
) -> SearchResult:
    """Looks for the setting that trains best; every trial trains with exactly the batch that it claims.

    The probe finds once how many samples fit; each trial's micro-batches follow by arithmetic. Trials are compared at
    the same number of samples seen, with the same seed; the first one has the setup's own values. What is found is in
    the storage at any moment: the same call after any interruption goes on to `n_trials` in total.

    Args:
        setup: called for each trial, with those of its parameters that it takes, it returns fit's arguments as a dict;
            parameters that it does not take go into that dict. A TARGET's function is the same.
        n_trials: finished trials in total, over restarts and workers; pruned ones and those that failed by an error
            count.
        space: ranges (low, high) or (low, high, "log") and lists of choices by name, or a function of Optuna's trial
            that returns the parameters. None: the learning rate, ten times up and down from the setup's, and the target
            batch; the rate is scaled from `lr_batch` to each batch, so only what does not follow is searched.
        target_batch: the choices; beside a space without it they are added to that, and one alone is fixed.
        direction: "minimize" or "maximize".
        metric: "loss" or one of the setup's metrics, on its val_data; "train_loss" needs none.
        storage: None: a journal file in `folder`; a path: a journal file there; or sqlite:///study.db,
            postgresql://user@host/name, grpc://host:port.
        study_name: None: after the setup.
        sampler: None ("tpe") or a sampler of Optuna's, such as optuna.samplers.RandomSampler(seed=0).
        pruner: "once" (at a ninth of the budget the best quarter goes on), "none" or a pruner of Optuna's, such as
            optuna.pruners.MedianPruner().
        budget: samples that a trial trains on, or a time such as "90s"; None: what the setup's epochs come to.
        workers: processes on this machine, or "gpus" for one a GPU. With 1, trials run in this process.
        resume: go on with a study that is there; False refuses it.
        seed: of the search and of every trial. None: 0, and the setup's own for its trials where it gives one.
        folder: where weights, limits and best.json lie; None: autoaccum-search/<study_name> here.
        trust_storage: a sampler that unpickles what stands in the study (Optuna's CmaEsSampler) may do so: whoever can
            write to the storage can then have code run here.
        progress: tell about trials on stderr; None: on a terminal.

    Raises:
        MissingExtraError: Optuna is not installed.
        SetupError: a setup, space, metric or storage that cannot be searched with, or a setup that fails in all of the
            first five trials.
        NothingFitsError: no setting fits in memory.
        AutoaccumError: no trial came to its end, or workers died one after another.
        KeyboardInterrupt: after running trials were marked; the same call goes on.
    """
    if type(n_trials) is not int or n_trials < 1:
        raise SetupError(f"n_trials={shown(n_trials)}: give a whole number above 0, such as 30")
    check_seed(seed)
    check_kind("study_name", study_name, (str, type(None)), 'a text, such as "digits", or leave it out')
    one_of("direction", direction, ("minimize", "maximize"))
    check_switches(trust_storage=trust_storage)
    check_sampler(sampler, storage, trusted=trust_storage)
    join()
    recipe = Recipe(setup, seed or 0, insists=seed is not None)
    targets = check_targets(target_batch)
    if space is not None and target_batch is not TARGETS:
        if not isinstance(space, Mapping) or "target_batch" in space:
            raise SetupError(
                f"target_batch={shown(targets)} beside a space that is a function or has a target_batch of its own: "
                "leave the one outside out, and have the function draw it (trial.suggest_categorical)"
            )
        space = {**space, "target_batch": list(targets)}
    read = None if space is None else read_space(space)
    if read is None or read.function is None:
        recipe.check_names(() if read is None else read.parts)
    spots = places(workers)
    arguments = sample_arguments(recipe, read)
    read = default_space(arguments, targets) if read is None else read
    terms = settle(recipe, read, arguments, targets, metric, budget)
    first = read.within({**recipe.defaults(), **arguments})
    del arguments
    make_pruner(pruner, terms["amount"])
    name = study_name or recipe.slug()
    place = _made(Path(folder or Path("autoaccum-search", quote(name, safe=" ").lstrip("."))))
    storage = place / "journal.log" if storage is None else storage
    job = Job(recipe, read, direction=direction, n_trials=n_trials, storage=storage, study_name=name, sampler=sampler,
              pruner=pruner, folder=place, first=first, **terms)  # fmt: skip
    if here().rank > 0:
        return _train_along(job)
    result = None
    try:
        result = _lead(job, spots, resume=resume, progress=progress)
    finally:
        tell({"ended": None if result is None else replace(result, study=None)})
    return result


def _made(place: Path) -> Path:
    """The folder of the search, absolute; a SetupError where it cannot be made or written to."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise SetupError(
            f"the search's folder {str(place)!r} cannot be made or written to ({error.strerror}): give another one "
            "(folder=), or start from a folder that can be written to"
        ) from error
    return place.absolute()


def _lead(job: Job, spots: list[dict[str, Any]], *, resume: bool, progress: bool | None) -> SearchResult:
    """The search as the process that was asked for it runs it."""
    with hushed():
        study, dashboard = open_study(job, resume=resume), dashboard_line(job.storage)
        told = None
        if sys.stderr.isatty() if progress is None else progress:
            from autoaccum.display.layout import open_console
            from autoaccum.display.search_table import TrialLines

            told = TrialLines(open_console(), lambda: rows_of(study), job.n_trials, dashboard, workers=len(spots))
        heard = (lambda: None) if told is None else told.look
        try:
            if len(spots) > 1 or "device" in spots[0]:
                run_pool(job, spots, study, heard)
            Worker(job, study, heard=heard).run()  # after workers, what others have left
        finally:
            if told is not None:
                told.close()
    with telling_of(job.storage, opening=True):
        result = result_of(study, job, dashboard)
    result.save(job.folder / "best.json")
    return result


def _train_along(job: Job) -> SearchResult:
    """The other ranks of a group: train what rank 0 says, until it says how the search ended."""
    trainer = Trainer(job, job.folder / f"rank-{here().rank}")
    while "ended" not in (message := tell()):
        with contextlib.suppress(Exception, GivenUp):
            trainer.train(message["params"], began=lambda _: None, report=lambda *_: False)
    if message["ended"] is None:
        raise SetupError(f"the search ended on rank 0 of {here().size}: the cause is in the error raised there")
    return message["ended"]  # type: ignore[no-any-return]  # a SearchResult
