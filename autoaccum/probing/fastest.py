"""prefer="fastest": which micro-batch, under which memory saver, makes a window soonest.

A saver may let more samples run at once and still be slower. So each one's peaks are forecast from two small traces,
pairs of saver and size that another beats in what they compute and in their number are left out, and the rest are timed
in turn: a micro-batch, and apart from it the window's end, which every micro-batch shares. All of it takes about three
windows, or a quarter of a second where these are short.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from autoaccum.errors import StateNotRestoredError
from autoaccum.memory.forecast import Forecast
from autoaccum.model.memory_savers import CHANGES, RUNGS, installed, obstacle
from autoaccum.planning.bisection import largest
from autoaccum.planning.split import can_split, largest_size
from autoaccum.probing.climb import NOT_BORNE, cannot_run
from autoaccum.probing.find_size import Answer
from autoaccum.probing.trial import Bench

__all__ = ["Alternatives", "Pair", "Raced", "chosen", "pairs", "race"]

MOST_WINDOWS, LEAST_SECONDS = 3.0, 0.25
NOISE = 0.02  # relative: within it the first of the pairs is as good
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
    def of(cls, model: nn.Module, device: torch.device, precision: str) -> "Alternatives":
        """Those that a model can be trained under on a device, in a precision as the user gave it."""
        exact = (rung for rung in RUNGS if rung not in CHANGES)
        savers = tuple(rung for rung in exact if obstacle(rung, model, device, precision) is None)
        return cls(savers, lambda saver: installed(saver, model, device))


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
    best = min(median(pair.seconds) for pair in timed)
    return next(pair for pair in timed if median(pair.seconds) <= best * (1 + NOISE))


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
    benches: dict[str | None, Bench] = {None: bench}
    answers: dict[str | None, Answer] = {None: answer}
    left_out: list[dict[str, Any]] = []
    for saver in alternatives.savers:
        if saver != "chunked_loss" and share <= answer.micro_batch:
            continue  # fewer micro-batches cannot be had
        with alternatives.under(saver):
            shown = _forecast(benches, saver, answer, floor, reach)
        if isinstance(shown, Answer):
            answers[saver] = shown
        else:
            left_out.append({"saver": saver, "limit": None, "obstacle": shown, "same_result": True})
    limits = [(saver, min(found.limit or found.micro_batch, share)) for saver, found in answers.items()]
    limits[0] = (None, answer.micro_batch)
    made = pairs(share, limits, floor=floor, multiple_of=multiple_of)
    _time(made, benches, alternatives)
    best = chosen(made)
    found = answers[best.saver]
    table = tuple(_row(saver, answers[saver], limit, [pair for pair in made if pair.saver == saver], share)
                  for saver, limit in limits)  # fmt: skip
    rates = next(tuple(row["throughput"]) for row in table if row["saver"] == best.saver)
    taken = Answer(best.size, found.limit, found.proof, found.forecast)
    return Raced(benches[best.saver], taken, best, rates, (*table, *left_out))


def _row(saver: str | None, found: Answer, limit: int, made: Sequence[Pair], share: int) -> dict[str, Any]:
    size = made[0].size if made else limit
    timed = [pair for pair in made if pair.seconds]
    return {
        "saver": saver,
        "limit": found.limit or found.micro_batch,
        "micro_batch": size,
        "peak_bytes": None if found.forecast is None else int(found.forecast.reserved(size)),
        "window_seconds": median(made[0].seconds) if made and made[0].seconds else None,
        "throughput": [(pair.size, share / median(pair.seconds)) for pair in timed],
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
    room = bench.budget * (1.0 - bench.spare)
    low = largest(lambda size: forecast.reserved(size) <= room, reach, low)
    return Answer(low, low, "forecast" if low < reach else "cap", forecast)


def _time(made: list[Pair], benches: dict[str | None, Bench], alternatives: Alternatives) -> None:
    """Runs each saver's largest size once, as a trial; then times what is left in turn, for as long as is allowed."""
    rough: dict[int, float] = {}
    spent = 0.0
    for pair in _largest(made):
        bench = benches[pair.saver]
        trial = next((t for t in reversed(bench.trials) if t.batch == pair.size and t.fits and t.seconds), None)
        if trial is None:
            with alternatives.under(pair.saver):
                trial = bench.run(pair.size, "verify")
            spent += trial.seconds
        if trial.fits:
            rough[id(pair)] = pair.count * trial.seconds
    window = min(rough.values(), default=0.0)
    slow = {pair.saver for pair in _largest(made) if rough.get(id(pair), float("inf")) > window * HOPELESS}
    running = [pair for pair in made if pair.saver is None or pair.saver not in slow]
    for turn in range(MOST_ROUNDS):
        for pair in running:
            expected = window / pair.count
            if (turn or pair is not running[0]) and spent + expected > max(LEAST_SECONDS, MOST_WINDOWS * window):
                return
            with alternatives.under(pair.saver):
                micro, end = benches[pair.saver].time(pair.size)
            spent += micro + end
            pair.seconds.append(pair.count * micro + end)
        window = min(min(pair.seconds) for pair in running)
        running = [pair for pair in running if min(pair.seconds) <= window * (1 + CLOSE)]


def _largest(made: Sequence[Pair]) -> list[Pair]:
    """The first pair of each saver."""
    return [pair for number, pair in enumerate(made) if all(pair.saver != other.saver for other in made[:number])]
