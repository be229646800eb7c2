"""Data without indices: it can only be read on, from its beginning.

Choices made here:

- Every rank reads the whole stream and keeps its share of each window: no rank runs dry before another, nothing is
  padded, nothing is seen twice.
- Reading in this process happens in a lane of the epoch's (see `draws.py`): a stream which shuffles with the global
  generators does so alike on all ranks, and after a restart, where the windows before are read and passed over.
- A stream stays open between two readings of one epoch: a loop that is left and entered again goes on where it was.
- What can be read only once is opened once, by the first trial or the first window. Trials draw into its buffer, and
  windows take from there first.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from autoaccum.data.base import Read, Source
from autoaccum.data.cuts import Cutter
from autoaccum.data.draws import Lane, held, mix, preserved
from autoaccum.data.fetch import Fetcher
from autoaccum.data.mapped import as_is, pinned, rebuilt
from autoaccum.data.orders import Reader
from autoaccum.data.sample_lengths import cut
from autoaccum.data.trial_samples import Pool
from autoaccum.errors import DataError

__all__ = ["SampleSource", "StreamSource", "reads_once"]


class StreamSource(Source):
    """Data that can only be read on: `items` are iterated once for each epoch, or `once` in all."""

    def __init__(self, items: Iterable[Any], once: bool, **common: Any) -> None:
        super().__init__(**common)
        self._items, self.one_shot = items, once
        self._told_epochs: list[Any] = [items]
        self._in_workers = isinstance(items, DataLoader) and items.num_workers > 0
        self._reader: Reader | None = None

    def read(self, epoch: int, cutter: Cutter, start: int) -> Iterator[Read]:
        """The epoch's windows from the one numbered `start`; those before it are read and passed over."""
        if self._pool is not None:
            self._pool.close()
        reader = self._reader
        if reader is None or not start or (reader.epoch, reader.index) != (epoch, start):
            reader = self._open(epoch, start)
            for _ in range(start):
                self._take(reader, cutter.total(reader.look))
                reader.index += 1
        if reader.index == 0 and not reader.look(1)[0]:
            raise DataError("the data is empty: it gave no samples, and training needs at least one")
        return self._windows(reader, cutter)

    def _windows(self, reader: Reader, cutter: Cutter) -> Iterator[Read]:
        while total := cutter.total(reader.look):
            yield self._window(reader, cutter, total)

    def _window(self, reader: Reader, cutter: Cutter, total: int) -> Read:
        drawn = self._take(reader, total)
        try:
            read = self._micro_batches(drawn, cutter, total)
        except BaseException:
            reader.put_back(drawn, total)  # they are asked for again, and may be there only once
            raise
        reader.index += 1
        return read

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on as the source that gave `state` would have."""
        super().load_state_dict(state)
        if not self.one_shot:
            self._reader = None  # it stands where it stands; what it drew since that state is to be drawn again

    def _take(self, reader: Reader, samples: int) -> list[Any]:
        """Items that hold so many samples."""
        return reader.take(samples)

    @abstractmethod
    def _micro_batches(self, drawn: list[Any], cutter: Cutter, total: int) -> Read:
        """This rank's micro-batches of a window of `total` samples."""

    def _counted(self, item: Any) -> tuple[Any, int]:
        """An item as it is kept, and how many samples it is."""
        return item, 1

    def _open(self, epoch: int, start: int) -> Reader:
        """A reader at the beginning of `epoch`."""
        if self.one_shot:
            reader = self._only_reader()
            if reader.epoch is not None:
                raise DataError(
                    f"the data can be read only once: window {start} of epoch {epoch} is wanted, and {reader.index} "
                    f"windows of epoch {reader.epoch} are gone; give a list, a Dataset or a DataLoader, or set epochs=1"
                )
            reader.epoch = epoch
            return reader
        for owner in self._told_epochs:
            if callable(getattr(owner, "set_epoch", None)):
                owner.set_epoch(epoch)
        with self._beginning(again=start > 0):
            base = self._begin(epoch, again=start > 0)
        lane = Lane(base)
        # Where workers read, the lane is needed only to set them going.
        self._reader = reader = Reader(self._items, lane, nullcontext() if self._in_workers else lane, self._counted)
        reader.epoch = epoch
        return reader

    def _only_reader(self) -> Reader:
        """The reader of data that can be read only once. A trial may open it, so its lane cannot wait for the epoch."""
        if self._reader is None:
            seed = torch.initial_seed() if self._seed is None else self._seed
            lane = Lane(mix(seed))
            self._reader = Reader(self._items, lane, lane, self._counted)
        return self._reader

    def _drawn_ahead(self, start: int) -> Iterator[Any]:
        """What can be read only once, from an item on: it stays with the reader, for training."""
        reader = self._only_reader()
        for number in count(start):
            if len(reader.drawn) <= number:  # an item may be a batch of several samples, which are what is looked for
                reader.look(reader.ahead + 1)
            if len(reader.drawn) <= number:
                return
            yield reader.drawn[number]

    def _begin(self, epoch: int, again: bool) -> int:
        if self.ranks.size > 1:  # all ranks read the same, so all draw the same
            for each in held(self._replayed).values():
                if isinstance(each, torch.Generator):
                    each.set_state(self.ranks.broadcast(f"epoch {epoch}'s beginning", each.get_state()))
        return super()._begin(epoch, again)


class SampleSource(StreamSource):
    """A stream of samples, collated here. The workers of a `loader` that they came from are kept."""

    kind = "stream"

    def __init__(
        self,
        samples: Iterable[Any],
        collate: Callable[[list[Any]], Any],
        loader: DataLoader[Any] | None = None,
        **common: Any,
    ) -> None:
        shared = reads_once(samples)
        items = samples
        if loader is not None:
            self.loader_batch, self.drop_last = loader.batch_size, loader.drop_last
            if loader.num_workers:
                items = rebuilt(loader, samples, batch_size=None, collate_fn=as_is, pin_memory=False)
        # A worker iterates a copy of its own, from the beginning each epoch: one-time data is so in this process only.
        super().__init__(items, shared and items is samples, **common)
        self._collated = Fetcher((), collate).collated
        if not self.one_shot:
            self._replayed = {"generator": getattr(loader, "generator", None), "dataset": samples}
        self._continued = {"collate_fn": collate}
        self._samples, self._told_epochs = samples, [samples]
        self._pin = loader is not None and loader.pin_memory and torch.cuda.is_available()
        looked_at = items if shared else samples
        self._pool = Pool(self._drawn_ahead if self.one_shot else lambda start: islice(iter(looked_at), start, None))

    def first(self) -> Any:
        """The first two samples."""
        return list(islice(self._drawn_ahead(0) if self.one_shot else iter(self._samples), 2))

    def _micro_batches(self, drawn: list[Any], cutter: Cutter, total: int) -> Read:
        share = cutter.cut(total)
        samples = drawn[share.start : share.stop]
        pieces, padding = cut(samples, share.sizes, self.by_length(cutter.plan), self._collated)
        batches = [self._collated([samples[place] for place in places]) for places in pieces]
        return Read(total, list(map(pinned, batches)) if self._pin else batches, padding)


def reads_once(items: Iterable[Any]) -> bool:
    """Whether iterating again would go on instead of beginning anew: an iterator, or what hands out the same one."""
    with preserved(held({"data": items}).values()):
        iterator = iter(items)
        return iterator is items or iter(items) is iterator
