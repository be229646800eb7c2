"""A trainer's loader made to yield the samples of a window, not collated: what stands in for its parts."""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler

from autoaccum.data.base import Source
from autoaccum.data.mapped import MapSource, rebuilt
from autoaccum.data.stream import SampleSource
from autoaccum.data.structure import Piece
from autoaccum.errors import SetupError
from autoaccum.integrations.attachment import Attachment
from autoaccum.ranks import Ranks, here

__all__ = ["Held", "Pieces", "Samples", "Shares", "loader_of_windows", "refuse_dealt_streams", "source_of"]


class Samples:
    """A window as the loader yields it. Afterwards, for the trainer's counters, it answers as a batch would."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples
        self.pieces: list[Piece] | None = None

    def __contains__(self, name: object) -> bool:
        # Before it ran nothing is counted: what the loss divides by is ours to know.
        return self.pieces is not None and all(name in piece.batch for piece in self.pieces)

    def __getitem__(self, name: str) -> Tensor:
        flat = [piece.batch[name].flatten() for piece in self.pieces or ()]
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


def loader_of_windows(loader: Any, attachment: Attachment, place: Callable[[], int]) -> Any:
    """A Lightning Trainer's training loader with the target batch, whose samples are not collated.

    Args:
        loader: the user's.
        attachment: says the target, and how windows are shared out.
        place: windows of the epoch that were trained already, asked when the first of the others is fetched.

    Raises:
        SetupError: no DataLoader, one whose batching cannot be redone, or a stream on several ranks.
    """
    if not isinstance(loader, DataLoader):
        raise SetupError(
            f"the training loader is a {type(loader).__name__}: TargetBatch makes the batches of one DataLoader"
        )
    refuse_dealt_streams(loader.dataset)
    kept = {"collate_fn": Held(loader.collate_fn), "generator": loader.generator}
    if isinstance(loader.dataset, IterableDataset):
        batching = {"batch_size": attachment.target_batch, "drop_last": loader.drop_last}
        return rebuilt(loader, loader.dataset, **batching, **kept)
    if loader.batch_size is None:
        raise SetupError(
            "the training loader's batches are given by its own batch_sampler, or are ready: give a DataLoader with "
            "batch_size=, whose batching can be redone"
        )
    if here().size == 1:
        batches: Any = BatchSampler(loader.sampler, attachment.target_batch, loader.drop_last)
    else:
        shuffles, seed = isinstance(loader.sampler, RandomSampler), int(os.environ.get("PL_GLOBAL_SEED", "0"))
        sampler: Any = DistributedSampler(loader.dataset, 1, 0, shuffle=shuffles, seed=seed)
        batches = Shares(BatchSampler(sampler, attachment.target_batch, loader.drop_last), attachment)
    return _Resumable(rebuilt(loader, loader.dataset, batch_sampler=batches, **kept), place)


class _Resumable:
    """A loader that goes on in mid-epoch from where a checkpoint was written, in the order that was drawn then.

    Lightning saves and loads the state of whatever has `state_dict` and `load_state_dict`. As it is no DataLoader,
    Lightning deals it to the ranks no second time.
    """

    def __init__(self, loader: DataLoader[Any], place: Callable[[], int]) -> None:
        self._loader, self._place = loader, place
        self._kept: dict[str, Any] = {}
        self._began: list[Tensor] = []
        drawn = (torch.default_generator, loader.generator, getattr(loader.sampler, "generator", None))
        # Of several ranks Lightning saves only the first one's state.
        self._generators = list(dict.fromkeys(each for each in drawn if each is not None)) if here().size == 1 else []

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_loader"], name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        kept, self._kept = self._kept, {}
        place = self._place() if kept else 0
        self._set(kept.get("began" if place else "now", ()))
        self._began = self._states()
        windows = iter(self._loader)
        for _ in islice(windows, place):
            pass
        if place:
            self._set(kept["now"])
        yield from windows

    def state_dict(self) -> dict[str, Any]:
        """The random generators: when the epoch began, from which its order follows, and now."""
        return {"began": self._began, "now": self._states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._kept = dict(state_dict)

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]

    def _set(self, states: Sequence[Tensor]) -> None:
        for generator, state in zip(self._generators, states):
            generator.set_state(state)
