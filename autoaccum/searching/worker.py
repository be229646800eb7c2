"""One worker: takes a trial, trains it, tells how it went, until all trials of the search are finished.

A claim (looking what is left, drawing a trial, writing down whose it is) happens under a lock of this machine; across
machines the ledger's rules settle who goes on. What goes wrong in a trial is written down in it with its traceback, and
the search goes on; what would go wrong in every trial ends the search. Ctrl-C breaks off only what waits or trains.
"""

import contextlib
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autoaccum.data import tree
from autoaccum.errors import SetupError, TracebackText
from autoaccum.files import whole_file
from autoaccum.interrupts import check_interrupt, interruptible, interruption_in, uninterrupted
from autoaccum.ranks import here
from autoaccum.searching.extra import optuna
from autoaccum.searching.job import ERRORS_BELIEVED, Job
from autoaccum.searching.samplers import ByNumber, mark_infeasible
from autoaccum.searching.storage import telling_of
from autoaccum.searching.study import ERROR, TRAINING, Ledger, end, signed, sweep
from autoaccum.searching.study_trial import GivenUp, Refused, Trainer
from autoaccum.training.locks import FolderLock

__all__ = ["Worker", "best_trial", "check_errors", "tell", "weights_of"]

WAIT = 1.0  # seconds between two looks at trials that other processes are running


def tell(message: Any = None) -> Any:
    """Rank 0's message, on every rank of the group that trains a trial together; plain values.

    Only rank 0 knows the study. It tells the others each trial's parameters and, at the end, the result.
    """
    box = [message]
    if here().size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


class Worker:
    """Runs trials of a job, one at a time."""

    def __init__(self, job: Job, study: Any, *, heard: Callable[[], None]) -> None:
        """`heard` is called whenever something in the study has changed by this worker."""
        self._job, self._study, self._heard = job, study, heard
        self._lock, self._trainer = FolderLock(job.folder, "claim"), Trainer(job, job.folder)
        self._drawing = ByNumber(job.sampler, seed=job.recipe.seed, n_trials=job.n_trials, first=job.first)
        self._outer = sys.exc_info()[1]  # of whoever called the search: no error of a trial

    @uninterrupted
    def run(self) -> None:
        """Trials until all are finished; waits for those of others, and takes over what they leave.

        A SetupError ends it where what is wrong is the same in every trial, or where the first five all failed.
        """
        with telling_of(self._job.storage):
            while self._one():
                check_interrupt()
                self._heard()

    def _one(self) -> bool:
        """A trial, or a look at those that others run; False where nothing is left to do."""
        study, n_trials = self._study, self._job.n_trials
        try:
            interruptible(self._lock.acquire)
            sweep(study)
            ledger = Ledger(study)
            check_errors(ledger, n_trials)
            if ledger.taken < n_trials or ledger.of("waiting"):
                trial = self._drawing.ask(study)
                # One that another process took for dead and ended is that process's, and its word stands.
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError), signed(trial):
                    if Ledger(study).may_run(trial, n_trials):
                        self._run(trial)
                    else:
                        end(study, trial, "FAIL", outcome="void")
                # Of those that ended only the best one's weights stay, whatever a kill left behind.
                best = best_trial(study)
                for other in study.get_trials(deepcopy=False):
                    if other.state.is_finished() and (best is None or other.number != best.number):
                        weights_of(self._job.folder, other).unlink(missing_ok=True)
                return True
        finally:
            self._lock.release()
        waits = len(ledger.of("finished")) < n_trials and bool(ledger.of("running"))
        if waits:
            interruptible(time.sleep, WAIT)
        return waits

    def _run(self, trial: Any) -> None:
        """Trains a trial that was claimed, and writes down how it ended."""
        try:
            end(self._study, trial, "COMPLETE", value=self._trained(trial))
        except GivenUp as early:
            if str(early).startswith("does not fit"):
                mark_infeasible(trial)
            end(self._study, trial, "PRUNED", outcome=str(early))
        except Refused:
            end(self._study, trial, "FAIL", outcome="void")
            raise
        except (Exception, KeyboardInterrupt) as error:
            if (interruption := interruption_in(error, outer=self._outer)) is not None:
                end(self._study, trial, "FAIL", outcome="interrupted")
                raise interruption from None
            text = "".join(traceback.format_exception(error))
            short = " ".join(str(error).split())
            trial.set_user_attr(ERROR, {"type": type(error).__name__, "message": short, "traceback": text[-8000:]})
            end(self._study, trial, "FAIL", outcome="error")

    def _trained(self, trial: Any) -> float:
        """Draws the parameters, lets others claim, and trains: the value."""
        job = self._job
        params = job.space.suggest(trial)
        self._lock.release()
        self._heard()
        tell({"params": params})
        value, facts, model = interruptible(
            self._trainer.train, params,
            began=lambda facts: self._began(trial, facts),
            report=lambda value, amount: self._report(trial, value, amount),
        )  # fmt: skip
        trial.set_user_attr(TRAINING, facts)
        best, sign = best_trial(self._study), 1 if job.direction == "minimize" else -1
        # Before the trial is told as complete: whenever one is the best of its study, its weights' file is whole.
        if best is None or sign * value < sign * best.value:
            with whole_file(weights_of(job.folder, trial)) as file:
                torch.save(tree.move(model.state_dict(), "cpu", non_blocking=False), file)
        return value

    @uninterrupted
    def _began(self, trial: Any, facts: dict[str, Any]) -> None:
        trial.set_user_attr(TRAINING, facts)
        check_interrupt()
        self._heard()

    @uninterrupted
    def _report(self, trial: Any, value: float, amount: int) -> bool:
        """Whether to give the trial up; never at its end, where nothing is saved any more."""
        trial.report(value, amount)
        check_interrupt()
        self._heard()
        return amount < self._job.amount and bool(trial.should_prune())


def best_trial(study: Any) -> Any:
    """The best complete trial, the first of equals; None while there is none."""
    sign = 1.0 if study.direction.name == "MINIMIZE" else -1.0
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    return min(done, key=lambda trial: (sign * trial.value, trial.number), default=None)


def weights_of(folder: Path, trial: Any) -> Path:
    """The file of a begun trial's weights, whether it is there or not: no other study's trial has the same."""
    return folder / f"trial-{trial.number}-{trial.datetime_start:%Y%m%dT%H%M%S%f}.pt"


def check_errors(ledger: Ledger, n_trials: int) -> None:
    """Raises a SetupError where all of the first trials failed, with the last one's traceback as its cause."""
    many = min(ERRORS_BELIEVED, n_trials)
    first = ledger.of("finished")[:many]
    if len(first) < many or any(trial.state.name != "FAIL" for trial in first):
        return
    failed = [trial for trial in ledger.trials if ERROR in trial.user_attrs]
    last = failed[-1].user_attrs[ERROR]
    raise SetupError(
        f"all of the first {len(failed)} trials failed, the last one (trial {failed[-1].number}, "
        f"{failed[-1].params}) with {last['type']}: {last['message']}. Every trial keeps its traceback in the study, "
        f"under the attribute {ERROR!r}. Mend the setup, and search under another study_name"
    ) from TracebackText(last["traceback"])
