"""The samples that trials are made of: real ones, looked at once, the largest first.

Choices made here:

- A trial must not be smaller than what training will meet. So 16 samples are looked at, and 64 where those differ in
  size; the largest come first, so that every trial holds the largest one, and padded batches of different numbers of
  samples have the same length.
- What was read is kept for the next trial, up to a bound: a probe asks for a few small sizes and one large one.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from torch import Tensor

from autoaccum.data import tree
from autoaccum.data.structure import leaves
from autoaccum.errors import DataError
from autoaccum.units import MIB, format_bytes

__all__ = ["KEPT_BYTES", "LOOKED_AT", "Pool", "largest_first", "looked_at", "spread"]

LOOKED_AT = 64
_FIRST_LOOK = 16
KEPT_BYTES = 256 * MIB


def looked_at(source: Any, size: int) -> Any:
    """A batch that a check of `size` samples chooses from: more, where their labels may count unequally, if small."""
    few = source.trial(size)
    room = min(LOOKED_AT, KEPT_BYTES * size // max(1, tree.nbytes(few)), source.length or LOOKED_AT)
    return source.trial(room) if room > size else few


class Pool:
    """Samples for trials, looked at where no generator changes; `samples_from` gives those from a number on."""

    def __init__(self, samples_from: Callable[[int], Iterator[Any]]) -> None:
        self._samples_from = samples_from
        self._kept: list[Any] = []
        self._reader: Iterator[Any] | None = None

    def choose(self, size: int) -> tuple[list[Any], str | None]:
        """`size` samples, the largest first, distinct as far as there are so many; and a line on how their sizes vary.

        Raises:
            DataError: there are none.
        """
        samples, _ = self._looked_at(size)
        if not samples:
            raise DataError("the data is empty: it gave no samples, and training needs at least one")
        ordered, varies = largest_first(samples, list(map(_weight, samples)), "samples")
        return [tree.copied(ordered[number % len(ordered)]) for number in range(size)], varies

    def look(self) -> list[Any]:
        """The samples looked at, where they differ in size; else none."""
        samples, differ = self._looked_at(1)
        return samples if differ else []

    def close(self) -> None:
        """Lets everything go that was kept."""
        self._kept, self._reader = [], None

    def _looked_at(self, size: int) -> tuple[list[Any], bool]:
        """Samples, more of them where they differ in size; and whether they do."""
        samples, differ = self._kept, True
        for count in (max(size, _FIRST_LOOK), max(size, LOOKED_AT)):
            if differ and len(self._kept) < count:
                if self._reader is None:
                    self._reader = self._samples_from(len(self._kept))
                self._kept += islice(self._reader, count - len(self._kept))
            if differ:
                samples = self._kept[:count]
                differ = len(set(map(_weight, samples))) > 1
        if sum(map(_weight, self._kept)) > KEPT_BYTES:
            self.close()  # what is let go is read again when it is asked for
        return samples, differ


def largest_first(items: Sequence[Any], sizes: Sequence[int], what: str) -> tuple[Sequence[Any], str | None]:
    """The items, by falling bytes a sample where these `sizes` differ, and a line on that."""
    if min(sizes) == max(sizes):
        return items, None
    line = (
        f"samples differ in size: of {len(items)} {what} looked at, the smallest has {format_bytes(min(sizes))} a "
        f"sample, the largest {format_bytes(max(sizes))}; trials take the largest, and worst_case= can name another"
    )
    return [items[place] for place in sorted(range(len(items)), key=lambda place: -sizes[place])], line


def _weight(sample: Any) -> int:
    """How large a sample is, in bytes or as near as can be told: only a comparison is wanted."""
    return sum(_leaf_weight(leaf) for _, leaf in leaves(sample))


def _leaf_weight(leaf: Any) -> int:
    if isinstance(leaf, Tensor):
        return tree.nbytes(leaf)
    if isinstance(leaf, (str, bytes)):
        return len(leaf)
    size = getattr(leaf, "nbytes", None) or getattr(leaf, "size", None)  # an array; an image's width and height
    if isinstance(size, tuple) and len(size) == 2:
        return int(size[0]) * int(size[1])
    return size if isinstance(size, int) else 8


def spread(count: int, start: int = 0) -> Iterator[int]:
    """The numbers below `count` from the `start`-th on: some from all over first, since datasets come sorted."""
    if count <= LOOKED_AT:
        return iter(range(start, count))
    places = [number * count // LOOKED_AT for number in range(LOOKED_AT)]
    first = [place for offset in (0, 2, 1, 3) for place in places[offset::4]]
    known = set(places)
    return islice(chain(first, (number for number in range(count) if number not in known)), start, None)
