"""One worker: takes a trial, trains it, tells how it went, until all trials of the search are finished.

A claim (looking what is left, drawing a trial, writing down whose it is) happens under a lock of this machine; across
machines the ledger's rules settle who goes on. What goes wrong in a trial is written down in it with its traceback, and
the search goes on; what would go wrong in every trial ends the search. Ctrl-C breaks off only what waits or trains.
"""

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from autoaccum.errors import SetupError, TracebackText
from autoaccum.interrupts import check_interrupt, interruptible, interruption_in, uninterrupted
from autoaccum.ranks import here
from autoaccum.searching import weights
from autoaccum.searching.extra import optuna
from autoaccum.searching.job import ERRORS_BELIEVED, Job
from autoaccum.searching.samplers import ByNumber, mark_infeasible
from autoaccum.searching.storage import telling_of
from autoaccum.searching.study import BEAT, ERROR, TRAINING, Ledger, end, signed, sweep
from autoaccum.searching.study_trial import GivenUp, Refused, Trainer
from autoaccum.training.locks import FolderLock

__all__ = ["Worker", "check_errors", "tell"]

BEAT_SECONDS = 60.0
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
                weights.clean(self._job.folder, study)
                return True
        finally:
            self._lock.release()
        if len(ledger.finished) < n_trials and ledger.of("running"):
            interruptible(time.sleep, WAIT)
            return True
        return False

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
        with _signs_of_life(trial):
            value, facts, model = interruptible(
                self._trainer.train, params,
                began=lambda facts: self._began(trial, facts),
                report=lambda value, amount: self._report(trial, value, amount),
            )  # fmt: skip
            trial.set_user_attr(TRAINING, facts)
            best, sign = weights.best_trial(self._study), 1 if job.direction == "minimize" else -1
            if best is None or sign * value < sign * best.value:
                weights.save_weights(model, job.folder, trial)
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


@contextlib.contextmanager
def _signs_of_life(trial: Any) -> Iterator[None]:
    """Writes the time into the trial now and then, by which other machines know that it is alive."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            try:
                trial.set_user_attr(BEAT, time.time())
            except Exception:  # whatever it is, the trial's own thread meets it too, and tells it
                return

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def check_errors(ledger: Ledger, n_trials: int) -> None:
    """Raises a SetupError where all of the first trials failed, with the last one's traceback as its cause."""
    many = min(ERRORS_BELIEVED, n_trials)
    first = ledger.finished[:many]
    if len(first) < many or any(trial.state.name != "FAIL" for trial in first):
        return
    failed = [trial for trial in ledger.trials if ERROR in trial.user_attrs]
    last = failed[-1].user_attrs[ERROR]
    raise SetupError(
        f"all of the first {len(failed)} trials failed, the last one (trial {failed[-1].number}, "
        f"{failed[-1].params}) with {last['type']}: {last['message']}. Every trial keeps its traceback in the study, "
        f"under the attribute {ERROR!r}. Mend the setup, and search under another study_name"
    ) from TracebackText(last["traceback"])
