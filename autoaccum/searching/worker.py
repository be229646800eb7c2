"""One worker: takes a trial, trains it, tells how it went, until all trials are taken.

A claim (looking what is left, drawing a trial, writing down whose it is) happens under a lock of this machine; across
machines the ledger's rules settle who goes on. What goes wrong in a trial is written down in it with its traceback, and
the search goes on; what would go wrong in every trial ends the search.
"""

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from autoaccum.errors import SetupError
from autoaccum.interrupts import Deferral, interruption_in
from autoaccum.searching import group, weights
from autoaccum.searching.extra import hushed, load_optuna, mark_infeasible, quiet, says_ended
from autoaccum.searching.job import Job, train_once
from autoaccum.searching.ledger import Kind
from autoaccum.searching.limits import Limits
from autoaccum.searching.storage import has_heartbeats, telling_of
from autoaccum.searching.study import (
    BEAT,
    ERROR,
    OUTCOME,
    OWNER,
    TRAINING,
    fail,
    ledger_of,
    owner,
    repeat_broken,
    sweep,
)
from autoaccum.searching.study_trial import Diverged, Finished, Infeasible, Pruned, Refused, Trainer
from autoaccum.training.locks import FolderLock

__all__ = ["Worker"]

BEAT_SECONDS = 60.0


class Worker:
    """Runs trials of a job, one at a time."""

    def __init__(self, job: Job, study: Any, *, heard: Callable[[], None] = lambda: None) -> None:
        """`heard` is called whenever something in the study has changed by this worker."""
        self._job, self._study, self._heard = job, study, heard
        self._lock = FolderLock(job.folder, "claim")
        self._trainer = Trainer(job.terms, Limits(job.folder, job.terms.ceiling), share=job.share)
        self._trial_at_hand: Any = None
        self._asking = contextlib.ExitStack()  # open from before a trial is made until it is known whose it is
        self._outer = sys.exc_info()[1]  # of whoever called the search: no error of a trial

    def run(self) -> None:
        """Trials until none is left to take.

        Raises:
            SetupError: what is wrong is the same in every trial, or the first five all failed.
            KeyboardInterrupt: after the trial at hand was marked.
        """
        try:
            with hushed(), telling_of(self._job.storage_name, opening=False):
                while self._one():
                    self._heard()
        finally:
            self._lock.release()

    def _one(self) -> bool:
        """One trial; False where none is left to take."""
        study, job = self._study, self._job
        self._lock.acquire()
        try:
            sweep(study, heartbeats=has_heartbeats(job.storage))
            repeat_broken(study)
            ledger = ledger_of(study)
            if ledger.only_errors(job.n_trials):
                raise all_failed(study)
            if not ledger.room(job.n_trials) and not ledger.count(Kind.WAITING):
                return False
            self._ask_and_tell()
        finally:
            self._lock.release()
        weights.clean(job.folder, study)
        return True

    def _ask_and_tell(self) -> None:
        """Optuna's part: it makes the trial, keeps it alive where the storage has heartbeats, and notes its end."""
        self._trial_at_hand = None
        try:
            with self._asking:
                deferral = Deferral()
                self._asking.callback(deferral.end)  # a trial that is made and not signed is nobody's
                deferral.begin()
                self._asking.enter_context(quiet())
                self._study.optimize(self._trial, n_trials=1, catch=(_FailedError, _LeaveError))
        except (Exception, KeyboardInterrupt) as error:
            if (interruption := self._interruption(error)) is not None:
                self._mark_interrupted()
                raise interruption from None
            too_late = type(error) is ValueError or says_ended(error)  # what `tell` and the trial's attributes raise
            if not (too_late and self._has_ended()):
                raise
            # Another process took this one for dead and ended its trial: that process's word stands.

    def _interruption(self, error: BaseException) -> KeyboardInterrupt | None:
        return interruption_in(error, outer=self._outer)

    def _has_ended(self) -> bool:
        """Whether the trial at hand has an end in the storage."""
        if self._trial_at_hand is None:
            return False
        number = self._trial_at_hand.number
        return any(t.number == number and t.state.is_finished() for t in self._study.get_trials(deepcopy=False))

    def _mark_interrupted(self) -> None:
        """Writes it into the trial at hand, if that has come so far and has no end yet."""
        if self._trial_at_hand is not None and not self._has_ended():
            self._say_interrupted()
            fail(self._study, self._trial_at_hand.number)

    def _say_interrupted(self) -> None:
        trial = self._trial_at_hand
        if trial.user_attrs.get(OUTCOME) != "void":  # which is not to run again
            trial.set_user_attr(OUTCOME, "interrupted")

    def _trial(self, trial: Any) -> float:
        """Optuna's objective: claims, trains, and gives the value."""
        self._trial_at_hand = trial
        try:
            params = self._claim(trial)
            with _signs_of_life(trial, needed=not has_heartbeats(self._job.storage)):
                return self._outcome(trial, params)
        except KeyboardInterrupt:
            self._say_interrupted()
            raise

    def _claim(self, trial: Any) -> dict[str, Any]:
        """Writes down whose the trial is, and draws its parameters; then others may look again."""
        try:
            trial.set_user_attr(OWNER, owner())
            self._asking.close()
            if not ledger_of(self._study).may_run(trial.number, self._job.n_trials):
                trial.set_user_attr(OUTCOME, "void")
                raise _LeaveError
            return self._job.space.suggest(trial)
        except _LeaveError:
            raise
        except Exception as error:  # whatever the user's function of a trial, or their sampler, raises
            self._write_down(trial, error)
            raise _FailedError from error
        finally:
            self._lock.release()
            self._heard()

    def _outcome(self, trial: Any, params: dict[str, Any]) -> float:
        """Trains; what ends it early becomes a state of the trial."""
        optuna = load_optuna()
        early: str | None = None
        try:
            finished = self._train(trial, params)
            trial.set_user_attr(TRAINING, finished.facts)
            if self._is_best(finished.value):
                weights.save_weights(finished.model, self._job.folder, trial)
            return finished.value
        except Pruned:
            early = "pruned"
        except Diverged as error:
            early = f"diverged: {error}"
        except Infeasible as error:
            early = f"does not fit: {error}"
            mark_infeasible(trial)
        except Refused:
            trial.set_user_attr(OUTCOME, "void")
            raise
        except Exception as error:
            self._write_down(trial, error)
            raise _FailedError from error
        trial.set_user_attr(OUTCOME, early)
        raise optuna.TrialPruned(early)

    def _train(self, trial: Any, params: dict[str, Any]) -> Finished:
        job = self._job
        if group.size() > 1:
            group.tell({"params": params})
        return train_once(
            job, self._trainer, params,
            began=lambda facts: self._began(trial, facts),
            report=lambda value, amount: self._report(trial, value, amount),
        )  # fmt: skip

    def _began(self, trial: Any, facts: dict[str, Any]) -> None:
        trial.set_user_attr(TRAINING, facts)
        self._heard()

    def _report(self, trial: Any, value: float, amount: int) -> bool:
        trial.report(value, amount)
        self._heard()
        if amount >= self._job.terms.amount:
            return False  # it has come to its end: nothing is saved any more
        stop: bool = trial.should_prune()
        return stop

    def _is_best(self, value: float) -> bool:
        best = weights.best_trial(self._study)
        if best is None:
            return True
        old = float(best.value)
        return value < old if self._job.terms.direction == "minimize" else value > old

    def _write_down(self, trial: Any, error: BaseException) -> None:
        """The error goes into its trial, with its traceback.

        Raises:
            KeyboardInterrupt: it arose from one, and is none of the trial's.
            Exception: `error`, where it says that somebody took this process for dead: the trial is theirs now.
        """
        if (interruption := self._interruption(error)) is not None:
            raise interruption from None
        if says_ended(error):
            raise error
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        short = " ".join(str(error).split())
        trial.set_user_attr(ERROR, {"type": type(error).__name__, "message": short, "traceback": text[-8000:]})
        trial.set_user_attr(OUTCOME, "error")


