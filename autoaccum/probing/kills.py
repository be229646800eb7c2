"""Pure: how far to look where a size has killed its process, twice.

No forecast tells where a kill lies: it need not be for memory at all. Between the largest size that lived and the least
that killed, the next one is in the middle, by ratio while they are far apart; what killed, and all above it, is never
run again.
"""

from collections.abc import Callable
from math import isqrt

__all__ = ["ceiling_below", "near_enough"]

CLOSE_ENOUGH = 1.04  # a kill costs a process: a size that lives is not improved on by less than this


def near_enough(lived: int, killed: int, wanted: Callable[[int], int]) -> bool:
    """Whether nothing that is worth a kill lies between.

    Args:
        lived: the largest size that is known to fit; 0 where none is.
        killed: the least that does not.
        wanted: the micro-batch that is taken where so many samples fit.
    """
    return wanted(killed - 1) <= lived or killed - 1 <= CLOSE_ENOUGH * lived


def ceiling_below(lived: int, killed: int, wanted: Callable[[int], int]) -> int:
    """The size to run next: one that is wanted, between one that lived and one that killed, where they are not near."""
    low = max(lived, 1)
    size = isqrt(low * killed) if killed > 2 * low else (low + killed) // 2
    while wanted(size) <= lived and size < killed - 1:
        size += 1
    return wanted(min(size, killed - 1))
