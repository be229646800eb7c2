"""The study in its storage: opened and compared, whose its trials are, and which of them count.

The storage is all that the workers of a search share, and it survives every kill. So everything follows from it, by
rules that each process applies alike; nothing has to be handed over, and nothing is lost with a process.

- A trial is finished when it is complete, pruned, or failed by an error of its own; `n_trials` counts these.
- A killed trial's parameters run once more (they may have been the cause), an interrupted one's as often as it takes.
- Where more trials were made than there is room for, or one was repeated by two processes that did not see each other,
  the lower numbers stand, and the others leave before they train.
- Every trial carries who runs it. One whose process is gone is failed by whoever notices first. That is safe even where
  it was a mistake: a storage refuses changes to a trial that has ended, so a process that lives draws another.
"""

import contextlib
import datetime
import threading
import time
from collections.abc import Iterator
from typing import Any

from autoaccum.errors import SetupError
from autoaccum.interrupts import uninterrupted
from autoaccum.probing.journal import Owner
from autoaccum.searching.extra import optuna
from autoaccum.searching.job import Job
from autoaccum.searching.samplers import make_pruner
from autoaccum.searching.storage import open_storage, place_of, telling_of

__all__ = ["BEAT", "ERROR", "OUTCOME", "OWNER", "RETRY", "TRAINING", "Ledger", "end", "open_study", "signed", "sweep"]

# Names of what a trial carries in its user attributes.
OWNER, OUTCOME, RETRY, TRAINING, ERROR, BEAT = (
    f"autoaccum.{name}" for name in ("owner", "outcome", "retry", "training", "error", "beat")
)
_TERMS = "autoaccum.search"  # of the study
KILLS_BELIEVED = 2  # a setting that took its process with it twice is not tried a third time
BEAT_SECONDS = 60.0
SILENCE = 300.0  # seconds without a sign of life after which another host's trial counts as dead
UNCLAIMED = 10.0  # seconds that a trial may be without an owner; a claim takes milliseconds
_RUN_HERE = set[float]()  # the trials that this process runs, by when they began


@uninterrupted
def open_study(job: Job, *, resume: bool = True) -> Any:
    """The search's study, new or gone on with, with its pruner.

    A SetupError where it is there and `resume` is False, or where it is a search of another direction, space, metric,
    budget or seed; both are named.
    """
    ours = job.comparable()
    storage = open_storage(job.storage)
    who, place = f"the study {job.study_name!r}", place_of(job.storage)
    with telling_of(job.storage, opening=True):
        try:
            study = optuna.create_study(
                storage=storage, study_name=job.study_name, direction=job.direction, load_if_exists=resume
            )
        except optuna.exceptions.DuplicatedStudyError as error:
            raise SetupError(
                f"{who} is already in {place}: leave out resume=False to go on with it, or give another study_name"
            ) from error
        theirs, ledger = study.user_attrs.get(_TERMS), Ledger(study)
        if theirs is None and ledger.trials:
            raise SetupError(f"{who} in {place} has trials that are not from autoaccum.search: give another study_name")
        for key, value in {**(theirs or {}), "direction": study.direction.name.lower()}.items():
            # Where nothing was tried yet, what was wrong with the first call may have been mended.
            if value != ours.get(key) and (ledger.taken or key == "direction"):
                raise SetupError(
                    f"{who} in {place} has {key} {value!r}, and this search {ours.get(key)!r}: their values cannot be "
                    "compared; give the same, or another study_name"
                )
        if theirs != ours:
            study.set_user_attr(_TERMS, ours)
    study.pruner = make_pruner(job.pruner, job.amount)
    return study


class Ledger:
    """The trials of a study at one moment, as the rules see them."""

    def __init__(self, study: Any) -> None:
        self.trials = sorted(study.get_trials(deepcopy=False), key=lambda trial: trial.number)
        self._repeated = {_retry(trial).get("of") for trial in self.trials}

    @property
    def taken(self) -> int:
        """How many places are taken: by trials that have one, and by parameters that are to run again."""
        return len(self.of("finished", "running", "waiting")) + len(self.to_repeat())

    def of(self, *fates: str) -> list[Any]:
        """Trials that are "running", "waiting", "finished" (see above), "interrupted", "void" or "killed"."""
        return [trial for trial in self.trials if _fate(trial) in fates]

    def to_repeat(self) -> list[Any]:
        """Trials that ended before their time, and whose parameters are to run again."""
        return [
            trial for trial in self.of("killed", "interrupted")
            if _drawn(trial) and trial.number not in self._repeated and _kills(trial) < KILLS_BELIEVED
        ]  # fmt: skip

    def may_run(self, trial: Any, n_trials: int) -> bool:
        """Whether a trial has a place, now that it was made."""
        before = [other for other in self.trials if other.number < trial.number]
        of = _retry(trial).get("of")
        if of is not None and any(_retry(other).get("of") == of for other in before):
            return False
        return sum(_fate(other) in ("finished", "running", "waiting") for other in before) < n_trials


