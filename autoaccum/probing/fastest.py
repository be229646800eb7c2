"""prefer="fastest": which micro-batch, under which memory saver, makes a window soonest.

Sizes of the step as it is are timed in turn: a micro-batch, and apart from it the window's end, which every micro-batch
shares. Two sizes show what a micro-batch costs whatever its samples, and so the most that fewer of them can save. Only
where that is worth it are the other savers' peaks forecast, from two small traces each, and the pairs of saver and size
that make fewer micro-batches than all cheaper ones timed too. All of it costs about three windows: where these are so
short that the traces alone would take longer, nothing that computes twice is looked at.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from autoaccum.errors import StateNotRestoredError
from autoaccum.planning.bisection import largest
from autoaccum.planning.split import usable_size
from autoaccum.probing.answered import report_of
from autoaccum.probing.climb import NOT_BORNE, cannot_run
from autoaccum.probing.find_size import Answer
from autoaccum.probing.report import ProbeReport
from autoaccum.probing.trial import Bench

__all__ = ["Pair", "Race", "chosen", "pairs"]

FIRST, IN_ALL = 2.0, 3.0  # windows that timing may take at first, and the whole choice
LOOK = 4  # traces of the step as it is, which a look at another saver costs: two of its own, a run, and its timing
NOISE = 0.02  # relative: within it the first of the pairs is as good
WORTH_IT = 0.04  # of a window: below it no saver that computes anything twice can gain by fewer micro-batches
HOPELESS = 1.3  # times the best trial's time: a saver that takes more is not timed
CLOSE = 0.15  # relative: after each round only pairs so near the best are timed again
MOST_ROUNDS = 7

Under = Callable[[str | None], AbstractContextManager[Any]]


@dataclass
class Pair:
    """A saver and a micro-batch.

    Attributes:
        saver: its name; None: the step as it is.
        size: samples.
        count: micro-batches in a window.
        seconds: of a window, each time it was timed.
    """

    saver: str | None
    size: int
    count: int
    seconds: list[float] = field(default_factory=list)

    @property
    def window(self) -> float:
        """Seconds of a window: the least, since what else runs on the machine only adds."""
        return min(self.seconds)


def pairs(share: int, limits: Sequence[tuple[str | None, int]], *, floor: int = 1, multiple_of: int = 1) -> list[Pair]:
    """What is worth timing: each saver that makes fewer micro-batches than all before it, then more of them.

    A chunked loss is timed wherever it runs: it leaves work out as well, where labels are ignored.

    Args:
        share: samples of a window.
        limits: (saver, the most samples that fit under it), cheapest first, the step as it is before all.
        floor: the smallest micro-batch.
        multiple_of: preferred multiples.
    """
    made: list[Pair] = []
    for saver, limit in limits:
        if limit < floor:
            continue
        size = usable_size(share, limit, minimum=floor, multiple_of=multiple_of)
        count = -(-share // size)
        if saver in (None, "chunked_loss") or all(count < pair.count for pair in made):
            made.append(Pair(saver, size, count))
    for first in [pair for pair in made if pair.saver in (None, "chunked_loss")]:
        limits_below = [-(-share // (first.count * times)) for times in (2, 4, 8)]
        sizes = [usable_size(share, most, minimum=floor, multiple_of=multiple_of) for most in limits_below]
        for size in sorted({size for size in sizes if max(floor, 2) <= size < first.size}, reverse=True):
            made.append(Pair(first.saver, size, -(-share // size)))
    return made


def chosen(made: Sequence[Pair]) -> Pair:
    """The soonest of those timed; of those within noise of it the first."""
    timed = [pair for pair in made if pair.seconds]
    best = min(pair.window for pair in timed)
    return next(pair for pair in timed if pair.window <= best * (1 + NOISE))


def to_gain(made: Sequence[Pair]) -> float | None:
    """The part of the soonest window that one micro-batch alone, under the same saver, could save at most.

    Windows of k and m micro-batches of the same samples differ by what m - k micro-batches cost whatever is in them.
    None where only one size was timed.
    """
    best, smaller = chosen(made), next_smaller(made)
    if smaller is None:
        return 0.0 if best.count == 1 else None
    each = (smaller.window - best.window) / (smaller.count - best.count)
    return each * (best.count - 1) / best.window


def next_smaller(made: Sequence[Pair]) -> Pair | None:
    """Of those timed under the saver of the soonest, the one with the fewest micro-batches more."""
    best = chosen(made)
    others = [pair for pair in made if pair.saver == best.saver and pair.seconds and pair.count > best.count]
    return min(others, key=lambda pair: pair.count, default=None)


class Race:
    """The savers looked at so far, what fits under each, and the pairs that were timed."""

    def __init__(
        self, bench: Bench, answer: Answer, savers: Sequence[str], under: Under, *, share: int | None, reach: int,
        multiple_of: int,
    ) -> None:  # fmt: skip
        """What there is to choose from.

        Args:
            bench, answer: on which the step as it is was probed, and what that found.
            savers, under: that may be taken, cheapest first; what the model runs under one inside.
            share: samples of a window; None: as many as fit as it is.
            reach: how far a limit is looked for.
            multiple_of: preferred multiples.
        """
        self._benches: dict[str | None, Bench] = {None: bench}
        self._answers: dict[str | None, Answer] = {None: answer}
        self._savers, self._under = savers, under
        self._share, self._reach, self._multiple_of = share or answer.micro_batch, reach, multiple_of
        self._left_out: list[dict[str, Any]] = []
        self._made: list[Pair] = []

    def report(self) -> ProbeReport:
        """Of the pair that makes a window soonest, of those that were worth timing."""
        bench, answer = self._benches[None], self._answers[None]
        self._began = time.perf_counter()
        for repeats in (False, True):  # savers that compute nothing twice may gain at any size, the others by size
            if repeats and not (self._share > answer.micro_batch and self._may_gain()):
                break
            for saver in self._savers:
                if repeats == (saver != "chunked_loss"):
                    self._look(saver)
            known = {(pair.saver, pair.size) for pair in self._made}
            wanted = pairs(self._share, self._limits(), floor=bench.floor, multiple_of=self._multiple_of)
            more = [pair for pair in wanted if (pair.saver, pair.size) not in known]
            self._made += more
            if more:
                self._time()
            bench.device.expect(bench.allowance.given, None)  # whatever runs next is measured, with nothing kept
        best = chosen(self._made)
        answer = self._answers[best.saver]
        table = {saver: self._row(saver, limit) for saver, limit in self._limits()}
        found = report_of(self._benches[best.saver], replace(answer, micro_batch=best.size))
        rates = tuple(map(tuple, table[best.saver]["throughput"]))
        return replace(found, throughput=rates, savers=(*table.values(), *self._left_out), ladder=best.saver)

    def _may_gain(self) -> bool:
        """Whether fewer micro-batches may be worth what it takes to look at savers that compute something twice."""
        gain, smaller = to_gain(self._made), next_smaller(self._made)
        if gain is None or gain < WORTH_IT or smaller is None:
            return gain is None
        # One slow moment of the machine would be paid for with every saver's traces: both are timed once more.
        for pair in (chosen(self._made), smaller):
            self._once(pair)
        return (to_gain(self._made) or 0.0) >= WORTH_IT

    def _takes_too_long(self) -> bool:
        """Whether a look at one more saver would make the choice take longer than it may."""
        traces = [trial.seconds for trial in self._benches[None].trials if trial.kind == "trace" and trial.seconds]
        left = IN_ALL * chosen(self._made).window - (time.perf_counter() - self._began)
        return bool(traces) and LOOK * min(traces) > left

    def _look(self, saver: str) -> None:
        """What fits under a saver, by two small traces; else why that cannot be told."""
        plain = self._benches[None]
        bench = self._benches[saver] = plain.alike()
        first = max(2, bench.floor, self._answers[None].micro_batch // 32)
        why = "there are too few samples for two traces"
        if self._made and self._takes_too_long():
            why = f"a look at it would take longer than the {IN_ALL:g} windows that a choice may cost"
        elif 2 * first <= self._reach:
            try:
                with self._under(saver):
                    fits = all(bench.run(size, "trace").fits for size in (first, 2 * first))
            except StateNotRestoredError:
                raise
            except NOT_BORNE as error:
                why = cannot_run(error)
            else:
                forecast = bench.forecast() if fits else None
                why = "its traces do not line up" if fits else f"{first} to {2 * first} samples do not fit"
                if forecast is not None:
                    low = largest(lambda size: forecast.reserved(size) <= bench.allowance.room, self._reach, 2 * first)
                    self._answers[saver] = Answer(low, low, "forecast" if low < self._reach else "cap", forecast)
                    return
            bench.recover()  # outside the except block, where nothing holds what the failed step held
        self._left_out.append({"saver": saver, "limit": None, "obstacle": why, "same_result": True})

    def _limits(self) -> list[tuple[str | None, int]]:
        """(saver, the most samples of a window that fit), the step as it is first."""
        most = {saver: min(found.limit or found.micro_batch, self._share) for saver, found in self._answers.items()}
        return [*{**most, None: self._answers[None].micro_batch}.items()]

    def _row(self, saver: str | None, limit: int) -> dict[str, Any]:
        """A saver's row of a report's `savers`."""
        found, made = self._answers[saver], [pair for pair in self._made if pair.saver == saver]
        size = made[0].size if made else limit
        return {
            "saver": saver,
            "limit": found.limit or found.micro_batch,
            "micro_batch": size,
            "peak_bytes": self._peak(saver, size),
            "window_seconds": made[0].window if made and made[0].seconds else None,
            # Lists, as JSON has them.
            "throughput": [[pair.size, self._share / pair.window] for pair in made if pair.seconds],
            "same_result": True,
        }

    def _peak(self, saver: str | None, size: int) -> int | None:
        forecast = self._answers[saver].forecast
        return None if forecast is None else int(forecast.reserved(size))

    def _time(self) -> None:
        """Runs each saver's largest size once, as a trial; then times what is left in turn, as long as is allowed."""
        rough: dict[str | None, float] = {}
        spent = 0.0
        firsts: dict[str | None, Pair] = {}
        for pair in self._made:
            firsts.setdefault(pair.saver, pair)
        for saver, pair in firsts.items():
            bench = self._benches[saver]
            trial = next((t for t in reversed(bench.trials) if t.batch == pair.size and t.fits and t.seconds), None)
            if trial is None:
                with self._under(saver):
                    trial = bench.run(pair.size, "verify")
                spent += trial.seconds
            if trial.fits:
                rough[saver] = pair.count * trial.seconds
        window = min(rough.values(), default=0.0)
        running = [p for p in self._made if p.saver is None or rough.get(p.saver, math.inf) <= window * HOPELESS]
        for turn in range(MOST_ROUNDS):
            timed = [pair.window for pair in running if pair.seconds]
            window = min(timed, default=window)
            running = [pair for pair in running if not pair.seconds or pair.window <= window * (1 + CLOSE)]
            for pair in running:
                if (turn or timed) and spent + window / pair.count > FIRST * window:
                    return
                spent += self._once(pair)
                timed.append(pair.window)

    def _once(self, pair: Pair) -> float:
        """Times a pair; the seconds that this took."""
        with self._under(pair.saver):
            began = time.perf_counter()
            micro, end = self._benches[pair.saver].time(pair.size, peak=self._peak(pair.saver, pair.size))
            spent = time.perf_counter() - began
        pair.seconds.append(pair.count * micro + end)
        return spent
