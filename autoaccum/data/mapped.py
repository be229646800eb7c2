"""Datasets with indices, read as micro-batches: in this process, or by a DataLoader's workers.

Choices made here:

- The collate function sees one micro-batch, never a larger one: what it pads, it pads for what runs together.
- Workers get a DataLoader of our own whose batch sampler names the samples of each micro-batch. They fetch ahead under
  the plan of the moment. When the plan changes, what was fetched ahead is let go and asked for again in the new sizes,
  so that a window is collated as it will be after a restart.
- In this process samples are fetched when their window is due, with the generators as they are: a checkpoint at a
  window boundary has them. Workers are seeded for each sample (see `draws.py`).
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from autoaccum.data import tree
from autoaccum.data.base import Read
from autoaccum.data.cuts import Cut, Cutter
from autoaccum.data.draws import mix
from autoaccum.data.fetch import Ask, Failure, Fetcher, WorkerDataset
from autoaccum.data.indexed import IndexedSource
from autoaccum.data.orders import Order, length_of, possible_indices
from autoaccum.data.sample_lengths import ByLength
from autoaccum.data.trial_samples import Pool, spread
from autoaccum.errors import DataError, TracebackText
from autoaccum.planning.plan import Plan

__all__ = ["MapSource", "as_is", "dead_worker", "is_dead_worker", "pinned", "rebuilt", "samples_from"]


class MapSource(IndexedSource):
    """A dataset with `__getitem__`: by itself, or of a DataLoader whose settings are kept."""

    kind = "dataset"

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any], loader: DataLoader[Any] | None = None, **common: Any
    ) -> None:
        super().__init__(length_of(dataset), loader, **common)
        self._continued = {"dataset": dataset, "collate_fn": collate}
        self._fetcher = Fetcher(dataset, collate)
        self._collated = self._fetcher.collated
        self._pool = Pool(samples_from(self._fetcher, self._sampler, self._rows))
        self._pin = loader is not None and loader.pin_memory and torch.cuda.is_available()
        self._workers: _Workers | None = None
        if loader is not None and loader.num_workers:
            self._workers = _Workers(WorkerDataset(dataset, self._fetcher), loader)

    def _given(self, indices: Sequence[Any]) -> Any:
        return self._fetcher.samples(indices)

    def _windows(self, order: Order, cutter: Cutter, base: int) -> Iterator[Read]:
        assert self._pool is not None
        self._pool.close()
        if self._workers is not None:
            return self._workers.windows(_Schedule(order, cutter, self.by_length, base))
        return self._in_this_process(_Schedule(order, cutter, self.by_length))

    def _in_this_process(self, schedule: "_Schedule") -> Iterator[Read]:
        while entry := schedule.next():
            read = entry.read(list(map(self._fetcher.fetch, entry.asks())))
            yield read._replace(batches=list(map(pinned, read.batches))) if self._pin else read


def pinned(batch: Any) -> Any:
    """The batch in memory from which a GPU copies beside the computation."""
    return tree.map_tensors(Tensor.pin_memory, batch)


def samples_from(fetcher: Fetcher, sampler: Any, rows: int | None) -> Callable[[int], Iterator[Any]]:
    """Samples from a number on; no method, which would hold its source and so the workers in a circle (`_Workers`)."""

    def samples(start: int) -> Iterator[Any]:
        candidates = possible_indices(sampler, rows)
        return (fetcher.samples([candidates[number]])[0] for number in spread(len(candidates), start))

    return samples


class _Entry(NamedTuple):
    """One window that is to be fetched: how it is cut, the indices of all ranks, where in the epoch it begins, and the
    epoch's base, where every sample is to be seeded from it.
    """

    cut: Cut
    indices: Sequence[Any]
    position: int
    base: int | None
    by_length: ByLength | None = None

    @property
    def asked(self) -> tuple[int, ...]:
        """Samples that are asked for together: of each micro-batch; where they are cut by length, of all in one."""
        cut = self.cut
        return cut.sizes if self.by_length is None or cut.start == cut.stop else (cut.stop - cut.start,)

    def asks(self) -> Iterator[Ask]:
        """This rank's part of the window."""
        start = self.cut.start
        for size in self.asked:
            yield Ask(self.indices[start : start + size], self.position + start, self.base, self.by_length)
            start += size

    def read(self, fetched: list[Read]) -> Read:
        """The window, from what its asks gave."""
        batches = [batch for part in fetched for batch in part.batches]
        indices = [index for part in fetched for index in part.indices or ()]
        return Read(self.cut.total, batches, fetched[0].padding if fetched else None, indices)


