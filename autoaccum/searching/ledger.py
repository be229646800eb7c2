"""Which trials count, which are to run again, and how many are still to be drawn: rules over what the storage holds.

The storage is all that the workers of a search share, and it survives every kill. So everything follows from it, by
rules that each process applies alike; nothing has to be handed over, and nothing is lost with a process. Pure: no
Optuna here, and no clock.

- A trial is finished when it is complete, pruned, or failed by an error of its own; `n_trials` counts these.
- A trial that was killed or interrupted does not count. Its parameters run again, once if it was killed (it may have
  been the cause), and as often as it takes where a person interrupted it.
- Trials are numbered in the order of their making. Where more were made than there is room for, or one was repeated
  twice by two processes that did not see each other, the lower numbers stand, and the others leave before they train.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["ERRORS_BELIEVED", "KILLS_BELIEVED", "Entry", "Kind", "Ledger"]

ERRORS_BELIEVED = 5  # a setup that fails so often before anything else is not tried on
KILLS_BELIEVED = 2  # a setting that took its process with it twice is not tried a third time


class Kind(enum.Enum):
    """What became of a trial."""

    FINISHED = "finished"
    RUNNING = "running"
    WAITING = "waiting"
    KILLED = "killed"
    INTERRUPTED = "interrupted"
    VOID = "void"


@dataclass(frozen=True)
class Entry:
    """One trial.

    Attributes:
        number: in the order of making.
        kind: what became of it.
        error: whether it is finished by an error.
        drawn: whether it got so far as to have parameters.
        repeats: the number of the trial whose parameters it runs again; None for a fresh one.
        kills: how often its parameters were killed before.
    """

    number: int
    kind: Kind
    error: bool = False
    drawn: bool = True
    repeats: int | None = None
    kills: int = 0

    @property
    def counts(self) -> bool:
        """Whether it takes one of the places."""
        return self.kind in (Kind.FINISHED, Kind.RUNNING, Kind.WAITING)

    @property
    def kills_now(self) -> int:
        """Kills, this one included."""
        return self.kills + (self.kind is Kind.KILLED)


class Ledger:
    """The trials of a study at one moment."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = sorted(entries, key=lambda entry: entry.number)
        self._repeated = {entry.repeats for entry in self.entries}

    def count(self, kind: Kind) -> int:
        """Trials of one kind."""
        return sum(entry.kind is kind for entry in self.entries)

    @property
    def finished(self) -> int:
        """Trials that are finished: complete, pruned, or failed by an error of their own."""
        return self.count(Kind.FINISHED)

    @property
    def untouched(self) -> bool:
        """Whether nothing was tried yet: no trial counts, and none has parameters that are to run again."""
        return not any(entry.counts for entry in self.entries) and not self.to_repeat()

    def to_repeat(self) -> list[Entry]:
        """Trials that ended before their time, and whose parameters are to run again."""
        broken = (Kind.KILLED, Kind.INTERRUPTED)
        return [
            entry
            for entry in self.entries
            if entry.kind in broken
            and entry.drawn
            and entry.number not in self._repeated
            and entry.kills_now < KILLS_BELIEVED
        ]

    def room(self, n_trials: int) -> int:
        """How many fresh trials are still to be drawn."""
        taken = sum(entry.counts for entry in self.entries) + len(self.to_repeat())
        return max(0, n_trials - taken)

    def may_run(self, number: int, n_trials: int) -> bool:
        """Whether the trial of this number has a place, now that it was made."""
        before = [entry for entry in self.entries if entry.number < number]
        own = next((entry for entry in self.entries if entry.number == number), None)
        if own is not None and own.repeats is not None and any(entry.repeats == own.repeats for entry in before):
            return False
        return sum(entry.counts for entry in before) < n_trials

    def only_errors(self, n_trials: int, most: int = ERRORS_BELIEVED) -> bool:
        """Whether all of the first trials that finished failed by errors, and there are enough of them to say so."""
        done = [entry for entry in self.entries if entry.kind is Kind.FINISHED]
        return len(done) >= min(most, n_trials) and all(entry.error for entry in done[: min(most, n_trials)])

    def summary(self) -> dict[str, Any]:
        """How many there are of each kind, for a person."""
        return {kind.value: self.count(kind) for kind in Kind if self.count(kind)}
