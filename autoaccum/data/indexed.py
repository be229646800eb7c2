"""Data whose samples have indices: which are read in what order, and tensors, whose rows need no loader.

Choices made here:

- A window's rows of a tensor are gathered once and handed out as views of that copy: a micro-batch costs a few
  microseconds, and a model that writes to its input does not write to the user's tensors.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from autoaccum.data import tree
from autoaccum.data.base import Read, Source
from autoaccum.data.cuts import Cutter
from autoaccum.data.orders import (
    Order,
    length_of,
    permutation,
    possible_indices,
    sampled,
    shared_order,
    undistributed,
)
from autoaccum.errors import DataError

__all__ = ["IndexedSource", "TensorSource"]


class IndexedSource(Source):
    """Samples by their indices, in an order of our own or that of a DataLoader's sampler.

    Of a `loader` the sampler, generator, batch size and drop_last are kept; without one `shuffle` decides the order.
    """

    def __init__(self, length: int | None, loader: DataLoader[Any] | None, *, shuffle: bool, **common: Any) -> None:
        super().__init__(**common)
        self._shuffle, self._generator = shuffle, getattr(loader, "generator", None)
        self._sampler = undistributed(loader.sampler) if loader is not None else None
        self._replayed = {"generator": self._generator, "sampler": self._sampler}
        self._rows = length
        self.length = length if self._sampler is None else length_of(self._sampler)
        if loader is not None:
            self.loader_batch, self.drop_last = loader.batch_size, loader.drop_last
        if length == 0 or self.length == 0:
            raise DataError(f"the data is empty: no samples are in its {self.kind}, and training needs at least one")

    def read(self, epoch: int, cutter: Cutter, start: int) -> Iterator[Read]:
        """The epoch's windows from the one numbered `start`; of those before it only indices are read."""
        order, base = self._order(epoch, again=start > 0)
        for _ in range(start):
            order.take(cutter.total(order.look))
        return self._windows(order, cutter, base)

    @abstractmethod
    def _windows(self, order: Order, cutter: Cutter, base: int) -> Iterator[Read]:
        """The windows of what is left of `order`."""

    @abstractmethod
    def _given(self, indices: Sequence[Any]) -> Any:
        """The samples of these indices, as the data gives them."""

    def _candidates(self) -> Sequence[Any]:
        """Indices that an epoch may show."""
        return possible_indices(self._sampler, self._rows)

    def first(self) -> Any:
        """The first and the last sample that an epoch may show."""
        candidates = self._candidates()
        return self._given([candidates[0], candidates[-1]])

    def _order(self, epoch: int, again: bool) -> tuple[Order, int]:
        """The order of the epoch, and its base."""
        sampler = self._sampler
        if sampler is None and not self._shuffle:
            return permutation(self._rows or 0, None), 0
        with self._beginning(again):
            base = self._begin(epoch, again)
            if sampler is None:
                return permutation(self._rows or 0, base), base
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(epoch)
            make = partial(sampled, sampler, base, follow_global=self._seed is None)
            return (make() if self.ranks.size == 1 else shared_order(make, self.length, self.ranks)), base


class TensorSource(IndexedSource):
    """A tensor, or a tuple, dict or other structure of equally long tensors; micro-batches have the same structure."""

    kind = "tensors"

    def __init__(self, data: Any, loader: DataLoader[Any] | None = None, **common: Any) -> None:
        super().__init__(tree.batch_size(data), loader, **common)
        self._data, self.draws = data, loader is not None

    def _trial(self, size: int) -> Any:
        candidates = self._candidates()
        count = len(candidates)
        # From all over, since datasets come sorted; in turn where more are wanted than there are.
        chosen = [number % count if size > count else number * count // size for number in range(size)]
        return self._given([candidates[number] for number in chosen])

    def _windows(self, order: Order, cutter: Cutter, base: int) -> Iterator[Read]:
        while total := cutter.total(order.look):
            cut = cutter.cut(total)
            rows = order.rows(total)[cut.start : cut.stop]
            batches = tree.split(self._given(rows), cut.sizes) if cut.sizes else []
            yield Read(total, batches, indices=rows)

    def _given(self, indices: Any) -> Any:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        try:
            return tree.map_tensors(lambda tensor: tree.take_rows(tensor, rows), self._data)
        except (IndexError, RuntimeError) as error:
            raise DataError(
                f"rows {rows[:8].tolist()} and on could not be taken from tensors of {self._rows} rows: {error}; the "
                "sampler must give indices from 0 to one below that"
            ) from error
