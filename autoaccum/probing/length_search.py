"""Pure: where samples differ in length, how many fit at once at every length.

Six small steps, two batch sizes at three lengths, give the peak at any shape (DESIGN: what an operator allocates is a
sum of 1, B, L, BL, L², BL²). From that follows a table of what fits at which padded length; its two corners that most
windows meet, the longest samples looked at and those of middling length, are run. A surprise there makes the whole
forecast larger by as much. Where surprises do not end, the largest shape that did fit is the measure of all others.

Everything real is behind the bench, as in find_size.py. Where the traces do not line up there is no table, and the
search goes on with the largest samples, whatever the others are.
"""

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from autoaccum.errors import NothingFitsError
from autoaccum.planning.length_rule import Room, limit_at, room_of
from autoaccum.probing.find_size import SAME_PEAK, Answer
from autoaccum.units import MIB

if TYPE_CHECKING:
    from autoaccum.memory.forecast import Forecast
    from autoaccum.probing.cache import Forecaster
    from autoaccum.probing.trial import Bench

__all__ = ["LengthSearch", "three_lengths"]

MOST_ROUNDS = 8
# Where an overrun is suffered and not only counted, this part of the size wanted is run first: what the small traces
# could not show, such as the process's own growth, is then known before it can do harm.
STEPPING_STONE = 4
# A caching allocator that serves many shapes in turn keeps blocks that fit none of the next: room for them.
MIXED_SHAPES = 1.05
# On the CPU the libraries under PyTorch keep kernels for each shape they have met (oneDNN up to 1024): half a GiB was
# measured after 150 windows. Under a limit of the process's own that is kept free, as far as half of the limit.
KEPT_KERNELS = 512 * MIB
OVERRUN = 1.3  # how much more is expected after a step ran out of memory, which shows no figure


def three_lengths(lengths: Sequence[int]) -> tuple[int, int, int]:
    """A quarter, a half and the whole of the longest of three or more rising `lengths`, or what is nearest to these."""
    longest = lengths[-1]
    shortest = max(longest // 4, lengths[0])
    low = min(lengths[:-2], key=lambda length: abs(length - shortest))
    middle = min(lengths[lengths.index(low) + 1 : -1], key=lambda length: abs(2 * length - low - longest))
    return low, middle, longest


class LengthSearch:
    """Traces, reads the table off the forecast, runs what it says, and corrects it by what that shows."""

    def __init__(self, bench: "Bench", lengths: Sequence[int], most: int) -> None:
        """Nothing runs yet.

        Args:
            bench: runs the steps.
            lengths: three or more, of the samples looked at, rising.
            most: how many samples at once are wanted at most.
        """
        self._bench, self._floor, self._most = bench, bench.floor, most
        self._lengths = three_lengths(lengths)
        self._longest, self._usual = lengths[-1], lengths[len(lengths) // 2]
        self._first = max(self._floor, min(2, most // 2))
        self._factor = self._mixed = 1.0  # of what the budget counts to what the forecast says; of what shapes leave
        self._reserve = 0
        self._residual = 0.0
        self._fits = set[tuple[int, int]]()

    def run(self, known: "Forecaster | None" = None) -> Answer | None:
        """How many samples fit at once at every length; None where the small steps gave no forecast that holds.

        `known` is a forecast from an earlier run of the same training: it spares the small steps but one where it still
        holds. A NothingFitsError where the floor does not fit at the longest length.
        """
        small = self._first, self._lengths[0]
        if known is not None:
            measured = self._trace(*small)
            if measured and abs(known.peak(*small) / measured - 1.0) <= SAME_PEAK:
                return self._checked(known)
        forecast = self._traced()
        return None if forecast is None else self._checked(forecast)

    def _traced(self) -> "Forecast | None":
        """The forecast of two batch sizes at each length; None where they did not run, or do not line up."""
        for start in dict.fromkeys((self._first, self._floor)):
            if all(self._trace(size, length) for size, length in product((start, 2 * start), self._lengths)):
                return self._bench.forecast(over_lengths=True)
        return None

    def _trace(self, size: int, length: int) -> int:
        """The peak of a small step in bytes; 0 where it did not come to its end."""
        trial = self._bench.run(size, "trace", length)
        if trial.fits:
            self._fits.add((size, length))
        return trial.peak_bytes or 0

    def _checked(self, forecast: "Forecaster") -> Answer:
        self._forecast = forecast
        self._begin()
        for _ in range(MOST_ROUNDS):
            room = self._room(self._believed())
            wanted = [(limit_at(room, length), length) for length in (self._longest, self._usual)]
            if wanted[0][0] < self._floor:
                break
            missing = [shape for shape in wanted if not self._ran(*shape)]
            if not missing:
                return self._answer(room)
            for shape in missing:
                if not self._try(*shape):
                    break
        # By the largest forecast among the shapes that fitted: the budget itself goes up and down.
        room = self._room(max((forecast.peak(*shape) for shape in self._fits), default=0))
        if limit_at(room, self._longest) < self._floor:
            raise NothingFitsError(
                f"a micro-batch of {self._floor} of the longest samples looked at, of length {self._longest}, does not "
                "fit"
            )
        return self._answer(room)

    def _answer(self, room: Room) -> Answer:
        size = limit_at(room, self._longest)
        self._forecast.longest, self._forecast.residual = self._longest, self._residual
        return Answer(size, size, "cap" if size == self._most else "forecast", self._forecast, room)

    def _ran(self, size: int, length: int) -> bool:
        """Whether as many samples as long, or more, were run."""
        return any(size <= ran and length <= as_long for ran, as_long in self._fits)

    def _begin(self) -> None:
        """A stepping stone; and where an allocator reserves, what it makes of the requests where it matters most."""
        may = self._bench.allowance
        if may.suffers and not may.caches:
            self._reserve = min(KEPT_KERNELS, may.bytes // 2)
        size = self._limit()
        stone = size // STEPPING_STONE
        if may.suffers and stone > self._floor:
            self._try(stone, self._longest)
            size = self._limit()
        if size < self._floor:
            return
        requested, counted = (ask(size, self._longest) for ask in (self._forecast.peak, self._forecast.reserved))
        if counted > requested:
            self._mixed = MIXED_SHAPES
            self._factor = max(self._factor, self._mixed * counted / requested)

    def _limit(self) -> int:
        return limit_at(self._room(self._believed()), self._longest)

    def _believed(self) -> float:
        """Bytes that a shape's forecast may come to."""
        return max(self._bench.allowance.bytes - self._reserve, 0) / self._factor

    def _room(self, most: float) -> Room:
        return room_of(lambda size, length: self._forecast.peak(size, length) <= most, self._most, self._longest)

    def _try(self, size: int, length: int) -> bool:
        """Runs one shape; the forecast is made larger where that shows more than it said."""
        trial = self._bench.run(size, "verify", length)
        measured = trial.counted_bytes
        if measured is None:
            self._factor *= OVERRUN
            return False
        expected = self._forecast.peak(size, length)
        if trial.peak_bytes is not None:
            self._residual = max(self._residual, abs(expected / trial.peak_bytes - 1.0))
        larger = max(self._factor, self._mixed * measured / expected)
        if trial.fits:
            self._fits.add((size, length))
        elif larger == self._factor:  # over the budget for another reason, such as a retry
            larger *= OVERRUN
        self._factor = larger
        return trial.fits
