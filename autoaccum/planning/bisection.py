"""Pure: the largest number for which something holds, in as few questions as can be."""

from collections.abc import Callable

__all__ = ["largest"]


def largest(fits: Callable[[int], bool], most: int, known: int = 0) -> int:
    """The largest n up to `most` that fits; `known`, which fits and is not asked for, where none above it does.

    Where what fits goes up and down, an n that fits while n + 1 does not. It asks about log2 of the distance times.
    """
    low, high = known, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
