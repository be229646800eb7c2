"""The rules by which trials count and run again, against a simulated search that is killed wherever it hurts."""

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoaccum.errors import SetupError
from autoaccum.searching.study import KILLS_BELIEVED, OUTCOME, RETRY, Ledger
from autoaccum.searching.worker import check_errors

STATES = {"finished": ("FAIL", "error"), "running": ("RUNNING", None), "waiting": ("WAITING", None),
          "killed": ("FAIL", None), "interrupted": ("FAIL", "interrupted"), "void": ("FAIL", "void")}  # fmt: skip


class Study:
    """Trials as Optuna gives them."""

    def __init__(self, *trials):
        self.trials = list(trials)

    def get_trials(self, deepcopy):
        return self.trials


def trial(number, kind, *, drawn=True, repeats=None, kills=0):
    """One that has come to this; `repeats` another, whose parameters were killed so often before."""
    state, outcome = STATES[kind]
    attributes = {} if repeats is None else {RETRY: {"of": repeats, "kills": kills}}
    attributes |= {} if outcome is None else {OUTCOME: outcome}
    made = optuna.trial.create_trial(
        state=optuna.trial.TrialState[state], user_attrs=attributes,
        system_attrs={"fixed_params": {"x": 1}} if drawn else {},
    )  # fmt: skip
    made.number = number
    return made


def ledger(*trials):
    return Ledger(Study(*trials))


def numbers(trials):
    return [trial.number for trial in trials]


def test_a_killed_trials_parameters_run_once_more():
    killed, again = trial(0, "killed"), trial(1, "killed", repeats=0, kills=1)

    assert numbers(ledger(killed).to_repeat()) == [0]
    assert ledger(killed, again).to_repeat() == [], "twice is enough to be believed"


def test_an_interrupted_trials_parameters_run_as_often_as_it_takes():
    trials = [trial(0, "interrupted"), *(trial(n, "interrupted", repeats=n - 1) for n in range(1, 5))]

    assert numbers(ledger(*trials).to_repeat()) == [4]


def test_a_trial_that_never_had_parameters_is_not_repeated():
    assert ledger(trial(0, "killed", drawn=False)).to_repeat() == []


def test_of_two_that_repeat_the_same_trial_the_first_stands():
    trials = [trial(0, "killed"), trial(1, "running", repeats=0), trial(2, "running", repeats=0)]

    assert ledger(*trials).may_run(trials[1], 9)
    assert not ledger(*trials).may_run(trials[2], 9)


def test_more_trials_than_there_is_room_for_leave_by_number():
    trials = [trial(0, "finished"), trial(1, "running"), trial(2, "running")]

    assert ledger(*trials).may_run(trials[1], 2)
    assert not ledger(*trials).may_run(trials[2], 2)


@pytest.mark.parametrize(
    ("errors", "n", "said"), [("eeeee", 30, True), ("eeee", 30, False), ("eee", 3, True), ("eeeefe", 30, False)]
)
def test_the_search_stops_where_all_of_the_first_five_fail(errors, n, said):
    trials = [trial(number, "finished") for number in range(len(errors))]
    for each, kind in zip(trials, errors, strict=True):
        each.set_user_attr("autoaccum.error", {"type": "E", "message": "", "traceback": ""})
        each.state = optuna.trial.TrialState.FAIL if kind == "e" else optuna.trial.TrialState.PRUNED
    try:
        check_errors(ledger(*trials), n)
        raised = False
    except SetupError:
        raised = True
    assert raised is said


class Simulation:
    """Workers on a shared storage, each between two of its steps when something happens to it."""

    def __init__(self, n_trials, workers):
        self.n, self.trials, self.begun = n_trials, [], []
        self.working = [None] * workers  # the number of each worker's trial

    def _make(self, kind, **more):
        self.trials.append(trial(len(self.trials), kind, **more))

    def _set(self, number, kind):
        state, outcome = STATES[kind]
        self.trials[number].state = optuna.trial.TrialState[state]
        if outcome is not None:
            self.trials[number].set_user_attr(OUTCOME, outcome)

    def step(self, worker, *, kill, interrupt, blind):
        """A worker goes one step on: it claims, or finishes. `blind`: it looked before the others' last claim."""
        own = self.working[worker]
        if own is None:
            self._claim(worker, blind)
        else:
            self._set(own, "killed" if kill else "interrupted" if interrupt else "finished")
            self.working[worker] = None

    def _claim(self, worker, blind):
        seen = ledger(*(self.trials[:-1] if blind else self.trials))
        taken = seen.taken
        for each in seen.to_repeat():
            kills = each.user_attrs.get(RETRY, {}).get("kills", 0) + (OUTCOME not in each.user_attrs)
            self._make("waiting", repeats=each.number, kills=kills)
        waiting = numbers(ledger(*self.trials).of("waiting"))
        if not waiting and taken >= self.n:
            return
        number = waiting[0] if waiting else len(self.trials)
        if waiting:
            self._set(number, "running")
        else:
            self._make("running")
        if ledger(*self.trials).may_run(self.trials[number], self.n):
            self.working[worker] = number
            self.begun.append(number)
        else:
            self._set(number, "void")

    def end(self):
        """Nothing more happens to anyone."""
        for _ in range(20 * self.n + 200):
            if self.working == [None] * len(self.working) and len(ledger(*self.trials).of("finished")) >= self.n:
                return
            for worker in range(len(self.working)):
                self.step(worker, kill=False, interrupt=False, blind=False)


events = st.tuples(st.integers(0, 3), st.sampled_from(["go", "go", "go", "kill", "interrupt", "blind"]))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.lists(events, max_size=80))
def test_whatever_is_killed_exactly_n_trials_finish_and_none_runs_twice(n_trials, workers, happenings):
    search = Simulation(n_trials, workers)
    for worker, what in happenings:
        search.step(worker % workers, kill=what == "kill", interrupt=what == "interrupt", blind=what == "blind")
    search.end()

    found = ledger(*search.trials)
    assert len(found.of("finished")) == n_trials
    assert len(search.begun) == len(set(search.begun)), "no trial is begun by two workers"
    retries = [each.user_attrs[RETRY] for each in search.trials
               if RETRY in each.user_attrs and each.user_attrs.get(OUTCOME) != "void"]  # fmt: skip
    assert len(retries) == len({retry["of"] for retry in retries}), "no trial is repeated by two workers"
    assert all(retry["kills"] < KILLS_BELIEVED for retry in retries)