class _Schedule:
    """The windows of an epoch, one after another, cut by the plan of the moment."""

    def __init__(
        self, order: Order, cutter: Cutter, by_length: Callable[[Plan], ByLength | None], base: int | None = None
    ) -> None:
        self._order, self._cutter, self._by_length, self._base = order, cutter, by_length, base
        self._due: deque[_Entry] = deque()
        self._unasked: deque[_Entry] = deque()

    def next(self) -> _Entry | None:
        """The next window; None at the epoch's end."""
        total = self._cutter.total(self._order.look)
        if not total:
            return None
        position, by_length = self._order.taken, self._by_length(self._cutter.plan)
        return _Entry(self._cutter.cut(total), self._order.take(total), position, self._base, by_length)

    # For workers, which fetch windows ahead of the one that is due.

    def ahead(self) -> _Entry | None:
        """The next window that is to be fetched; None at the epoch's end."""
        return self._unasked.popleft() if self._unasked or self._more() else None

    def due(self) -> tuple[_Entry | None, bool]:
        """The window that is wanted next; and whether the plan has changed, so that all are to be asked for again."""
        if not self._due and not self._more():
            return None, False
        changed = self._recut(self._due[0]) is not self._due[0]
        if changed:
            self._due = deque(map(self._recut, self._due))
            self._unasked = deque(self._due)
        return self._due.popleft(), changed

    def _more(self) -> bool:
        entry = self.next()
        if entry is not None:
            self._due.append(entry)
            self._unasked.append(entry)
        return entry is not None

    def _recut(self, entry: _Entry) -> _Entry:
        """The window cut by the plan as it is now: the same entry, where that changes nothing."""
        cut, by_length = self._cutter.cut(entry.cut.total), self._by_length(self._cutter.plan)
        same = cut == entry.cut and by_length == entry.by_length
        return entry if same else entry._replace(cut=cut, by_length=by_length)


class _Workers:
    """A DataLoader's worker processes, fetching micro-batches ahead."""

    def __init__(self, dataset: WorkerDataset, loader: DataLoader[Any]) -> None:
        self._asks = _Asks()
        self._seeds = torch.Generator()
        self._loader = rebuilt(loader, dataset, batch_sampler=self._asks, collate_fn=as_is, generator=self._seeds)

    def windows(self, schedule: _Schedule) -> Iterator[Read]:
        """The windows of the schedule."""
        self._asks.schedule = schedule
        batches: Iterator[Any] | None = None
        try:
            while True:
                entry, changed = schedule.due()
                if entry is None:
                    return
                if changed:
                    batches = None
                if batches is None and entry.asked:
                    # From here the loader seeds its workers.
                    self._seeds.manual_seed(mix(entry.base or 0, entry.position, 2))
                    batches = iter(self._loader)
                fetched = [_fetched(batches) for _ in entry.asked] if batches is not None else []
                yield entry.read(fetched)
        finally:
            # Nothing may hold the workers in a circle or a traceback: those that Python's collector finds, after the
            # queues they listen to, end only when they look up, every five seconds.
            del batches
            self._asks.schedule = None


class _Asks:
    """The batch sampler of the workers' DataLoader, which stays while the epochs' schedules come and go."""

    schedule: _Schedule | None = None

    def __iter__(self) -> Iterator[Ask]:
        # Asked anew each time: a loader with persistent workers keeps this iterator, which must not keep the schedule.
        while self.schedule is not None and (entry := self.schedule.ahead()) is not None:
            yield from entry.asks()


def _fetched(batches: Iterator[Any]) -> Any:
    try:
        batch = next(batches)
    except (RuntimeError, OSError, EOFError) as error:  # what the dataset raised comes as a Failure, not this way
        raise dead_worker(error) from error
    if isinstance(batch, Failure):
        del batches
        raise DataError(batch.message) from TracebackText(batch.traceback)
    return batch


def dead_worker(error: BaseException) -> DataError:
    """What to tell a person when a worker process is gone; torch raises it wherever the program happens to be."""
    return DataError(
        f"a worker of the DataLoader died, or no longer answers: {type(error).__name__}: {error}; a worker is often "
        "killed for want of memory, so try fewer (num_workers), or num_workers=0 to see what happens"
    )


def is_dead_worker(error: BaseException) -> bool:
    """Whether `error` is torch's word that a worker process is gone."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


def rebuilt(loader: DataLoader[Any], dataset: Any, **batching: Any) -> DataLoader[Any]:
    """A DataLoader that works as the user's does (workers, pinning, timeout) and batches as `batching` says."""
    accelerator = getattr(torch, "accelerator", None)  # since torch 2.6
    pins = torch.cuda.is_available() or (accelerator is not None and accelerator.is_available())
    kept = ("num_workers", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor",
            "persistent_workers")  # fmt: skip
    settings = {name: getattr(loader, name) for name in kept}
    settings["pin_memory"] = loader.pin_memory and pins  # without an accelerator torch would only warn, once an epoch
    if loader.pin_memory_device:  # deprecated where torch no longer needs it: passed on only where it was given
        settings["pin_memory_device"] = loader.pin_memory_device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are many workers was said when the user's loader was made
        return DataLoader(dataset, **{**settings, **batching})


def as_is(batch: Any) -> Any:
    """The collate function of a loader whose dataset gives whole batches."""
    return batch
