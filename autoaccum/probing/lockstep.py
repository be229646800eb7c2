"""The probe of a sharded model, whose ranks meet in every step: they run the same trials at the same time.

All ranks trace the same small sizes, and each forecasts for itself, since shards and budgets differ. One exchange then
makes their limits everybody's, each takes its share of a window by them, and that size is run, on all ranks at once.
"""

from collections.abc import Sequence
from dataclasses import replace

from autoaccum.errors import NothingFitsError, PlanError, ProbeError
from autoaccum.memory.forecast import Forecast
from autoaccum.planning.bisection import largest
from autoaccum.planning.split import largest_size, shares
from autoaccum.probing.answered import report_of
from autoaccum.probing.bracket import highest_peak
from autoaccum.probing.find_size import ERRATIC, MOST_RUNS, THIRD_TRACE, Answer
from autoaccum.probing.report import ProbeReport
from autoaccum.probing.trial import Bench

__all__ = ["find_together"]

_WHERE = "the probe"

# Summing once a window has to be sooner by this share, with as many windows timed each way, in turn.
WORTH, ROUNDS = 0.05, 2


def find_together(bench: Bench, ceiling: int, reach: int, window: int | None, *, runs: bool = True) -> ProbeReport:
    """The report with the micro-batch that this rank takes of a window; all ranks call this.

    Args:
        bench: runs trials, in which its ranks meet.
        ceiling: the largest size that may be run, alike on all ranks.
        reach: how far the limit is looked for by forecast.
        window: samples of a window over all ranks; None: each takes the most that fits on it.
        runs: False: the answer is forecast only.

    Raises:
        NothingFitsError: the floor does not fit on some rank; on all of them.
        ProbeError: memory is so erratic that no size can be relied on.
    """
    search, floor = _Together(bench, ceiling, reach), bench.floor
    search.trace()
    for _ in range(MOST_RUNS):
        limits = search.ranks.gather(_WHERE, search.limit)
        if min(limits) < floor:
            rank = limits.index(min(limits))
            raise NothingFitsError(f"a micro-batch of {floor} does not fit on rank {rank}")
        sizes, passes = (limits, 1) if window is None else _shared(window, limits, floor)
        size = min(max(sizes[search.ranks.rank], floor), ceiling)
        if not runs or search.fits(size):
            if not runs or passes == 1:
                return report_of(bench, search.answer(size))
            return _summed_late(search, size)
        search.look()  # by the larger step as well
    raise ProbeError(ERRATIC)


def _shared(window: int, limits: Sequence[int], floor: int) -> tuple[Sequence[int], int]:
    """(the largest micro-batch of each rank's share of a window, the most micro-batches on any rank)."""
    try:
        parts = shares(window, limits, minimum=floor)
    except PlanError:  # the plan will say which windows can be shared
        return [min(limit, window) for limit in limits], 1
    sizes = [largest_size(part, limit, minimum=floor) for part, limit in zip(parts, limits)]
    return sizes, max(-(-part // limit) for part, limit in zip(parts, limits))


def _summed_late(often: "_Together", size: int) -> ProbeReport:
    """What was found, or gradients summed once a window where they fit whole and it is faster; all ranks call this.

    It saves a reduction for each micro-batch but the last, and takes the memory of whole gradients. The report says
    when they are summed, and why.
    """
    once = often.once()
    why = once.why_not(size)
    if why is None:
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for bench in (often.bench, once.bench):
                times[bench.late].append(sum(bench.time(size, 2)))
        least = often.ranks.tally(_WHERE, [min(times[False]), min(times[True])])
        two, one = (1e3 * seconds / often.ranks.size for seconds in least)
        why = f"two micro-batches took {one:.3g} ms with one sum, and {two:.3g} ms with two"
        if one <= (1.0 - WORTH) * two:
            found = report_of(once.bench, once.answer(size))
            trials = (*often.bench.trials, *found.trials)
            sync = f"window: gradients wait whole for one sum over the ranks; {why}"
            return replace(found, gradient_sync=sync, trials=trials)
    sync = f"micro-batch: gradients are summed over the ranks in each, and stay sharded; {why}"
    return replace(report_of(often.bench, often.answer(size)), gradient_sync=sync)


class _Together:
    """What this rank knows of its own memory."""

    def __init__(self, bench: Bench, ceiling: int, reach: int) -> None:
        assert bench.ranks is not None
        self.bench, self.ranks, self._floor = bench, bench.ranks, bench.floor
        self._ceiling, self._reach = ceiling, reach
        self._most = reach  # a larger one was run, and does not fit
        self._peaks: dict[int, int] = {}
        self.forecast: Forecast | None = None

    def trace(self) -> None:
        """Two or three small steps, of the same sizes on all ranks."""
        first = min(max(2, self._floor), self._ceiling)
        if not self.fits(first, "trace"):
            first = self._floor
            if not self.fits(first, "trace"):
                raise NothingFitsError(f"a micro-batch of {first} does not fit on every rank")
        for size in (2 * first, first + 1):
            safe = size <= self._ceiling and highest_peak(size, self._peaks, self.bench.fixed) <= self.bench.budget
            if not self.ranks.any(_WHERE, not safe):
                self.fits(size, "trace")
                break
        self.look()
        third = min(self.ranks.gather(_WHERE, self.limit)) // THIRD_TRACE | 1
        if 2 * first < third <= self._ceiling and self.fits(third, "trace"):
            self.look()

    def look(self) -> None:
        """All ranks have a forecast, or none."""
        found = self.bench.forecast()
        self.forecast = None if self.ranks.any(_WHERE, found is None) else found

    def fits(self, size: int, kind: str = "verify") -> bool:
        """Whether a step of `size` samples here, and whatever the others run meanwhile, fits on all ranks."""
        trial = self.bench.run(size, kind)
        fits = trial.fits or self.bench.elsewhere
        if not fits:
            self._most = min(self._most, size - 1)
        elif trial.peak_bytes is not None:
            self._peaks[size] = trial.reserved_bytes or trial.peak_bytes
        return not self.ranks.any(_WHERE, not fits)

    def once(self) -> "_Together":
        """Of steps whose gradients are summed once a window."""
        return _Together(self.bench.alike(late=True), self._ceiling, self._reach)

    def why_not(self, size: int) -> str | None:
        """Why a size cannot be run on all ranks, by forecast and then by running it; None where it can."""
        try:
            self.trace()
        except NothingFitsError:
            return "whole ones do not fit beside even the smallest step"
        if self.ranks.any(_WHERE, self.forecast is None):
            return "what whole ones take could not be forecast"
        if min(self.ranks.gather(_WHERE, self.limit - size)) < 0 or not self.fits(size):
            return "whole ones do not fit beside a micro-batch of this size"
        return None

    def answer(self, size: int) -> Answer:
        """That a size fits on this rank, with what shows that no more than the limit does."""
        limit = self.limit
        proof = "forecast" if self.forecast is not None else None
        if limit >= self._reach:
            proof = "cap"
        elif limit == self._most:
            proof = "out of memory" if self.bench.suffers else "forecast"
        return Answer(size, limit, proof, self.forecast)

    @property
    def limit(self) -> int:
        """The largest size that fits on this rank, by forecast where there is one; 0 where none does."""
        if self.forecast is None:
            return min(max(self._peaks, default=0), self._most)
        return largest(lambda size: self._forecast(size) <= self.bench.room, self._most)

    def _forecast(self, size: int) -> float:
        assert self.forecast is not None
        measured = self._peaks.get(size)
        return measured or self.forecast.reserved(size) * (1.0 + (self.forecast.residual or 0.0))
