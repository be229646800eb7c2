"""In which order an epoch shows samples: of a dataset by their indices, of a stream as it gives them.

Choices made here:

- Datasets and tensors are shuffled by one permutation drawn from the epoch's base.
- A DataLoader's own sampler is asked, and not further ahead than the windows that are being fetched: it may be endless,
  or follow how the training goes. torch's own draw only when they start; others draw inside a lane all along.
- On several ranks the first one's sampler decides, for the whole epoch at once: ranks fetch ahead at their own pace,
  and must not meet in a broadcast while one of them is in the middle of a window.
- A DistributedSampler is asked for the order of a single process. The windows are what is shared among the ranks.
"""

import copy
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from autoaccum.data.draws import Lane
from autoaccum.errors import DataError
from autoaccum.ranks import Ranks

__all__ = [
    "Order",
    "Reader",
    "length_of",
    "permutation",
    "possible_indices",
    "sampled",
    "shared_order",
    "undistributed",
]


class Known:
    """Indices that are all known, as int64, taken one window after another."""

    def __init__(self, indices: Tensor) -> None:
        self._indices, self.taken = indices, 0

    def look(self, count: int) -> tuple[int, bool]:
        """All that are left, which is known without looking."""
        return len(self._indices) - self.taken, True

    def take(self, count: int) -> Sequence[Any]:
        """The next `count` indices."""
        return list(self.rows(count).tolist())

    def rows(self, count: int) -> Tensor:
        """The next `count` indices as int64."""
        start, self.taken = self.taken, self.taken + count
        return self._indices[start : self.taken]


def permutation(length: int, seed: int | None) -> Known:
    """The numbers below `length`: permuted by `seed`, or in sequence where it is None."""
    if seed is None:
        return Known(torch.arange(length))
    return Known(torch.randperm(length, generator=torch.Generator().manual_seed(seed)))


class Reader:
    """Items that can only be read on, no further than is looked for: a sampler's indices, samples, ready batches.

    Args:
        items: iterated when the first one is wanted.
        starting, going_on: what reading draws from, the first time and from then on.
        counted: an item as it is kept, and how many samples it is.
        called: what is read, in an error.

    Attributes:
        drawn: items that were read and not yet taken.
        ahead, taken: samples in them, and samples that were taken.
        epoch, index: of a stream, the epoch that is being read, None before one is, and the windows taken of it.
    """

    def __init__(
        self,
        items: Iterable[Any],
        starting: AbstractContextManager[None],
        going_on: AbstractContextManager[None],
        counted: Callable[[Any], tuple[Any, int]] = lambda item: (item, 1),
        called: str = "data",
    ) -> None:
        self._items, self._contexts, self._counted, self._called = items, (starting, going_on), counted, called
        self._iterator: Iterator[Any] | None = None
        self._count = 0
        self._ended = self._broken_off = False
        self.drawn: deque[Any] = deque()
        self.ahead = self.taken = self.index = 0
        self.epoch: int | None = None

    def look(self, count: int) -> tuple[int, bool]:
        """How many samples lie ahead, drawn up to `count`, and whether there will be no more."""
        if self.ahead < count and not self._ended:
            # torch's own samplers and a loader's workers draw when they are set going, and not again.
            with self._contexts[self._iterator is not None]:
                while self.ahead < count and not self._ended:
                    self._draw()
        return self.ahead, self._ended

    def take(self, count: int) -> list[Any]:
        """The next `count` items, where each is one sample."""
        self.ahead, self.taken = self.ahead - count, self.taken + count
        return [self.drawn.popleft() for _ in range(count)]

    def rows(self, count: int) -> Tensor:
        """The next `count` indices as int64."""
        return torch.tensor(self.take(count), dtype=torch.int64)

    def put_back(self, items: Sequence[Any], samples: int) -> None:
        """Adds items at the front, in their order."""
        self.drawn.extendleft(reversed(items))
        self.ahead, self.taken = self.ahead + samples, self.taken - samples

    def _draw(self) -> None:
        try:
            if self._iterator is None:
                self._iterator = iter(self._items)
            broken_off, self._broken_off = self._broken_off, True
            item = next(self._iterator)
            self._broken_off = False
        except StopIteration:
            if broken_off:  # a generator that an exception has gone through has ended, wherever it was
                raise DataError(
                    f"the {self._called} was broken off while it was being read, after {self._count} items, and cannot "
                    "be read on: give data that can be read again, or an iterator of its own"
                ) from None
            self._ended, self._iterator = True, None
            return
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"the {self._called} could not be read on after {self._count} items: {type(error).__name__}: {error}; "
                "repair it, or let it pass over what it cannot read"
            ) from error
        self._count += 1
        item, samples = self._counted(item)
        if samples:
            self.drawn.append(item)
            self.ahead += samples


