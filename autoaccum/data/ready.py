"""Loaders that yield ready batches: `batch_sampler=`, `batch_size=None`, or a way of iterating of their own.

Choices made here:

- The batches stay as they were made, since how they were made has a reason (lengths that go together, say). A window
  takes them in order until it has its samples; what is over begins the next window. A batch is cut only along its batch
  dimension: where a window ends, where a rank's share ends, and evenly where it does not fit.
- Trials of a loader with a batch sampler collate samples of the dataset, as many as asked for. Of other loaders, ready
  batches are looked at, and the one with the most bytes a sample comes first.
"""

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import Any, cast

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from autoaccum.data import tree
from autoaccum.data.base import Read
from autoaccum.data.cuts import Cutter
from autoaccum.data.fetch import Fetcher
from autoaccum.data.mapped import rebuilt, samples_from
from autoaccum.data.orders import Reader, length_of, undistributed
from autoaccum.data.stream import StreamSource, reads_once
from autoaccum.data.trial_samples import KEPT_BYTES, Pool, largest_first
from autoaccum.errors import DataError, shown

__all__ = ["TARGET_KEYS", "BatchSource", "iterates_by_itself"]

_LOOKED_AT = 8
TARGET_KEYS = ("labels", "label", "targets", "target")


class BatchSource(StreamSource):
    """A DataLoader that yields ready batches."""

    kind = "ready batches"

    def __init__(self, loader: DataLoader[Any], **common: Any) -> None:
        loader = _of_one_process(loader)
        dataset: Any = loader.dataset
        streams = isinstance(dataset, IterableDataset)
        super().__init__(loader, streams and not loader.num_workers and reads_once(dataset), **common)
        if not streams and length_of(dataset) == 0:
            raise DataError("the data is empty: the DataLoader's dataset holds no samples, and training needs some")
        batch = getattr(loader.batch_sampler, "batch_size", None)
        self.loader_batch = batch if isinstance(batch, int) else None
        if type(loader.batch_sampler) is BatchSampler and not iterates_by_itself(loader):
            samples = self.length = length_of(loader.batch_sampler.sampler)
            if samples is not None and loader.batch_sampler.drop_last:
                self.length = samples - samples % loader.batch_sampler.batch_size
        if not self.one_shot:  # batches are read again whole, dataset and collate function included
            self._replayed = {"loader": loader}
        self._loader, self._fetcher = loader, Fetcher(dataset, loader.collate_fn)
        inner = getattr(loader.batch_sampler, "sampler", None)
        self._told_epochs = [loader, dataset, loader.sampler, loader.batch_sampler, inner]
        of_samples = loader.batch_sampler is not None and not streams and not iterates_by_itself(loader)
        to_look_at = samples_from(self._fetcher, inner or loader.sampler, length_of(dataset) if of_samples else None)
        self._pool = Pool(to_look_at) if of_samples else None
        self._collated = self._fetcher.collated
        self._looked_at: list[Any] = []
        self._compared = False  # whether some batches were looked at for what their lists hold

    def read(self, epoch: int, cutter: Cutter, start: int) -> Iterator[Any]:
        """The epoch's windows from the one numbered `start`; those before it are read and passed over."""
        self._looked_at = []
        return super().read(epoch, cutter, start)

    # --- windows ---

    def marked(self, batch: Any) -> Any:
        """A ready batch in which lists that could be mistaken say by their type what they hold, else a DataError."""
        if self._pool is not None:
            return self._lists.read(batch, self._trial)
        if not (self._compared or self.one_shot) and tree.flat_size(batch) is None:
            self._compared = True
            with self._untouched():
                for other in islice(self._batches_for_trials(), _LOOKED_AT):
                    self._lists.look(other)
        return self._lists.read(batch)

    def _counted(self, item: Any) -> tuple[Any, int]:
        if item is None:  # a collate function had nothing left
            return None, 0
        item = self.marked(item)
        return item, _checked_size(item)

    def _take(self, reader: Reader, samples: int) -> list[Any]:
        reader.ahead, reader.taken = reader.ahead - samples, reader.taken + samples
        return _taken(reader.drawn, samples)

    def _micro_batches(self, drawn: list[Any], cutter: Cutter, total: int) -> Read:
        cut, rest = cutter.cut(total), deque(drawn)
        _taken(rest, cut.start)
        return Read(total, cutter.pieces(_taken(rest, cut.stop - cut.start), self.by_length(cutter.plan)))

    def first(self) -> Any:
        """The first ready batch that a trial may see."""
        return list(islice(self._batches_for_trials(), 1))

    # --- trials ---

    def _trial(self, size: int) -> Any:
        if self._pool is not None:
            return super()._trial(size)
        batches = self._some_batches(size)
        if not batches:
            raise DataError("the data is empty: the DataLoader gave no batches, and training needs at least one")
        each = [-(-tree.nbytes(batch) // tree.batch_size(batch)) for batch in batches]
        ordered, varies = largest_first(batches, each, "ready batches")
        self.varies = varies or self.varies
        return tree.repeat(_joined(ordered, size), size)

    def _some_batches(self, size: int) -> list[Any]:
        """A few ready batches, and more until they have `size` samples."""
        looked_at = self._looked_at
        if sum(map(_checked_size, looked_at)) < size:
            looked_at, samples = [], 0
            with self._untouched():
                for batch in map(self.marked, self._batches_for_trials()):
                    looked_at.append(batch)
                    samples += _checked_size(batch)
                    if samples >= size and len(looked_at) >= _LOOKED_AT:
                        break
            self._looked_at = looked_at if tree.nbytes(looked_at) <= KEPT_BYTES else []
        return list(filter(_checked_size, looked_at))

    def _batches_for_trials(self) -> Iterator[Any]:
        """Ready batches from the beginning, without asking the sampler where the dataset makes them."""
        loader, dataset = self._loader, cast(Any, self._loader.dataset)
        found: Iterable[Any] = loader
        if self.one_shot:
            found = self._drawn_ahead(0)
        elif isinstance(dataset, IterableDataset) and not (iterates_by_itself(loader) or reads_once(dataset)):
            found = map(loader.collate_fn, dataset)
        elif not (isinstance(dataset, IterableDataset) or iterates_by_itself(loader)):
            found = map(loader.collate_fn, samples_from(self._fetcher, loader.sampler, length_of(dataset))(0))
        return (batch for batch in found if batch is not None)  # a collate function may have had nothing left


def iterates_by_itself(loader: DataLoader[Any]) -> bool:
    """Whether the loader is of a class with an `__iter__` of its own, so that only it knows what it yields."""
    return type(loader).__iter__ is not DataLoader.__iter__


def _of_one_process(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader without its DistributedSampler's sharding, which ours replaces; most are as they should be."""
    batches: Any = loader.batch_sampler
    if iterates_by_itself(loader):
        return loader
    dealt = loader.sampler if batches is None else getattr(batches, "sampler", None)
    alone = undistributed(dealt)
    if alone is dealt:
        return loader
    batching: dict[str, Any] = {"batch_size": None, "sampler": alone}
    if batches is not None:
        batching = {"batch_sampler": copy.copy(batches)}
        batching["batch_sampler"].sampler = alone
    return rebuilt(loader, loader.dataset, collate_fn=loader.collate_fn, generator=loader.generator, **batching)


def _checked_size(batch: Any) -> int:
    """Samples in a ready batch; a DataError where it is a single sample, or its leaves disagree."""
    hint = (
        "The DataLoader has batch_size=None or batches of its own, so each item it yields must be a ready batch; give "
        "it batch_size= where its dataset holds single samples"
    )
    target: Any = None
    if isinstance(batch, Mapping):
        target = next((batch[key] for key in TARGET_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        target = batch[-1]
    if isinstance(target, (int, float)) or (isinstance(target, Tensor) and target.dim() == 0):
        raise DataError(f"an item with the target {shown(target)} is a single sample and no batch. {hint}")
    try:
        return tree.batch_size(batch)
    except DataError as error:
        raise DataError(f"{error}. {hint}") from error


def _taken(batches: deque[Any], samples: int) -> list[Any]:
    """Takes so many samples off the front of `batches`, cutting one where they end in it, and joining none."""
    taken = []
    while samples:
        batch = batches.popleft()
        size = tree.batch_size(batch)
        if size > samples:
            batch, rest = tree.split(batch, (samples, size - samples))
            batches.appendleft(rest)
            size = samples
        samples -= size
        taken.append(batch)
    return taken


def _joined(batches: Sequence[Any], size: int) -> Any:
    """As many of the batches in one as hold `size` samples, where their shapes allow; else the first."""
    before = accumulate(map(tree.batch_size, batches), initial=0)
    try:
        return tree.join([batch for batch, samples in zip(batches, before) if samples < size])
    except DataError:
        return batches[0]
