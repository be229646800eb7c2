"""The study in its storage: opened and compared, its trials read as ledger entries, dead processes' trials put right.

Every trial carries who runs it: host, process id and that process's start time, since ids are used again. A running
trial whose process is gone is failed by whoever notices first. That is safe even where it was a mistake: a storage
refuses changes to a trial that has ended, so a process that lives after all drops its trial and draws another.
"""

import datetime
import time
from typing import Any

from autoaccum.errors import SetupError
from autoaccum.probing.journal import Owner
from autoaccum.searching.extra import load_optuna, says_ended
from autoaccum.searching.ledger import Entry, Kind, Ledger
from autoaccum.searching.space import Space
from autoaccum.searching.storage import telling_of
from autoaccum.searching.terms import Terms

__all__ = [
    "BEAT",
    "ERROR",
    "OUTCOME",
    "OWNER",
    "TRAINING",
    "fail",
    "ledger_of",
    "open_study",
    "owner",
    "repeat_broken",
    "sweep",
]

# Names of what a trial carries in its user attributes.
OWNER, OUTCOME, RETRY, TRAINING, ERROR = (
    f"autoaccum.{name}" for name in ("owner", "outcome", "retry", "training", "error")
)
_TERMS = "autoaccum.search"  # of the study
BEAT = "autoaccum.beat"
SILENCE = 300.0  # seconds without a sign of life after which another host's trial counts as dead
UNCLAIMED = 10.0  # seconds that a trial may be without an owner; a claim takes milliseconds


def open_study(storage: Any, name: str, space: Space, terms: Terms, *, shown: str, resume: bool) -> Any:
    """The study of this name, new or gone on with.

    Raises:
        SetupError: it is there and `resume` is False, or it is a search of another direction, space, metric, budget or
            seed; both are named.
    """
    optuna = load_optuna()
    with telling_of(shown):
        try:
            study = optuna.create_study(
                storage=storage, study_name=name, direction=terms.direction, load_if_exists=resume
            )
        except optuna.exceptions.DuplicatedStudyError as error:
            raise SetupError(
                f"the study {name!r} is already in {shown}: leave out resume=False to go on with it, or give another "
                "study_name"
            ) from error
        there = study.direction.name.lower()
        if there != terms.direction:
            raise SetupError(
                f"the study {name!r} in {shown} has direction {there!r}, and this search {terms.direction!r}: give the "
                "same direction, or another study_name"
            )
        ours = {"space": space.describe(), **terms.comparable()}
        theirs = study.user_attrs.get(_TERMS)
        if theirs is None and study.get_trials(deepcopy=False):
            raise SetupError(
                f"the study {name!r} in {shown} has trials that are not from autoaccum.search: give another study_name"
            )
        if ledger_of(study).untouched:  # what was wrong with the first call may have been mended
            study.set_user_attr(_TERMS, ours)
        else:
            _compare(name, shown, theirs, ours)
    return study


def _compare(name: str, shown: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    for key, value in theirs.items():
        if value != _as_json(ours.get(key)):
            raise SetupError(
                f"the study {name!r} in {shown} has {key} {value!r}, and this search {ours.get(key)!r}: their values "
                "cannot be compared; give the same, or another study_name"
            )


def _as_json(value: Any) -> Any:
    """As it comes back from a storage: tuples are lists there."""
    if isinstance(value, dict):
        return {str(key): _as_json(part) for key, part in value.items()}
    return [_as_json(part) for part in value] if isinstance(value, (list, tuple)) else value


def owner() -> dict[str, Any]:
    """Who this process is, among all that ever ran: for the trials that it runs."""
    return {**Owner.here()._asdict(), "since": time.time()}


def is_gone(who: dict[str, Any], beat: float | None) -> bool:
    """Whether the process that a trial belongs to is gone.

    Those of other machines and containers are known by their last sign of life alone, `beat`, in seconds since 1970;
    where the storage itself watches over that (None), they are left to it.
    """
    found = Owner.of(who)
    if found.is_stranger:
        return beat is not None and abs(time.time() - max(beat, who["since"])) > SILENCE
    return found.is_gone


def ledger_of(study: Any) -> Ledger:
    """The study's trials as the rules see them."""
    return Ledger(_entry(trial) for trial in study.get_trials(deepcopy=False))


def _entry(trial: Any) -> Entry:
    attributes = trial.user_attrs
    retry = attributes.get(RETRY) or {}
    outcome = attributes.get(OUTCOME)
    return Entry(
        number=trial.number,
        kind=_kind(trial.state.name, outcome),
        error=trial.state.name == "FAIL",
        drawn=bool(_drawn(trial)),
        repeats=retry.get("of"),
        kills=int(retry.get("kills", 0)),
    )


def _drawn(trial: Any) -> dict[str, Any]:
    """The trial's parameters, also where it is to repeat some and was cut off before it had taken them."""
    return trial.params or trial.system_attrs.get("fixed_params") or {}


def _kind(state: str, outcome: str | None) -> Kind:
    if state != "FAIL":
        return {"RUNNING": Kind.RUNNING, "WAITING": Kind.WAITING}.get(state, Kind.FINISHED)
    # Whoever fails a trial on purpose says why first; what says nothing was cut off.
    return {"error": Kind.FINISHED, "void": Kind.VOID, "interrupted": Kind.INTERRUPTED}.get(outcome or "", Kind.KILLED)


def sweep(study: Any, *, heartbeats: bool = False) -> list[int]:
    """Fails the running trials whose process is gone, and says which they were.

    `heartbeats`: the storage has its own, so other hosts' trials are left to it.
    """
    optuna = load_optuna()
    swept = []
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        who = trial.user_attrs.get(OWNER)
        beat = None if heartbeats else float(trial.user_attrs.get(BEAT, 0.0))
        dead = is_gone(who, beat) if who is not None else _age(trial) > UNCLAIMED
        if dead and fail(study, trial.number):
            swept.append(trial.number)
    return swept


def fail(study: Any, number: int) -> bool:
    """Ends a running trial as failed; whether this process did it, and no other was first."""
    optuna = load_optuna()
    try:
        study.tell(number, state=optuna.trial.TrialState.FAIL)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, ValueError) or says_ended(error):  # it has ended meanwhile
            return False
        raise
    return True


def _age(trial: Any) -> float:
    started = trial.datetime_start
    return 0.0 if started is None else abs((datetime.datetime.now() - started).total_seconds())


def repeat_broken(study: Any) -> None:
    """Queues the parameters of trials that were cut off."""
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    for entry in ledger_of(study).to_repeat():
        retry = {"of": entry.number, "kills": entry.kills_now}
        study.enqueue_trial(_drawn(trials[entry.number]), user_attrs={RETRY: retry})
