"""What a plain list or iterable gives: samples, ready batches, or something that could be either.

A Dataset or a DataLoader says by what it is whether its items are samples or batches. A list of pairs of tensors with
eight rows each does not: they may be eight samples, or one sequence of eight. Reading the one as the other would train
with another batch than was asked for and show nothing of it, so that such an item is asked about.
"""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, default_collate

from autoaccum.data import tree
from autoaccum.errors import DataError

__all__ = ["collate_samples", "gives_batches", "ready_loader"]

_ALWAYS_SAMPLES = 3  # dimensions of all tensors of an item: images and what they are to become


def gives_batches(data: Any) -> bool:
    """Whether an iterable plainly gives ready batches: a loader of one's own."""
    indexed = hasattr(data, "__getitem__") or isinstance(data, IterableDataset)
    return not indexed and hasattr(data, "__iter__") and (hasattr(data, "batch_size") or hasattr(data, "batch_sampler"))


class _Items(IterableDataset[Any]):
    """Whatever an object yields; told the epoch where that wants to know it."""

    def __init__(self, data: Any) -> None:
        self._data = data
        if callable(getattr(data, "set_epoch", None)):
            self.set_epoch = data.set_epoch

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data)


def ready_loader(data: Any) -> DataLoader[Any]:
    """A DataLoader that passes on the batches `data` yields; arrays become tensors."""
    return DataLoader(_Items(data), batch_size=None)


def collate_samples(samples: list[Any]) -> Any:
    """The samples of a plain list or iterable as torch batches them; a DataError where they may be ready batches."""
    if _may_be_batch(samples[0]):
        shapes = " and ".join(f"{path or 'it'} of shape {tuple(t.shape)}" for path, t in tree.tensors(samples[0]))
        rows = next(tree.tensors(samples[0]))[1].size(0)
        raise DataError(
            f"an item of the data holds {shapes}, and may be a ready batch of {rows} or one sample. Ready batches: "
            "give a list of them in DataLoader(batches, batch_size=None), or an object with __iter__ and batch_size. "
            "Samples: give a Dataset, an IterableDataset, or the list in DataLoader(samples, batch_size=...)"
        )
    return default_collate(samples)


def _may_be_batch(item: Any) -> bool:
    """Whether all tensors of an item have as many rows, as those of a batch have."""
    tensors = [tensor for _, tensor in tree.tensors(item)]
    dimensions = {tensor.dim() for tensor in tensors}
    if len(tensors) < 2 or 0 in dimensions or dimensions in ({1}, {_ALWAYS_SAMPLES}) or _has_number(item):
        return False
    rows = {tensor.size(0) for tensor in tensors}
    return len(rows) == 1 and rows != {1}


def _has_number(item: Any) -> bool:
    values = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else ()
    return any(isinstance(value, (int, float)) for value in values)