def sampled(sampler: Any, base: int, *, follow_global: bool) -> Reader:
    """What a sampler of the user's, any iterable of indices, says.

    The epoch's `base` seeds the sampler's lane. With `follow_global` one of torch's own samplers draws its start from
    torch's global generator, as in a loop by hand; others draw from the lane.
    """
    native = type(sampler).__module__.startswith("torch.utils.data.")
    lane = Lane(base)
    order = Reader(
        sampler, nullcontext() if native and follow_global else lane, nullcontext() if native else lane,
        called="sampler",
    )  # fmt: skip
    order.look(1)  # it starts now, where the epoch begins
    return order


Order = Known | Reader


def shared_order(make: Callable[[], Reader], length: int | None, ranks: Ranks) -> Order:
    """The order of rank 0, which `make` gives there, on every rank, for the whole epoch of `length` samples.

    A DataError where the sampler has no length, or gives something other than integers (on rank 0; the others raise as
    well).
    """
    if length is None:
        raise DataError(
            "a sampler without a length: on several ranks the first one reads an epoch's order as a whole, so give the "
            "sampler a __len__"
        )
    indices = torch.empty(0, dtype=torch.int64)
    if ranks.rank == 0:
        try:
            order = make()
            indices = _as_integers(order.take(min(order.look(length)[0], length)))
        except BaseException:
            ranks.fail()
            raise
    (count,) = ranks.tally("the order of an epoch", [indices.numel()])
    if ranks.rank != 0:
        indices = torch.empty(int(count), dtype=torch.int64)
    return Known(ranks.broadcast("the order of an epoch", indices))


def _as_integers(indices: Sequence[Any]) -> Tensor:
    try:
        return torch.tensor(list(map(operator.index, indices)), dtype=torch.int64)
    except TypeError as error:
        raise DataError(
            f"the sampler gives indices such as {indices[0]!r}: on several ranks they must be integers, so let the "
            "dataset translate them"
        ) from error


def undistributed(sampler: Any) -> Any:
    """A DistributedSampler as it would be in a single process, with its shuffle and its seed; any other as it is."""
    if not isinstance(sampler, DistributedSampler):
        return sampler
    alone: DistributedSampler[Any] = copy.copy(sampler)
    alone.num_replicas, alone.rank = 1, 0
    alone.num_samples = alone.total_size = len(sampler.dataset)  # type: ignore[arg-type]
    return alone


def possible_indices(sampler: Any, length: int | None) -> Sequence[Any]:
    """Indices that an epoch may show, told without asking the sampler."""
    chosen: Any = getattr(sampler, "indices", None)
    if hasattr(chosen, "__getitem__") and not isinstance(chosen, Mapping) and length_of(chosen):
        return list(chosen)  # of a list, or of an array of numbers
    if length is None:
        raise DataError(
            "the DataLoader's dataset has no length, so samples for trials cannot be chosen: give it a __len__, or "
            "pass worst_case="
        )
    return range(length)


def length_of(data: Any) -> int | None:
    """`len(data)`, where it has one."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None
