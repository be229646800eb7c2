"""The probe of a sharded model, whose ranks meet in every step: they run the same trials at the same time.

All ranks trace the same small sizes, and each forecasts for itself, since shards and budgets differ. One exchange then
makes their limits everybody's, each takes its share of a window by them, and that size is run, on all ranks at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoaccum.errors import NothingFitsError, PlanError, ProbeError
from autoaccum.memory.forecast import Forecast
from autoaccum.planning.bisection import largest
from autoaccum.planning.split import largest_size, shares
from autoaccum.probing.bracket import highest_peak
from autoaccum.probing.find_size import MOST_RUNS, THIRD_TRACE, Answer
from autoaccum.probing.trial import Bench
from autoaccum.ranks import Ranks

__all__ = ["Found", "find_together"]

_WHERE = "the probe"

# Summing once a window has to be sooner by this share, with as many windows timed each way, in turn.
WORTH, ROUNDS = 0.05, 2


@dataclass(frozen=True)
class Found:
    """What the ranks found together.

    Attributes:
        bench, answer: of the way that is taken.
        sync: when gradients are summed over the ranks, and why, as a plan says it; None: a window is one micro-batch.
    """

    bench: Bench
    answer: Answer
    sync: str | None = None


def find_together(
    bench: Bench, ranks: Ranks, floor: int, ceiling: int, reach: int, window: int | None, runs: bool = True
) -> Found:
    """The micro-batch that this rank takes of a window; all ranks call this.

    Args:
        bench: runs trials, in which the ranks meet.
        ranks: all of them.
        floor, ceiling: the smallest and the largest size that may be run, alike on all ranks.
        reach: how far the limit is looked for by forecast.
        window: samples of a window over all ranks; None: each takes the most that fits on it.
        runs: False: the answer is forecast only.

    Raises:
        NothingFitsError: the floor does not fit on some rank; on all of them.
        ProbeError: memory is so erratic that no size can be relied on.
    """
    search = _Together(bench, ranks, floor, ceiling, reach)
    search.trace()
    for _ in range(MOST_RUNS):
        limits = ranks.gather(_WHERE, search.limit)
        if min(limits) < floor:
            rank = limits.index(min(limits))
            raise NothingFitsError(f"a micro-batch of {floor} does not fit on rank {rank}")
        sizes, passes = (limits, 1) if window is None else _shared(window, limits, floor)
        size = min(max(sizes[ranks.rank], floor), ceiling)
        if not runs or search.fits(size):
            found = Found(bench, Answer(size, search.limit, search.proof(), search.forecast))
            return _summed_late(found, ranks, floor, ceiling, reach) if runs and passes > 1 else found
        search.look()  # by the larger step as well
    raise ProbeError(
        f"{MOST_RUNS} trials gave no size that can be relied on: memory in use changes from step to step; give memory= "
        "a fixed budget, or micro_batch= a size"
    )


def _shared(window: int, limits: Sequence[int], floor: int) -> tuple[Sequence[int], int]:
    """(the largest micro-batch of each rank's share of a window, the most micro-batches on any rank)."""
    try:
        parts = shares(window, limits, minimum=floor)
    except PlanError:  # the plan will say which windows can be shared
        return [min(limit, window) for limit in limits], 1
    sizes = [largest_size(part, limit, minimum=floor) for part, limit in zip(parts, limits)]
    return sizes, max(-(-part // limit) for part, limit in zip(parts, limits))


def _summed_late(found: Found, ranks: Ranks, floor: int, ceiling: int, reach: int) -> Found:
    """What was found, or gradients summed once a window where they fit whole and it is faster; all ranks call this.

    It saves a reduction for each micro-batch but the last, and takes the memory of whole gradients.
    """
    size = found.answer.micro_batch
    search = _Together(found.bench.alike(late=True), ranks, floor, ceiling, reach)
    each = "micro-batch: gradients are summed over the ranks in each, and stay sharded; "
    try:
        search.trace()
        why = _does_not_fit(search, ranks, size)
    except NothingFitsError:
        why = "whole ones do not fit beside even the smallest step"
    if why is not None:
        return replace(found, sync=f"{each}{why}")
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for bench in (found.bench, search.bench):
            times[bench.late].append(sum(bench.time(size, 2)))
    often, once = (1e3 * seconds / ranks.size for seconds in ranks.tally(_WHERE, [min(times[False]), min(times[True])]))
    said = f"two micro-batches took {once:.3g} ms with one sum, and {often:.3g} ms with two"
    if once > (1.0 - WORTH) * often:
        return replace(found, sync=f"{each}{said}")
    answer = Answer(size, search.limit, search.proof(), search.forecast)
    return Found(search.bench, answer, f"window: gradients wait whole for one sum over the ranks; {said}")


def _does_not_fit(search: "_Together", ranks: Ranks, size: int) -> str | None:
    """Why a size cannot be run on all ranks, by forecast and then by running it; None where it can."""
    if ranks.any(_WHERE, search.forecast is None):
        return "what whole ones take could not be forecast"
    least = min(ranks.gather(_WHERE, search.limit - size))
    if least < 0 or not search.fits(size):
        return "whole ones do not fit beside a micro-batch of this size"
    return None


class _Together:
    """What this rank knows of its own memory."""

    def __init__(self, bench: Bench, ranks: Ranks, floor: int, ceiling: int, reach: int) -> None:
        self.bench, self._ranks, self._floor, self._ceiling, self._reach = bench, ranks, floor, ceiling, reach
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
            if not self._ranks.any(_WHERE, not safe):
                self.fits(size, "trace")
                break
        self.look()
        third = min(self._ranks.gather(_WHERE, self.limit)) // THIRD_TRACE | 1
        if 2 * first < third <= self._ceiling and self.fits(third, "trace"):
            self.look()

    def look(self) -> None:
        """All ranks have a forecast, or none."""
        found = self.bench.forecast()
        self.forecast = None if self._ranks.any(_WHERE, found is None) else found

    def fits(self, size: int, kind: str = "verify") -> bool:
        """Whether a step of `size` samples here, and whatever the others run meanwhile, fits on all ranks."""
        trial = self.bench.run(size, kind)
        fits = trial.fits or self.bench.elsewhere
        if not fits:
            self._most = min(self._most, size - 1)
        elif trial.peak_bytes is not None:
            self._peaks[size] = trial.reserved_bytes or trial.peak_bytes
        return not self._ranks.any(_WHERE, not fits)

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

    def proof(self) -> str | None:
        """What shows that no more than the limit fits."""
        limit = self.limit
        if limit >= self._reach:
            return "cap"
        if limit == self._most:
            return "out of memory" if self.bench.suffers else "forecast"
        return "forecast" if self.forecast is not None else None
