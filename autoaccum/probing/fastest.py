"""prefer="fastest": which micro-batch, under which memory saver, makes a window soonest.

Sizes of the step as it is are timed in turn: a micro-batch, and apart from it the window's end, which every micro-batch
shares. Two sizes show what a micro-batch costs whatever its samples, and so the most that fewer of them can save. Only
where that is worth it are the other savers' peaks forecast, from two small traces each, and the pairs of saver and size
that make fewer micro-batches than all cheaper ones timed too. Timing takes about two windows each time, or a quarter of
a second where these are short.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from autoaccum.errors import StateNotRestoredError
from autoaccum.memory.forecast import Forecast
from autoaccum.model.memory_savers import BY_NAME, CHANGES, RUNGS
from autoaccum.planning.bisection import largest
from autoaccum.planning.split import can_split, largest_size
from autoaccum.probing.climb import NOT_BORNE, cannot_run
from autoaccum.probing.find_size import Answer
from autoaccum.probing.trial import Bench
from autoaccum.window.assembly import Assembly

__all__ = ["Alternatives", "Pair", "Raced", "chosen", "pairs", "race"]

MOST_WINDOWS, LEAST_SECONDS = 2.0, 0.25
NOISE = 0.02  # relative: within it the first of the pairs is as good
WORTH_IT = 0.04  # of a window: below it no saver that computes anything twice can gain by fewer micro-batches
HOPELESS = 1.3  # times the best trial's time: a saver that takes more is not timed
CLOSE = 0.15  # relative: after each round only pairs so near the best are timed again
MOST_ROUNDS = 7


@dataclass(frozen=True)
class Alternatives:
    """The savers that may be taken.

    Attributes:
        savers: cheapest first, each with the plain step's result.
        under: what the model runs under one inside.
    """

    savers: tuple[str, ...] = ()
    under: Callable[[str | None], AbstractContextManager[Any]] = lambda saver: nullcontext()

    @classmethod
    def of(cls, parts: Assembly) -> "Alternatives":
        """Those that a training can run under, but for what is only taken where it is named."""
        exact = (rung for rung in RUNGS if rung not in CHANGES | BY_NAME)
        savers = tuple(rung for rung in exact if parts.obstacle(rung) is None)
        return cls(savers, parts.under)


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


@dataclass(frozen=True)
class Raced:
    """What was found.

    Attributes:
        bench, answer: of the saver that is taken.
        pair: what is taken.
        throughput: (size, samples per second) under that saver.
        table: a row for each saver: its name, what fits at most, the size looked at with its forecast peak and the time
            of a window, (size, samples per second) of all that was timed, whether the result is the plain step's.
    """

    bench: Bench
    answer: Answer
    pair: Pair
    throughput: tuple[tuple[int, float], ...]
    table: tuple[dict[str, Any], ...]


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
        size = _size(share, limit, floor, multiple_of)
        count = -(-share // size) if size else 0
        if count and (saver in (None, "chunked_loss") or all(count < pair.count for pair in made)):
            made.append(Pair(saver, size, count))
    for first in [pair for pair in made if pair.saver in (None, "chunked_loss")]:
        sizes = [_size(share, -(-share // (first.count * times)), floor, multiple_of) for times in (2, 4, 8)]
        for size in sorted({size for size in sizes if max(floor, 2) <= size < first.size}, reverse=True):
            made.append(Pair(first.saver, size, -(-share // size)))
    return made


def _size(share: int, limit: int, floor: int, multiple_of: int) -> int:
    """The micro-batch where so many fit; 0 where the window cannot be cut so."""
    if limit < floor or not can_split(share, limit, floor):
        return min(limit, share) if limit >= floor else 0
    return largest_size(share, limit, minimum=floor, multiple_of=multiple_of)


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
    best = chosen(made)
    others = [pair for pair in made if pair.saver == best.saver and pair.seconds and pair.count > best.count]
    if not others:
        return 0.0 if best.count == 1 else None
    next_one = min(others, key=lambda pair: pair.count)
    each = (next_one.window - best.window) / (next_one.count - best.count)
    return each * (best.count - 1) / best.window


def race(
    bench: Bench, answer: Answer, alternatives: Alternatives, *, share: int | None, floor: int, reach: int,
    multiple_of: int,
) -> Raced:  # fmt: skip
    """Times the pairs that are worth it, and takes the soonest.

    Args:
        bench: on which the step as it is was probed.
        answer: what that found.
        alternatives: savers that may be taken.
        share: samples of a window; None: as many as fit as it is.
        floor, reach: the smallest micro-batch, and how far a limit is looked for.
        multiple_of: preferred multiples.
    """
    share = share or answer.micro_batch
    found = _Found(bench, answer, alternatives, share, floor, reach)
    made: list[Pair] = []
    computing, repeating = _apart(alternatives.savers)
    for savers in (computing, repeating):
        gain = to_gain(made) if made else None
        if savers is repeating and (share <= answer.micro_batch or (gain is not None and gain < WORTH_IT)):
            break
        found.add(savers)
        known = {(pair.saver, pair.size) for pair in made}
        wanted = pairs(share, found.limits(), floor=floor, multiple_of=multiple_of)
        made += [pair for pair in wanted if (pair.saver, pair.size) not in known]
        _time(made, found, alternatives)
        bench.device.expect(bench.allowed, None)  # whatever runs next is measured, with nothing kept
    best = chosen(made)
    answer = found.answers[best.saver]
    table = tuple(_row(saver, found.answers[saver], limit, [pair for pair in made if pair.saver == saver], share)
                  for saver, limit in found.limits())  # fmt: skip
    rates = next(tuple(map(tuple, row["throughput"])) for row in table if row["saver"] == best.saver)
    taken = Answer(best.size, answer.limit, answer.proof, answer.forecast)
    return Raced(found.benches[best.saver], taken, best, rates, (*table, *found.left_out))


def _apart(savers: Sequence[str]) -> tuple[list[str], list[str]]:
    """Savers that compute nothing twice, which may gain at any size; and those that do."""
    return [each for each in savers if each == "chunked_loss"], [each for each in savers if each != "chunked_loss"]


class _Found:
    """What fits under each saver looked at so far."""

    def __init__(
        self, bench: Bench, answer: Answer, alternatives: Alternatives, share: int, floor: int, reach: int
    ) -> None:  # fmt: skip
        self.benches: dict[str | None, Bench] = {None: bench}
        self.answers: dict[str | None, Answer] = {None: answer}
        self.left_out: list[dict[str, Any]] = []
        self._alternatives, self._share, self._floor, self._reach = alternatives, share, floor, reach

    def add(self, savers: Sequence[str]) -> None:
        """Looks at more of them."""
        for saver in savers:
            with self._alternatives.under(saver):
                shown = _forecast(self.benches, saver, self.answers[None], self._floor, self._reach)
            if isinstance(shown, Answer):
                self.answers[saver] = shown
            else:
                self.left_out.append({"saver": saver, "limit": None, "obstacle": shown, "same_result": True})

    def limits(self) -> list[tuple[str | None, int]]:
        """(saver, the most samples of a window that fit), the step as it is first."""
        plain, *rest = self.answers.items()
        return [(None, plain[1].micro_batch)] + [
            (saver, min(found.limit or found.micro_batch, self._share)) for saver, found in rest
        ]


def _row(saver: str | None, found: Answer, limit: int, made: Sequence[Pair], share: int) -> dict[str, Any]:
    size = made[0].size if made else limit
    timed = [pair for pair in made if pair.seconds]
    return {
        "saver": saver,
        "limit": found.limit or found.micro_batch,
        "micro_batch": size,
        "peak_bytes": None if found.forecast is None else int(found.forecast.reserved(size)),
        "window_seconds": made[0].window if made and made[0].seconds else None,
        "throughput": [[pair.size, share / pair.window] for pair in timed],  # lists, as JSON has them
        "same_result": True,
    }


def _forecast(
    benches: dict[str | None, Bench], saver: str, plain: Answer, floor: int, reach: int
) -> Answer | str:  # fmt: skip
    """What fits under a saver by two small traces; why that cannot be told."""
    bench = benches[saver] = benches[None].alike()
    first = max(2, floor, plain.micro_batch // 32)
    sizes = [size for size in (first, 2 * first) if size <= reach]
    if len(sizes) < 2:
        return "there are too few samples for two traces"
    try:
        fits = all(bench.run(size, "trace").fits for size in sizes)
    except StateNotRestoredError:
        raise
    except NOT_BORNE as error:
        why = cannot_run(error)
    else:
        forecast = bench.forecast() if fits else None
        why = "its traces do not line up" if fits else f"{first} to {2 * first} samples do not fit"
        if forecast is not None:
            return _reaching(bench, forecast, sizes[-1], reach)
    bench.recover()  # outside the except block, where nothing holds what the failed step held
    return why


def _reaching(bench: Bench, forecast: Forecast, low: int, reach: int) -> Answer:
    """The largest size up to `reach` whose peak is forecast to fit, where `low` does."""
    low = largest(lambda size: forecast.reserved(size) <= bench.room, reach, low)
    return Answer(low, low, "forecast" if low < reach else "cap", forecast)


def _time(made: list[Pair], found: _Found, alternatives: Alternatives) -> None:
    """Runs each saver's largest size once, as a trial; then times what is left in turn, for as long as is allowed."""
    rough: dict[str | None, float] = {}
    spent = 0.0
    for pair in _largest(made):
        bench = found.benches[pair.saver]
        trial = next((t for t in reversed(bench.trials) if t.batch == pair.size and t.fits and t.seconds), None)
        if trial is None:
            with alternatives.under(pair.saver):
                trial = bench.run(pair.size, "verify")
            spent += trial.seconds
        if trial.fits:
            rough[pair.saver] = pair.count * trial.seconds
    window = min(rough.values(), default=0.0)
    running = [pair for pair in made if pair.saver is None or rough.get(pair.saver, math.inf) <= window * HOPELESS]
    for turn in range(MOST_ROUNDS):
        timed = [pair.window for pair in running if pair.seconds]
        window = min(timed, default=window)
        running = [pair for pair in running if not pair.seconds or pair.window <= window * (1 + CLOSE)]
        for pair in running:
            if (turn or timed) and spent + window / pair.count > max(LEAST_SECONDS, MOST_WINDOWS * window):
                return
            forecast = found.answers[pair.saver].forecast
            with alternatives.under(pair.saver):
                peak = None if forecast is None else forecast.reserved(pair.size)
                began = time.perf_counter()
                micro, end = found.benches[pair.saver].time(pair.size, peak=peak)
                spent += time.perf_counter() - began
            pair.seconds.append(pair.count * micro + end)
            timed.append(pair.window)


def _largest(made: Sequence[Pair]) -> list[Pair]:
    """The first pair of each saver."""
    return [pair for number, pair in enumerate(made) if all(pair.saver != other.saver for other in made[:number])]
