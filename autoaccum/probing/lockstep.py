"""The probe of a sharded model, whose ranks meet in every step: they run the same trials at the same time.

All ranks trace the same small sizes, and each forecasts for itself, since shards and budgets differ. One exchange then
makes their limits everybody's, each takes its share of a window by them, and that size is run, on all ranks at once.
"""

from collections.abc import Sequence

from autoaccum.errors import NothingFitsError, PlanError, ProbeError
from autoaccum.planning.split import even_split, shares
from autoaccum.probing.find_size import MOST_RUNS, THIRD_TRACE, Answer
from autoaccum.probing.trial import Bench, Counted
from autoaccum.ranks import Ranks

__all__ = ["find_together"]

_WHERE = "the probe"


def find_together(bench: Bench, ranks: Ranks, floor: int, ceiling: int, reach: int, window: int | None) -> Answer:
    """The micro-batch that this rank takes of a window; all ranks call this.

    Args:
        bench: runs trials, in which the ranks meet.
        ranks: all of them.
        floor, ceiling: the smallest and the largest size that may be run, alike on all ranks.
        reach: how far the limit is looked for by forecast.
        window: samples of a window over all ranks; None: each takes the most that fits on it.

    Raises:
        NothingFitsError: the floor does not fit on some rank; on all of them.
        ProbeError: memory is so erratic that no size can be relied on.
    """
    search = _Together(bench, ranks, floor, ceiling, reach)
    search.trace()
    for _ in range(MOST_RUNS):
        limits = ranks.gather(_WHERE, search.limit)
        if min(limits) < floor:
            raise NothingFitsError(_too_little(limits, floor))
        size = min(max(_share(limits, window, floor, ranks.rank), floor), ceiling)
        if search.fits(size):
            return Answer(size, search.limit, search.proof(), search.forecast)
        search.look()  # by the larger step as well
    raise ProbeError(
        f"{MOST_RUNS} trials gave no size that can be relied on: memory in use changes from step to step; give memory= "
        "a fixed budget, or micro_batch= a size"
    )


def _share(limits: Sequence[int], window: int | None, floor: int, rank: int) -> int:
    """The largest micro-batch of one rank's share of a window."""
    if window is None:
        return limits[rank]
    try:
        share = shares(window, limits, minimum=floor)[rank]
        return max(even_split(share, limits[rank], minimum=floor), default=0)
    except PlanError:  # the plan will say which windows can be shared
        return min(limits[rank], window)


def _too_little(limits: Sequence[int], floor: int) -> str:
    rank = min(range(len(limits)), key=lambda each: limits[each])
    return f"a micro-batch of {floor} does not fit on rank {rank}"


class _Together:
    """What this rank knows of its own memory."""

    def __init__(self, bench: Bench, ranks: Ranks, floor: int, ceiling: int, reach: int) -> None:
        self._bench, self._ranks, self._floor, self._ceiling, self._reach = bench, ranks, floor, ceiling, reach
        self._most = reach  # a larger one was run, and does not fit
        self._peaks: dict[int, int] = {}
        self.forecast: Counted | None = None

    def trace(self) -> None:
        """Two or three small steps, of the same sizes on all ranks."""
        first = min(max(2, self._floor), self._ceiling)
        if not self.fits(first, "trace"):
            first = self._floor
            if not self.fits(first, "trace"):
                raise NothingFitsError(f"a micro-batch of {first} does not fit on every rank")
        for size in (2 * first, first + 1):
            safe = size <= self._ceiling and self._bound(size) <= self._bench.budget
            if not self._ranks.any(_WHERE, not safe):
                self.fits(size, "trace")
                break
        self.look()
        third = min(self._ranks.gather(_WHERE, self.limit)) // THIRD_TRACE | 1
        if 2 * first < third <= self._ceiling and self.fits(third, "trace"):
            self.look()

    def look(self) -> None:
        """All ranks have a forecast, or none."""
        found = self._bench.forecast()
        self.forecast = None if self._ranks.any(_WHERE, found is None) else found

    def fits(self, size: int, kind: str = "verify") -> bool:
        """Whether a step of `size` samples here, and whatever the others run meanwhile, fits on all ranks."""
        trial = self._bench.run(size, kind)
        fits = trial.fits or self._bench.elsewhere
        if not fits:
            self._most = min(self._most, size - 1)
        elif trial.peak_bytes is not None:
            self._peaks[size] = trial.reserved_bytes or trial.peak_bytes
        return not self._ranks.any(_WHERE, not fits)

    def _bound(self, size: int) -> int:
        """An upper bound on the peak: what is not there whatever the size grows at most in proportion to it."""
        largest = max(self._peaks)
        fixed = min(self._bench.fixed, self._peaks[largest])
        return fixed + -(-(self._peaks[largest] - fixed) * size // largest)

    @property
    def limit(self) -> int:
        """The largest size that fits on this rank, by forecast where there is one; 0 where none does."""
        if self.forecast is None:
            return min(max(self._peaks, default=0), self._most)
        low, high = 0, self._most + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._forecast(middle) <= self._bench.budget * (1.0 - self._bench.spare)
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _forecast(self, size: int) -> float:
        assert self.forecast is not None
        measured = self._peaks.get(size)
        return measured or self.forecast.reserved(size) * (1.0 + (self.forecast.residual or 0.0))

    def proof(self) -> str | None:
        """What shows that no more than the limit fits."""
        limit = self.limit
        if limit >= self._reach:
            return "cap"
        if limit == self._most:
            return "out of memory" if self._bench.suffers else "forecast"
        return "forecast" if self.forecast is not None else None
