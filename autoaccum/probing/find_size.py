"""Pure: from a few traced steps to the answer. Forecast, jump there, run it once.

Everything real is behind the bench: what runs a step, and what fits a forecast to the steps that were traced. Two or
three small traces give the peak at any size; the size wanted is run once to be sure. A surprise moves the forecast to
what was measured; without a forecast the guarded bracket grows and bisects. Out of memory is never the way to learn
where the limit is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoaccum.errors import NothingFitsError, ProbeError
from autoaccum.planning.bisection import largest
from autoaccum.probing.bracket import Bracket, highest_peak
from autoaccum.probing.outcome import Trial

if TYPE_CHECKING:
    from autoaccum.memory.forecast import Forecast
    from autoaccum.probing.cache import Lines
    from autoaccum.probing.trial import Bench

__all__ = ["ERRATIC", "MOST_RUNS", "SAME_PEAK", "THIRD_TRACE", "Answer", "find"]

# The third trace is so many times smaller than the size it points to: it shows kernels that change, at that part of the
# step's cost. Where an overrun is suffered and not only counted, more must be known before it can do harm: where each
# step is traced, by a third trace that is nearer; elsewhere by running this share of the limit before the limit itself.
THIRD_TRACE, NEAR_TRACE, STEPPING_STONE = 4, 2, 0.85
SAME_PEAK = 0.01  # relative difference up to which a small step counts as the one that was forecast
MOST_TRACES, MOST_RUNS = 4, 12
ERRATIC = (
    f"{MOST_RUNS} trials gave no size that can be relied on: memory in use changes from step to step; give memory= a "
    "fixed budget, or micro_batch= a size"
)
CLOSE_ENOUGH = 1.08  # after an overrun, a size that fits is not improved on by less than this
# Nor is any by less than this: under a process's limit, where what libraries keep varies by as much, and on a device.
NOT_WORTH_A_STEP, NOT_ON_A_DEVICE = 1.025, 1.01
ENOUGH_RUNS = 4  # after so many, a size that fits is good enough where the forecast has been wrong
# How clear of a size that overran the next one stays: once something between was measured, and after each overrun.
OVERRUNS = (1.1, 1.3, 2.0, 4.0)


@dataclass(frozen=True)
class Answer:
    """What was found: `micro_batch` was run, or a larger one was, and fits."""

    micro_batch: int
    limit: int | None
    proof: str | None
    forecast: "Forecast | Lines | None"


def find(
    bench: "Bench",
    *,
    floor: int,
    ceiling: int,
    wanted: Callable[[int], int] | None = None,
    reach: int | None = None,
    known: "Forecast | Lines | None" = None,
) -> Answer:
    """The largest micro-batch that fits, or the one that a target needs.

    Args:
        bench: runs the steps.
        floor, ceiling: the smallest size worth running, and the largest that may be run.
        wanted: the micro-batch a plan takes where so many samples fit; None: the largest that fits is what is wanted.
        reach: where `wanted` is given, how far the limit is looked for by forecast alone; None: up to the ceiling.
        known: a forecast from an earlier run of the same training; spares the traces where it still holds.

    Raises:
        NothingFitsError: the floor does not fit.
        ProbeError: memory is so erratic that no size can be relied on.
    """
    exact = wanted is None
    reach = ceiling if exact else max(reach or 0, ceiling)
    return _Search(bench, floor, ceiling, wanted or (lambda limit: limit), reach, exact, known).run()


class _Search:
    def __init__(
        self,
        bench: "Bench",
        floor: int,
        ceiling: int,
        wanted: Callable[[int], int],
        reach: int,
        exact: bool,
        known: "Forecast | Lines | None",
    ) -> None:
        self._bench, self._floor, self._wanted, self._reach, self._exact = bench, floor, wanted, reach, exact
        self._bracket = Bracket(floor, ceiling, bench.budget)
        self._forecast: Forecast | Lines | None = None
        self._known = known
        self._anchor: tuple[int, int] | None = None  # (size, measured peak): beyond it the forecast tells the growth
        self._growth = 1.0  # measured over forecast growth, where a surprise showed that they differ
        self._last_high: Trial | None = None
        self._runs = self._overruns = 0
        self._traced: list[int] = []

    def run(self) -> Answer:
        self._trace()
        self._step_nearer()
        for _ in range(MOST_RUNS):
            size = self._next()
            if size is None:
                return self._answer()
            self._runs += 1
            self._try(size, "verify" if self._forecast is not None else "search")
            if self._forecast is None and self._bench.traces_all:
                self._look_again()
        if self._bracket.low == 0:
            raise ProbeError(ERRATIC)
        return self._answer()

    # --- traces

    def _trace(self) -> None:
        """Two or three small steps, none larger than what is certain to fit by those before."""
        first = min(max(2, self._floor), self._bracket.ceiling)
        if not self._try(first, "trace").fits:
            if first == self._floor or not self._try(self._floor, "trace").fits:
                raise NothingFitsError(f"a micro-batch of {self._floor} does not fit")
            return
        if self._still_holds(first):
            self._forecast = self._known
            return
        for _ in range(MOST_TRACES - 1):
            size = self._next_trace()
            if size is None or not self._try(size, "trace").fits:
                return
            self._forecast = self._bench.forecast()
            if self._forecast is not None and self._forecast.residual is not None:
                return

    def _step_nearer(self) -> None:
        """One trace more, near the limit, where an overrun would be suffered and only small steps were traced."""
        bench = self._bench
        if self._forecast is None or self._forecast is self._known:
            return
        if not (self._exact and bench.suffers) or bench.traces_all:
            return
        size = int(self._limit(self._bracket.high - 1) * STEPPING_STONE)
        if size > max(self._traced) and self._try(size, "trace").fits:
            self._forecast = bench.forecast() or self._forecast

    def _look_again(self) -> None:
        """Where each step is traced, the larger ones may line up though the small ones did not."""
        self._forecast = self._bench.forecast()
        if self._forecast is not None:
            largest = max(self._bracket.peaks)
            self._anchor = (largest, self._bracket.peaks[largest])

    def _still_holds(self, size: int) -> bool:
        trial = self._bench.trials[-1]
        if self._known is None or trial.batch != size or trial.peak_bytes is None:
            return False
        return abs(self._known.peak(size) / trial.peak_bytes - 1.0) <= SAME_PEAK

    def _next_trace(self) -> int | None:
        run = sorted(self._bracket.peaks)
        if self._forecast is None:
            for size in (2 * run[-1], run[-1] + 1):
                bound = highest_peak(size, self._bracket.peaks, self._bench.fixed)
                if size < self._bracket.high and bound <= self._bench.budget:
                    return size
            smaller = run[0] - 1
            return smaller if smaller >= self._floor else None
        # Odd: at powers of two, rounding to pages and blocks shows nothing of itself.
        times = NEAR_TRACE if self._bench.suffers and self._bench.traces_all else THIRD_TRACE
        third = self._wanted(max(self._limit(self._bracket.ceiling), self._floor)) // times | 1
        return third if run[-1] < third < self._bracket.high else None

    # --- the size wanted

    def _next(self) -> int | None:
        """The size to run next; None where the size wanted is known to fit."""
        bracket = self._bracket
        if bracket.closed or self._wanted(bracket.high - 1) <= bracket.low:
            return None
        if self._forecast is None:
            return self._useful(bracket.next())
        settled = bracket.low > max(self._traced, default=0)
        overran = self._overruns or (self._bench.suffers and self._last_high is not None)
        if settled and (self._runs >= ENOUGH_RUNS or (overran and bracket.high <= CLOSE_ENOUGH * bracket.low)):
            return None
        size = self._wanted(max(self._limit(bracket.high - 1), self._floor))
        least = NOT_WORTH_A_STEP if self._bench.traces_all else NOT_ON_A_DEVICE
        if settled and self._bench.suffers and size <= least * bracket.low:
            return None
        if size > bracket.low:
            return size
        return bracket.low + 1 if self._exact and self._uncertain(bracket.low + 1) else None

    def _useful(self, proposal: int) -> int:
        """The wanted size nearest to the bracket's proposal that is not known to fit already."""
        size = proposal
        while self._wanted(size) <= self._bracket.low and size < self._bracket.high - 1:
            size += 1
        return self._wanted(size)

    def _uncertain(self, size: int) -> bool:
        """Whether the forecast at `size` is over the budget by less than it has been wrong.

        Where an overrun is suffered, what counts is how wrong it was at the size last measured, which is near.
        """
        forecast, budget = self._forecast, self._bench.budget
        if forecast is None or size >= self._bracket.high:
            return False
        wrong = forecast.residual or 0.0
        if self._bench.suffers and self._anchor is not None:
            at, measured = self._anchor
            wrong = abs(forecast.reserved(at) / measured - 1.0)
        return self._scaled(size) - self._bench.room < 2 * wrong * budget

    def _limit(self, ceiling: int) -> int:
        """The largest size up to `ceiling` whose forecast fits; 0 where none does."""
        forecast = self._forecast
        assert forecast is not None
        # First by what is in use, which is told at once: what an allocator reserves is more, and takes a while to tell.
        ceiling = largest(lambda size: self._scaled(size, forecast.peak(size)) <= self._bench.room, ceiling)
        return largest(lambda size: self._scaled(size) <= self._bench.room, ceiling)

    def _scaled(self, size: int, here: int | None = None, *, raised: bool = True) -> float:
        """The forecast at `size`, moved to what was measured.

        `here` is what the forecast says there, where that was asked already. `raised`: growing as fast as overruns
        showed.
        """
        assert self._forecast is not None
        here = self._forecast.reserved(size) if here is None else here
        if self._anchor is None:  # nothing near was measured: as wrong as it was at the third trace, it may be here
            return here * (1.0 + (self._forecast.residual or 0.0))
        at, measured = self._anchor
        anchored = self._forecast.reserved(at)
        if size <= at:
            return here * measured / anchored
        return measured + (self._growth if raised else 1.0) * (here - anchored)

    # --- what a trial shows

    def _try(self, size: int, kind: str) -> Trial:
        trial = self._bench.run(size, kind)
        if kind == "trace":
            self._traced.append(size)
        self._bracket.budget = self._bench.budget
        measured = trial.peak_bytes if trial.reserved_bytes is None else trial.reserved_bytes
        if not trial.fits and measured is not None and measured <= self._bench.budget:
            measured = None  # the allocator had to empty its cache: this is what it was allowed, and not what it needs
        if trial.fits:
            self._bracket.fits(size, measured)
        else:
            self._bracket.fails(size, measured)
            self._last_high = trial
        if self._forecast is not None and (kind != "trace" or measured is None):
            self._correct(size, measured)
        return trial

    def _correct(self, size: int, measured: int | None) -> None:
        """Moves the forecast to what was measured; an overrun without a measure makes it grow faster."""
        known = self._known if self._forecast is self._known else None
        if known is None or measured is None or abs(known.peak(size) / measured - 1.0) > SAME_PEAK:
            self._forecast = self._bench.forecast() or self._forecast
        if measured is not None:
            self._anchor = (size, measured)
            if self._growth > 1.0:  # something larger overran: stay clear of it, though less than before
                self._growth = max(1.0, self._needed()) * OVERRUNS[0]
            return
        below = [ran for ran in self._bracket.peaks if ran < size]
        if below:
            self._anchor = (max(below), self._bracket.peaks[max(below)])
            self._overruns += 1
            self._growth = max(1.0, self._needed()) * OVERRUNS[min(self._overruns, len(OVERRUNS) - 1)]

    def _needed(self) -> float:
        """By how much more than forecast memory must grow from the anchor to overrun the budget where it did."""
        assert self._forecast is not None
        assert self._anchor is not None
        at, measured = self._anchor
        expected = self._forecast.reserved(self._bracket.high) - self._forecast.reserved(at)
        return (self._bench.budget - measured) / expected if expected > 0 else 1.0

    def _answer(self) -> Answer:
        bracket = self._bracket
        if self._forecast is None:
            limit = bracket.low if self._exact or bracket.closed else None
            return Answer(self._sure(bracket.high - 1), limit, None if limit is None else self._proof(limit), None)
        if self._refuted() and not self._exact and not bracket.closed:
            return Answer(self._sure(bracket.low), None, None, self._forecast)
        reached = self._limit(self._reach if self._last_high is None else bracket.high - 1)
        if not self._exact and reached > bracket.low and (self._forecast.residual or 0.0) > SAME_PEAK:
            return Answer(self._sure(reached), None, None, self._forecast)  # too far off to promise what was not run
        limit = bracket.low if self._exact else max(reached, bracket.low)
        return Answer(self._sure(limit), limit, self._proof(limit), self._forecast)

    def _refuted(self) -> bool:
        """Whether the forecast would let a size fit that was run and does not: it tells nothing up to there."""
        high = self._last_high
        if high is None or high.batch != self._bracket.high:
            return False
        return self._scaled(high.batch, raised=high.peak_bytes is not None) <= self._bench.room

    def _sure(self, limit: int) -> int:
        """The micro-batch wanted at `limit` where it is known to fit, else the one wanted at the largest that is."""
        size = self._wanted(max(limit, self._floor))
        return size if size <= self._bracket.low else self._wanted(self._bracket.low)

    def _proof(self, limit: int) -> str | None:
        """What shows that no more than `limit` fits; None where only larger sizes are known not to."""
        high = self._last_high
        if high is not None and limit + 1 == self._bracket.high:
            return "out of memory" if high.peak_bytes is None else "forecast"
        if limit >= self._reach:
            return "cap"
        over = self._forecast is not None and self._scaled(limit + 1, raised=False) > self._bench.room
        return "forecast" if over else None
