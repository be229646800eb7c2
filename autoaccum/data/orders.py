"""In which order an epoch shows the samples of a dataset.

Choices made here:

- Datasets and tensors are shuffled by one permutation drawn from the epoch's base.
- A DataLoader's own sampler is asked, and not further ahead than the windows that are being fetched: it may be endless,
  or follow how the training goes. torch's own samplers draw when they start and not again, so only their start needs
  care; others draw inside a lane all along.
- On several ranks the first one's sampler decides, for the whole epoch at once: ranks fetch ahead at their own pace,
  and must not meet in a broadcast while one of them is in the middle of a window.
- A DistributedSampler is asked for the order of a single process. The windows are what is shared among the ranks.
"""

import copy
import operator
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from autoaccum.data.draws import Lane
from autoaccum.errors import DataError
from autoaccum.ranks import Ranks

__all__ = ["Order", "SamplerOrder", "length_of", "permutation", "possible_indices", "shared_order", "undistributed"]

# Indices that the first rank reads of a sampler without a length: 128 MiB.
_MOST_SHARED = 2**24


class Known:
    """Indices that are all known, taken one window after another: a range, or a tensor."""

    def __init__(self, indices: range | Tensor) -> None:
        self._indices, self._position = indices, 0

    def look(self, count: int) -> tuple[int, bool]:
        """All that are left, which is known without looking."""
        return len(self._indices) - self._position, True

    def take(self, count: int) -> Sequence[Any]:
        """The next `count` indices."""
        taken = self._next(count)
        return list(taken.tolist()) if isinstance(taken, Tensor) else taken

    def rows(self, count: int) -> Tensor:
        """The next `count` indices as int64."""
        taken = self._next(count)
        return taken if isinstance(taken, Tensor) else torch.arange(taken.start, taken.stop)

    def _next(self, count: int) -> range | Tensor:
        start, self._position = self._position, self._position + count
        return self._indices[start : self._position]


def permutation(length: int, seed: int | None) -> Known:
    """The numbers below `length`: permuted by `seed`, or in sequence where it is None."""
    if seed is None:
        return Known(range(length))
    return Known(torch.randperm(length, generator=torch.Generator().manual_seed(seed)))


class SamplerOrder:
    """What a sampler of the user's, any iterable of indices, says, read no further than is looked for.

    The epoch's `base` seeds the sampler's lane. With `follow_global` one of torch's own samplers draws its start from
    torch's global generator, as in a loop by hand; others draw from the lane.
    """

    def __init__(self, sampler: Any, base: int, *, follow_global: bool) -> None:
        native = type(sampler).__module__.startswith("torch.utils.data.")
        self._lane: Lane | None = Lane(base)
        self._ended = False
        self._read: deque[Any] = deque()
        with nullcontext() if native and follow_global else self._lane:
            self._indices = iter(sampler)
            self._read.extend(islice(self._indices, 1))
        if native:
            self._lane = None

    def look(self, count: int) -> tuple[int, bool]:
        """How many indices lie ahead, read up to `count`, and whether there will be no more."""
        missing = count - len(self._read)
        if missing > 0 and not self._ended:
            with self._lane or nullcontext():
                self._read.extend(islice(self._indices, missing))
            self._ended = len(self._read) < count
        return len(self._read), self._ended

    def take(self, count: int) -> Sequence[Any]:
        """The next `count` indices."""
        self.look(count)
        return [self._read.popleft() for _ in range(count)]

    def rows(self, count: int) -> Tensor:
        """The next `count` indices as int64."""
        return torch.tensor(self.take(count), dtype=torch.int64)


Order = Known | SamplerOrder


def shared_order(make: Callable[[], SamplerOrder], length: int | None, ranks: Ranks) -> Order:
    """The order of rank 0, which `make` gives there, on every rank, for the whole epoch of `length` samples, if known.

    A DataError where the sampler has no end or gives something other than integers (on rank 0; the others raise as
    well).
    """
    indices = torch.empty(0, dtype=torch.int64)
    if ranks.rank == 0:
        try:
            indices = _whole(make(), length)
        except BaseException:
            ranks.fail()
            raise
    (count,) = ranks.tally("the order of an epoch", [indices.numel()])
    if ranks.rank != 0:
        indices = torch.empty(int(count), dtype=torch.int64)
    return Known(ranks.broadcast("the order of an epoch", indices))


def _whole(order: SamplerOrder, length: int | None) -> Tensor:
    most = _MOST_SHARED if length is None else length
    ahead, ended = order.look(most + (length is None))
    if length is None and not ended:
        raise DataError(
            f"a sampler without a length gave more than {_MOST_SHARED} indices: on several ranks the first one reads "
            "an epoch's order as a whole, so give the sampler a __len__"
        )
    indices = order.take(min(ahead, most))
    try:
        return torch.tensor([operator.index(index) for index in indices], dtype=torch.int64)
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
