"""From a few traced steps to the answer. Forecast, jump there, run it once.

Everything real is behind the bench: what runs a step, and what fits a forecast to the steps that were traced. Two or
three small traces give the peak at any size; the size wanted is run once to be sure. A surprise moves the forecast to
what was measured. Where one refutes the forecast, or there is none, sizes grow as far as surely fits, or lie between
what fits and what does not. Out of memory is never the way to learn where the limit is.

Where the bench's ranks meet in each trial, as those of a sharded model do, all take every branch alike: what decides it
is exchanged first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoaccum.errors import NothingFitsError, ProbeError
from autoaccum.planning.bisection import largest
from autoaccum.planning.length_rule import Room
from autoaccum.probing.outcome import Trial

if TYPE_CHECKING:
    from autoaccum.probing.cache import Forecaster
    from autoaccum.probing.trial import Bench

__all__ = ["ERRATIC", "MOST_RUNS", "SAME_PEAK", "THIRD_TRACE", "Answer", "Search"]

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
LEAST_GROWTH = 32  # without a forecast the next size is larger by this part at least


@dataclass(frozen=True)
class Answer:
    """What was found: `micro_batch` was run, or a larger one was, and fits; the others as in a report.

    `by_length` is where samples differ in length, for which all others are those of the longest looked at.
    """

    micro_batch: int
    limit: int | None
    proof: str | None
    forecast: "Forecaster | None"
    by_length: Room = ()


class Search:
    """Looks for the largest micro-batch that fits, or for the one that a target needs.

    Attributes:
        bench: runs the steps.
        forecast: of all traces; None while there is none, on all ranks alike.
    """

    def __init__(
        self,
        bench: "Bench",
        ceiling: int,
        *,
        wanted: Callable[[int], int] | None = None,
        reach: int = 0,
        known: "Forecaster | None" = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            bench: runs the steps.
            ceiling: the largest size that may be run.
            wanted: the micro-batch a plan takes where so many samples fit; None: the largest that fits is wanted.
            reach: where `wanted` is given, how far the limit is looked for by forecast alone; at least the ceiling.
            known: a forecast from an earlier run of the same training; spares the traces where it still holds.
        """
        self.bench, self._may, self._floor, self._known = bench, bench.allowance, bench.floor, known
        self._exact = wanted is None
        self._wanted: Callable[[int], int] = wanted or (lambda limit: limit)
        self._reach = ceiling if self._exact else max(reach, ceiling)
        self._low, self._high = 0, ceiling + 1  # fits, or 0; does not, or may not be run
        self._peaks: dict[int, int] = {}  # measured, in bytes, by size
        self._failed: Trial | None = None  # the last that did not fit
        self.forecast: Forecaster | None = None
        self._anchor: tuple[int, int] | None = None  # (size, measured peak): beyond it the forecast tells the growth
        self._traced = 0  # the largest size

    def run(self) -> Answer:
        """The answer of this rank alone.

        Raises:
            NothingFitsError: the floor does not fit.
            ProbeError: memory is so erratic that no size can be relied on.
        """
        self.trace()
        self._step_nearer()
        for _ in range(MOST_RUNS):
            size = self._next()
            if size is None:
                break
            self.fits(size, "verify" if self.forecast is not None else "search")
            if self.forecast is None and self.bench.traces_all:  # larger ones may line up though small ones did not
                self._look()
                self._anchor = None if self.forecast is None else max(self._peaks.items())
        if self._low == 0:
            raise ProbeError(ERRATIC)
        return self._answer()

    def _all(self, holds: bool) -> bool:
        """Whether it holds on every rank that meets others in a trial."""
        ranks = self.bench.ranks
        return holds if ranks is None else not ranks.any("the probe", not holds)

    # --- traces

    def trace(self) -> None:
        """Two or three small steps, none larger than what is certain to fit by those before.

        A NothingFitsError where not even the floor fits, on some rank.
        """
        first = min(max(2, self._floor), self._high - 1)
        if not self.fits(first, "trace"):
            if first == self._floor or not self.fits(self._floor, "trace"):
                raise NothingFitsError(f"a micro-batch of {self._floor} does not fit")
            self._look()  # a step over a budget that is only counted was traced all the same
            return
        if self._known is not None and self._agrees(first, self.bench.trials[-1].peak_bytes):
            self.forecast = self._known
            return
        for _ in range(MOST_TRACES - 1):
            size = self._next_trace()
            if size is None or not self.fits(size, "trace"):
                return
            self._look()
            if self._all(self.forecast is not None and self.forecast.residual is not None):
                return

    def _look(self, otherwise: "Forecaster | None" = None) -> None:
        """Makes the forecast of all traces anew; where these carry none on some rank, it is the other one."""
        found = self.bench.forecast()
        self.forecast = found if self._all(found is not None) else otherwise

    def _agrees(self, size: int, measured: int | None) -> bool:
        """Whether the known forecast tells what was measured."""
        return bool(measured and self._known and abs(self._known.peak(size) / measured - 1.0) <= SAME_PEAK)

    def _step_nearer(self) -> None:
        """One trace more, near the limit, where an overrun would be suffered and only small steps were traced."""
        bench = self.bench
        if self.forecast is None or self.forecast is self._known:
            return
        if not (self._exact and self._may.suffers) or bench.traces_all:
            return
        size = int(self._limit(self._high - 1) * STEPPING_STONE)
        if size > self._traced and self.fits(size, "trace"):
            self._look(self.forecast)

    def _next_trace(self) -> int | None:
        smallest, largest_yet, bench = min(self._peaks), max(self._peaks), self.bench
        if self.forecast is None:
            surely = (size for size in (2 * largest_yet, largest_yet + 1) if self._all(self._surely_fits(size)))
            return next(surely, smallest - 1 if smallest > self._floor else None)
        # Odd: at powers of two, rounding to pages and blocks shows nothing of itself.
        times = NEAR_TRACE if self._may.suffers and bench.traces_all else THIRD_TRACE
        third = self._wanted(max(self._limit(self._high - 1), self._floor)) // times | 1
        if bench.ranks is not None:
            third = min(bench.ranks.gather("the probe", third))
        return third if largest_yet < third < self._high else None

    # --- the size wanted

    def _next(self) -> int | None:
        """The size to run next; None where the size wanted is known to fit."""
        low, high, suffers, failed = self._low, self._high, self._may.suffers, self._failed
        settled = low > self._traced
        overran = failed is not None and (suffers or failed.peak_bytes is None)
        if self._closed or (settled and overran and high <= CLOSE_ENOUGH * low) or self._wanted(high - 1) <= low:
            return None
        if self.forecast is None:
            return self._useful()
        limit = max(self._limit(high - 1), self._floor)
        size = self._useful() if self._refuted() else self._wanted(limit)
        least = NOT_WORTH_A_STEP if self.bench.traces_all else NOT_ON_A_DEVICE
        return size if size > (least * low if settled and suffers else low) else None

    @property
    def _closed(self) -> bool:
        """No size is left in question."""
        return self._high - max(self._low, self._floor - 1) <= 1

    def _useful(self) -> int:
        """By what fits and what does not: a size between, or where nothing failed one that surely fits; or the wanted
        size nearest to it that is not known to fit already.
        """
        if self._low == 0:
            return self._wanted(self._floor)
        size = (self._low + 2 * self._high) // 3
        if self._failed is None:
            surely = largest(self._surely_fits, self._high - 1, self._low)
            size = min(max(surely, self._low + max(1, self._low // LEAST_GROWTH)), self._high - 1)
        while self._wanted(size) <= self._low and size < self._high - 1:
            size += 1
        return self._wanted(size)

    def _surely_fits(self, size: int) -> bool:
        """Whether a size fits that is larger than all that were run, by an upper bound on its peak.

        Of the largest's what is not fixed, whatever the size, grows at most in proportion to it.
        """
        ran, peak = max(self._peaks.items())
        fixed = min(self.bench.fixed, peak)
        return size < self._high and fixed + (peak - fixed) * size / ran <= self._may.bytes

    def _limit(self, ceiling: int) -> int:
        """The largest size up to `ceiling` whose forecast fits; 0 where none does."""
        forecast = self.forecast
        assert forecast is not None
        # First by what is in use, which is told at once: what an allocator reserves is more, and takes a while to tell.
        ceiling = largest(lambda size: self._scaled(size, forecast.peak(size)) <= self._may.room, ceiling)
        return largest(lambda size: self._scaled(size) <= self._may.room, ceiling)

    def _scaled(self, size: int, here: int | None = None) -> float:
        """The forecast at `size`, moved to what was measured; `here` is what it says there, where that was asked."""
        assert self.forecast is not None
        here = self.forecast.reserved(size) if here is None else here
        if self._anchor is None:  # nothing near was measured: as wrong as it was at the third trace, it may be here
            return here * (1.0 + (self.forecast.residual or 0.0))
        at, measured = self._anchor
        anchored = self.forecast.reserved(at)
        return here * measured / anchored if size <= at else measured + here - anchored

    # --- what a trial shows

    def fits(self, size: int, kind: str = "verify") -> bool:
        """Runs a step of `size` samples here, and whatever other ranks run meanwhile: whether it fits on all."""
        trial = self.bench.run(size, kind)
        measured = trial.counted_bytes
        if not trial.fits and measured is not None and measured <= self._may.bytes:
            measured = None  # the allocator had to empty its cache: this is what it was allowed, and not what it needs
        if measured is not None:
            self._peaks[size] = measured
        if kind == "trace":
            self._traced = max(self._traced, size)
        if trial.fits:
            self._low = max(self._low, size)
        elif not self.bench.elsewhere:
            self._high, self._failed = min(self._high, size), trial
            if self._low >= self._high:  # memory is not the same from run to run: believe the failure
                self._low = max((ran for ran in self._peaks if ran < self._high), default=0)
        fits = self._all(trial.fits)
        if self.forecast is not None and (kind != "trace" or not fits):
            self._correct(size, measured)
        return fits

    def _correct(self, size: int, measured: int | None) -> None:
        """Moves the forecast to what was measured; after a step without a measure, to the largest below it."""
        if self.forecast is not self._known or not self._agrees(size, measured):
            self._look(self.forecast)
        near = [(ran, peak) for ran, peak in self._peaks.items() if ran <= size]
        self._anchor = max(near, default=self._anchor)

    @property
    def limit(self) -> int:
        """The largest size that fits on this rank, by forecast where there is one; 0 where none does."""
        if self.forecast is None:
            return self._low
        return self._limit(self._reach if self._failed is None else self._high - 1)

    def _answer(self) -> Answer:
        low, high = self._low, self._high
        if self.forecast is None:
            limit = low if self._exact or self._closed else None
            return Answer(self._sure(high - 1), limit, None if limit is None else self.proof(limit), None)
        if self._refuted() and not self._exact and not self._closed:
            return Answer(self._sure(low), None, None, self.forecast)
        reached = self.limit
        if not self._exact and reached > low and (self.forecast.residual or 0.0) > SAME_PEAK:
            return Answer(self._sure(reached), None, None, self.forecast)  # too far off to promise what was not run
        limit = low if self._exact else max(reached, low)
        return Answer(self._sure(limit), limit, self.proof(limit), self.forecast)

    def _refuted(self) -> bool:
        """Whether the forecast would let a size fit that was run and does not: it tells nothing up to there."""
        failed = self._failed
        return failed is not None and failed.batch == self._high and self._scaled(self._high) <= self._may.room

    def _sure(self, limit: int) -> int:
        """The micro-batch wanted at `limit` where it is known to fit, else the one wanted at the largest that is."""
        size = self._wanted(max(limit, self._floor))
        return size if size <= self._low else self._wanted(self._low)

    def proof(self, limit: int) -> str | None:
        """What shows that no more than `limit` fits; None where only larger sizes are known not to."""
        if self._failed is not None and limit + 1 == self._high:
            return "out of memory" if self._failed.peak_bytes is None else "forecast"
        if limit >= self._reach:
            return "cap"
        return "forecast" if self.forecast is not None and self._scaled(limit + 1) > self._may.room else None