@contextlib.contextmanager
def _signs_of_life(trial: Any, *, needed: bool) -> Iterator[None]:
    """Writes the time into the trial now and then, by which other machines know that it is alive."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            try:
                trial.set_user_attr(BEAT, time.time())
            except Exception:  # whatever it is, the trial's own thread meets it too, and tells it
                return

    if needed:
        threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        over.set()


class _FailedError(Exception):
    """What went wrong in this trial is written down in it."""


class _LeaveError(Exception):
    """This trial is not to be run: all places are taken, or another process repeats the same."""


def all_failed(study: Any) -> SetupError:
    """The error of a search whose first trials all failed, with the last one's traceback as its cause."""
    failed = [trial for trial in study.get_trials(deepcopy=False) if ERROR in trial.user_attrs]
    last = failed[-1].user_attrs[ERROR]
    error = SetupError(
        f"all of the first {len(failed)} trials failed, the last one (trial {failed[-1].number}, "
        f"{failed[-1].params}) with {last['type']}: {last['message']}. Every trial keeps its traceback in the study, "
        f"under the attribute {ERROR!r}. Mend the setup, and search under another study_name"
    )
    error.__cause__ = TrialTracebackError(last["traceback"])
    return error


class TrialTracebackError(Exception):
    """A trial's traceback, as text: it may have come from another process."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"