def _fate(trial: Any) -> str:
    """What has become of a trial: "running", "waiting", "finished", "interrupted", "void" or "killed"."""
    if trial.state.name in ("RUNNING", "WAITING"):
        return str(trial.state.name.lower())
    outcome = trial.user_attrs.get(OUTCOME)
    if trial.state.name != "FAIL" or outcome == "error":
        return "finished"
    # Whoever fails a trial on purpose says why first; what says nothing was cut off.
    return outcome if outcome in ("interrupted", "void") else "killed"


def _drawn(trial: Any) -> dict[str, Any]:
    """The trial's parameters, also where it is to repeat some and was cut off before it had taken them."""
    return trial.params or trial.system_attrs.get("fixed_params") or {}


def _retry(trial: Any) -> dict[str, Any]:
    """Of a trial that repeats another: that one's number, and how often these parameters were killed before."""
    return trial.user_attrs.get(RETRY) or {}


def _kills(trial: Any) -> int:
    """How often the trial's parameters were killed, this time included."""
    return int(_retry(trial).get("kills", 0)) + (_fate(trial) == "killed")


@contextlib.contextmanager
def signed(trial: Any) -> Iterator[None]:
    """Writes into a trial that this process runs it, and remembers that as long as it does.

    The time is written now and then too, by which other machines know that the trial is alive.
    """
    since, over = time.time(), threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            try:
                trial.set_user_attr(BEAT, time.time())
            except Exception:  # whatever it is, the trial's own thread meets it too, and tells it
                return

    _RUN_HERE.add(since)
    try:
        trial.set_user_attr(OWNER, {**Owner.here()._asdict(), "since": since})
        threading.Thread(target=beat, daemon=True).start()
        yield
    finally:
        over.set()
        _RUN_HERE.discard(since)


def sweep(study: Any) -> list[int]:
    """Fails the running trials whose process is gone, queues what is to run again, and says which it failed."""
    swept = [trial for trial in Ledger(study).of("running") if _is_abandoned(trial)]
    for trial in swept:
        end(study, trial, "FAIL")
    for trial in Ledger(study).to_repeat():
        study.enqueue_trial(_drawn(trial), user_attrs={RETRY: {"of": trial.number, "kills": _kills(trial)}})
    return [trial.number for trial in swept]


def _is_abandoned(trial: Any) -> bool:
    """Whether nobody runs the trial any more; of other machines' only the last sign of life tells."""
    who = trial.user_attrs.get(OWNER)
    if who is None:
        started = trial.datetime_start
        return started is not None and abs((datetime.datetime.now() - started).total_seconds()) > UNCLAIMED
    found = Owner.of(who)
    if found.is_stranger:
        last = max(float(trial.user_attrs.get(BEAT, 0.0)), float(who["since"]))
        return abs(time.time() - last) > SILENCE
    # A full disk, say, may have kept this process from writing down how a trial of its own ended.
    return found.is_gone or (found == Owner.here() and who["since"] not in _RUN_HERE)


@uninterrupted
def end(study: Any, trial: Any, state: str, *, outcome: str | None = None, value: float | None = None) -> None:
    """Ends a running trial with a state, and says why; one that another process has ended stays as it is."""
    try:
        if outcome is not None:
            trial.set_user_attr(OUTCOME, outcome)
        study.tell(trial.number, value, state=optuna.trial.TrialState[state])
    except (ValueError, RuntimeError):
        # It had ended; or this has ended it, and a sampler that has run out of settings wants to stop Optuna's loop.
        found = next(other for other in study.get_trials(deepcopy=False) if other.number == trial.number)
        if not found.state.is_finished():
            raise
