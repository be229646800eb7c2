"""The probe of a sharded model, whose ranks meet in every step: they run the same trials at the same time.

All ranks trace the same small sizes, and each forecasts for itself, since shards and budgets differ. One exchange then
makes their limits everybody's, each takes its share of a window by them, and that size is run, on all ranks at once.
"""

from collections.abc import Sequence
from dataclasses import replace

from autoaccum.errors import NothingFitsError, PlanError, ProbeError
from autoaccum.planning.split import shares, usable_size
from autoaccum.probing.answered import report_of
from autoaccum.probing.find_size import ERRATIC, MOST_RUNS, Answer, Search
from autoaccum.probing.report import ProbeReport
from autoaccum.probing.trial import Bench
from autoaccum.ranks import Ranks

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
    assert bench.ranks is not None
    ranks, floor = bench.ranks, bench.floor

    def searching(bench: Bench) -> Search:
        return Search(bench, ceiling, wanted=lambda limit: limit, reach=reach)

    search = searching(bench)
    search.trace()
    for _ in range(MOST_RUNS):
        limits = ranks.gather(_WHERE, search.limit)
        if min(limits) < floor:
            rank = limits.index(min(limits))
            raise NothingFitsError(f"a micro-batch of {floor} does not fit on rank {rank}")
        sizes, passes = (limits, 1) if window is None else _shared(window, limits, floor)
        size = min(max(sizes[ranks.rank], floor), ceiling)
        if not runs or search.fits(size):
            if not runs or passes == 1:
                return report_of(bench, _answer(search, size))
            return _summed_late(search, searching(bench.alike(late=True)), ranks, size)
    raise ProbeError(ERRATIC)


def _answer(search: Search, size: int) -> Answer:
    """That a size fits on this rank, with what shows that no more than the limit does."""
    limit = search.limit
    return Answer(size, limit, search.proof(limit), search.forecast)


def _shared(window: int, limits: Sequence[int], floor: int) -> tuple[Sequence[int], int]:
    """(the largest micro-batch of each rank's share of a window, the most micro-batches on any rank)."""
    try:
        parts = shares(window, limits, minimum=floor)
    except PlanError:  # the plan will say which windows can be shared
        return [min(limit, window) for limit in limits], 1
    sizes = [usable_size(part, limit, minimum=floor) for part, limit in zip(parts, limits)]
    return sizes, max(-(-part // limit) for part, limit in zip(parts, limits))


def _summed_late(often: Search, once: Search, ranks: Ranks, size: int) -> ProbeReport:
    """What was found, or gradients summed once a window where they fit whole and it is faster; all ranks call this.

    It saves a reduction for each micro-batch but the last, and takes the memory of whole gradients. The report says
    when they are summed, and why.
    """
    why = _why_not(once, ranks, size)
    if why is None:
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for bench in (often.bench, once.bench):
                times[bench.late].append(sum(bench.time(size, 2)))
        least = ranks.tally(_WHERE, [min(times[False]), min(times[True])])
        two, one = (1e3 * seconds / ranks.size for seconds in least)
        why = f"two micro-batches took {one:.3g} ms with one sum, and {two:.3g} ms with two"
        if one <= (1.0 - WORTH) * two:
            found = report_of(once.bench, _answer(once, size))
            trials = (*often.bench.trials, *found.trials)
            sync = f"window: gradients wait whole for one sum over the ranks; {why}"
            return replace(found, gradient_sync=sync, trials=trials)
    sync = f"micro-batch: gradients are summed over the ranks in each, and stay sharded; {why}"
    return replace(report_of(often.bench, _answer(often, size)), gradient_sync=sync)


def _why_not(once: Search, ranks: Ranks, size: int) -> str | None:
    """Why a size cannot be run with one sum a window on all ranks, by forecast and then by running it; None: it can."""
    try:
        once.trace()
    except NothingFitsError:
        return "whole ones do not fit beside even the smallest step"
    if once.forecast is None:
        return "what whole ones take could not be forecast"
    if ranks.any(_WHERE, once.limit < size) or not once.fits(size):
        return "whole ones do not fit beside a micro-batch of this size"
    return None
