"""Samples and the batch that a collate function made of them, kept together.

A trainer's collator may put two rows into the batch for each sample, or all samples into one row: such a batch cannot
be cut along its rows. A piece is cut along its samples, and what is cut is collated again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Piece"]


@dataclass(init=False, eq=False)
class Piece:
    """A micro-batch that knows the samples in it, as the dataset gave them, beside what the collate function made of
    them.

    As a dataclass of one field it is walked like any batch.
    """

    batch: Any

    def __init__(self, samples: Sequence[Any], collate: Callable[[list[Any]], Any]) -> None:
        """Collates."""
        self.samples, self._collate = list(samples), collate
        self.batch = collate(list(self.samples))

    def take(self, places: Sequence[int]) -> "Piece":
        """The samples at `places`, in that order, collated anew."""
        return Piece([self.samples[place] for place in places], self._collate)

    def joined(self, others: "Sequence[Piece]") -> "Piece":
        """These samples and those of `others`, collated as one batch."""
        return Piece([sample for piece in (self, *others) for sample in piece.samples], self._collate)
