"""A trainer's loader made to yield the samples of a window, not collated: what stands in for its parts."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, IterableDataset

from autoaccum.data.base import Source
from autoaccum.data.mapped import MapSource
from autoaccum.data.piece import Piece
from autoaccum.data.stream import SampleSource
from autoaccum.errors import SetupError
from autoaccum.integrations.attachment import Attachment
from autoaccum.ranks import Ranks, here

__all__ = ["Held", "Pieces", "Samples", "Shares", "refuse_dealt_streams", "source_of"]


class Samples:
    """A window as the loader yields it. Afterwards, for the trainer's counters, it answers as a batch would."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples
        self.pieces: list[Piece] | None = None

    def __contains__(self, name: object) -> bool:
        if self.pieces is None:
            return False  # nothing is counted beforehand: what the loss divides by is ours to know
        return all(name in piece.batch for piece in self.pieces)

    def __getitem__(self, name: str) -> Tensor:
        assert self.pieces is not None
        flat = [piece.batch[name].flatten() for piece in self.pieces]
        return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.int64)


class Held:
    """A collate function that is held back."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Samples:
        """The samples as they are."""
        return Samples(samples)


class Pieces:
    """Makes a Piece of samples, with a loader's collate function that holds back its own."""

    def __init__(self, collate: Any) -> None:
        self._outer = collate
        while not isinstance(collate, Held):  # what removes columns stands around it
            collate = collate.data_collator
        self._inner = collate.collate

    def __call__(self, samples: list[Any]) -> Piece:
        """The samples and their batch."""
        return Piece(self._outer(samples).samples, self._inner)


class Shares(BatchSampler):
    """This rank's part of each batch, as the plan shares a window."""

    def __init__(self, batches: Any, attachment: Attachment) -> None:
        self._batches, self._attachment = batches, attachment
        self.sampler, self.batch_size, self.drop_last = batches.sampler, batches.batch_size, batches.drop_last

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            plan = self._attachment.shares
            assert plan is not None
            start, stop = plan.share(len(batch))
            yield batch[start:stop]


def refuse_dealt_streams(dataset: Any) -> None:
    """Refuses, on several ranks, a stream: with a SetupError."""
    if isinstance(dataset, IterableDataset) and here().size > 1:
        raise SetupError(
            f"an IterableDataset on {here().size} ranks would give each the same samples: give a dataset with indices, "
            "or one process"
        )


def source_of(loader: Any) -> Source:
    """The samples of a loader that holds its collate function back, as Pieces."""
    common: dict[str, Any] = {"seed": None, "ranks": Ranks(), "worst_case": None}
    if isinstance(loader.dataset, IterableDataset):
        return SampleSource(loader.dataset, Pieces(loader.collate_fn), **common)
    return MapSource(loader.dataset, Pieces(loader.collate_fn), shuffle=False, **common)
