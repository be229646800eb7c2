"""The rules by which trials count and run again, against a simulated search that is killed wherever it hurts."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoaccum.searching.ledger import KILLS_BELIEVED, Entry, Kind, Ledger


def test_a_killed_trials_parameters_run_once_more():
    killed = Entry(0, Kind.KILLED)
    again = Entry(1, Kind.KILLED, repeats=0, kills=1)

    assert Ledger([killed]).to_repeat() == [killed]
    assert Ledger([killed, again]).to_repeat() == [], "twice is enough to be believed"


def test_an_interrupted_trials_parameters_run_as_often_as_it_takes():
    entries = [Entry(0, Kind.INTERRUPTED)]
    for number in range(1, 5):
        entries.append(Entry(number, Kind.INTERRUPTED, repeats=number - 1, kills=0))

    assert [entry.number for entry in Ledger(entries).to_repeat()] == [4]


def test_a_trial_that_never_had_parameters_is_not_repeated():
    assert Ledger([Entry(0, Kind.KILLED, drawn=False)]).to_repeat() == []


def test_of_two_that_repeat_the_same_trial_the_first_stands():
    ledger = Ledger([Entry(0, Kind.KILLED), Entry(1, Kind.RUNNING, repeats=0), Entry(2, Kind.RUNNING, repeats=0)])

    assert ledger.may_run(1, 9)
    assert not ledger.may_run(2, 9)


def test_more_trials_than_there_is_room_for_leave_by_number():
    ledger = Ledger([Entry(0, Kind.FINISHED), Entry(1, Kind.RUNNING), Entry(2, Kind.RUNNING)])

    assert ledger.may_run(1, 2)
    assert not ledger.may_run(2, 2)


@pytest.mark.parametrize(
    ("kinds", "n", "said"), [("eeeee", 30, True), ("eeee", 30, False), ("eee", 3, True), ("eeeefe", 30, False)]
)
def test_the_search_stops_where_all_of_the_first_five_fail(kinds, n, said):
    entries = [Entry(number, Kind.FINISHED, error=kind == "e") for number, kind in enumerate(kinds)]

    assert Ledger(entries).only_errors(n) is said


class Simulation:
    """Workers on a shared storage, each between two of its steps when something happens to it."""

    def __init__(self, n_trials, workers):
        self.n, self.entries, self.begun = n_trials, [], []
        self.working = [None] * workers  # the number of each worker's trial

    def _set(self, number, **changes):
        self.entries[number] = replace(self.entries[number], **changes)

    def step(self, worker, *, kill, interrupt, blind):
        """A worker goes one step on: it claims, or finishes. `blind`: it looked before the others' last claim."""
        own = self.working[worker]
        if own is None:
            self._claim(worker, blind)
        elif kill or interrupt:
            self._set(own, kind=Kind.KILLED if kill else Kind.INTERRUPTED)
            self.working[worker] = None
        else:
            self._set(own, kind=Kind.FINISHED)
            self.working[worker] = None

    def _claim(self, worker, blind):
        seen = Ledger(self.entries[:-1] if blind else self.entries)
        for entry in seen.to_repeat():
            self.entries.append(Entry(len(self.entries), Kind.WAITING, repeats=entry.number, kills=entry.kills_now))
        waiting = [entry.number for entry in self.entries if entry.kind is Kind.WAITING]
        if not waiting and not seen.room(self.n):
            return
        number = waiting[0] if waiting else len(self.entries)
        if waiting:
            self._set(number, kind=Kind.RUNNING)
        else:
            self.entries.append(Entry(number, Kind.RUNNING))
        if Ledger(self.entries).may_run(number, self.n):
            self.working[worker] = number
            self.begun.append(number)
        else:
            self._set(number, kind=Kind.VOID)

    def end(self):
        """Nothing more happens to anyone."""
        for _ in range(20 * self.n + 200):
            for worker in range(len(self.working)):
                self.step(worker, kill=False, interrupt=False, blind=False)


events = st.tuples(st.integers(0, 3), st.sampled_from(["go", "go", "go", "kill", "interrupt", "blind"]))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.lists(events, max_size=80))
def test_whatever_is_killed_exactly_n_trials_finish_and_none_runs_twice(n_trials, workers, happenings):
    search = Simulation(n_trials, workers)
    for worker, what in happenings:
        search.step(worker % workers, kill=what == "kill", interrupt=what == "interrupt", blind=what == "blind")
    search.end()

    ledger = Ledger(search.entries)
    assert ledger.finished == n_trials
    assert len(search.begun) == len(set(search.begun)), "no trial is begun by two workers"
    repeated = [e.repeats for e in search.entries if e.repeats is not None and e.kind is not Kind.VOID]
    assert len(repeated) == len(set(repeated)), "no trial is repeated by two workers"
    assert all(e.kills_now <= KILLS_BELIEVED for e in search.entries)
    assert not ledger.to_repeat() or ledger.finished == n_trials
