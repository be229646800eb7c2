"""Whatever the user calls data, as one Source.

    DataLoader of a dataset           its sampler, collate_fn and workers; our batching       MapSource
    Dataset, list, Hugging Face       our order, default_collate                              MapSource
    tensor, tuple or dict of tensors  rows taken directly                                     TensorSource
    IterableDataset, iterable         read on, collated here                                  SampleSource
    DataLoader of ready batches       cut along the batch dimension                           BatchSource
    a loader of one's own             likewise                                                BatchSource
    arrays, tuple or dict of arrays   rows taken directly, as of tensors                      TensorSource

A DataLoader over a TensorDataset that collates as torch does needs no loader: its rows are taken directly too.

A Dataset or a DataLoader says by what it is whether its items are samples or batches. A list of pairs of tensors with
eight rows each does not: they may be eight samples, or one sequence of eight. Reading the one as the other would train
with another batch than was asked for and show nothing of it, so that such an item is asked about.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from autoaccum.checks import check_call
from autoaccum.data import tree
from autoaccum.data.base import Source
from autoaccum.data.draws import Lane
from autoaccum.data.indexed import TensorSource
from autoaccum.data.mapped import MapSource
from autoaccum.data.ready import BatchSource, iterates_by_itself
from autoaccum.data.stream import SampleSource
from autoaccum.data.structure import children, leaves, rebuild
from autoaccum.errors import DataError, shown
from autoaccum.ranks import Ranks, digest, here

__all__ = ["Source", "data_facts", "open_source", "read_more_than_once"]

_SEEDS = (1, 2)  # of the two looks at the first samples
_ALWAYS_SAMPLES = 3  # dimensions of all tensors of an item: images and what they are to become


def read_more_than_once(epochs: int, **sources: Source | None) -> None:
    """Refuses, by its keyword, data that can be read only once and would be read in every epoch."""
    for name, source in sources.items():
        if epochs > 1 and source is not None and source.one_shot:
            raise DataError(
                f"{name} can be read only once, and epochs={epochs} reads it {epochs} times: give a list, a Dataset or "
                "a DataLoader, or set epochs=1"
            )


def open_source(
    data: Any, *, shuffle: bool = True, seed: int | None = None, worst_case: Any = None, ranks: Ranks | None = None
) -> Source:
    """The data as a Source; nothing is read and nothing is drawn yet.

    Args:
        data: as this file's beginning lists it.
        shuffle: for datasets and tensors; a DataLoader keeps its own sampler, a stream its order.
        seed: makes every order, and every sample that a worker augments, a function of (seed, epoch). None: each epoch
            draws from the loader's generator, or from torch's.
        worst_case: a batch, or `f(n) -> batch`, that trials use instead of real samples.
        ranks: this process among others; None: the default process group, where there is one.

    Raises:
        DataError: the data is empty, of an unknown kind, or its tensors differ in length.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, (type, str, bytes)):
        raise _unknown(data)
    if isinstance(worst_case, torch.nn.Module):
        raise DataError(f"worst_case={shown(worst_case)} is a module: give a batch, or f(n) -> a batch of n samples")
    if callable(worst_case):
        check_call("worst_case", worst_case, ("samples",))
    common: dict[str, Any] = {"seed": seed, "ranks": here() if ranks is None else ranks, "worst_case": worst_case}
    if isinstance(data, DataLoader):
        return _of_loader(data, {"shuffle": shuffle, **common}, common)
    if isinstance(data, TensorDataset):
        data = data.tensors
    _refuse_table(data)
    data = _from_arrays(data)
    if _is_tensors(data):
        return TensorSource(data, shuffle=shuffle, **common)
    data = _with_tensors(data)
    indexed = hasattr(data, "__getitem__") or isinstance(data, IterableDataset)
    batches = hasattr(data, "batch_size") or hasattr(data, "batch_sampler")
    if not indexed and batches and hasattr(data, "__iter__"):  # a loader of one's own
        return BatchSource(DataLoader(_Items(data), batch_size=None), **common)
    if not isinstance(data, IterableDataset) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return MapSource(data, _collate_samples if type(data) is list else default_collate, shuffle=shuffle, **common)
    if isinstance(data, Iterable):
        declared = isinstance(data, IterableDataset) or hasattr(data, "with_format")
        return SampleSource(data, default_collate if declared else _collate_samples, **common)
    raise _unknown(data)


def _of_loader(loader: DataLoader[Any], indexed: dict[str, Any], common: dict[str, Any]) -> Source:
    dataset: Any = loader.dataset
    if isinstance(dataset, type):
        raise _unknown(dataset)
    if loader.batch_size is None or iterates_by_itself(loader):
        return BatchSource(loader, **common)
    if isinstance(dataset, IterableDataset):
        return SampleSource(dataset, loader.collate_fn, loader, **common)
    plain = type(dataset) is TensorDataset and loader.collate_fn is default_collate
    if plain and not loader.num_workers and not loader.pin_memory:
        return TensorSource(list(dataset.tensors), loader, **indexed)
    return MapSource(dataset, loader.collate_fn, loader, **indexed)


def _is_tensors(data: Any) -> bool:
    """Whether the data is a structure of tensors with one row a sample; a DataError where some of it is."""
    if not isinstance(data, (Tensor, tuple, Mapping)):
        return False
    kind = type(data).__name__
    if isinstance(data, (tuple, Mapping)) and not data:
        raise DataError(f"the data is an empty {kind}: give one of equally long tensors")
    for path, leaf in leaves(data):
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            what = f"a tensor without dimensions ({shown(leaf)})" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise DataError(
                f"the data is a {kind}, which must hold equally long tensors, and {path or 'it'} is {what}: make it a "
                "tensor with one row a sample, give a list of samples, or choose one dataset of several"
            )
    tree.batch_size(data)
    return True


def _refuse_table(data: Any) -> None:
    if hasattr(data, "iloc") or (hasattr(data, "columns") and hasattr(data, "to_numpy")):
        raise DataError(
            f"the data is a {type(data).__name__}, a table whose columns are no tensors yet, and nothing says which "
            "is the target: give (torch.tensor(table[features].to_numpy()), torch.tensor(table[target].to_numpy()))"
        )


def _from_arrays(data: Any) -> Any:
    """Tensors in place of another library's arrays, which share their memory: in a tuple or dict, or one alone."""
    if isinstance(data, (tuple, Mapping)) and not hasattr(data, "__array_interface__"):
        inside = [_from_arrays(child) for child in children(data) or ()]
        return rebuild(data, inside) if any(new is not old for new, old in zip(inside, children(data) or ())) else data
    if not hasattr(data, "__array_interface__") or not getattr(data, "shape", ()):
        return data
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a memory-mapped array cannot be written to: nothing writes here
            return torch.as_tensor(data)
    except TypeError as error:
        raise DataError(
            f"the data holds an array of {data.dtype}, which no tensor can hold: {error}; turn it into numbers first"
        ) from error


def _with_tensors(data: Any) -> Any:
    """A Hugging Face dataset that still gives Python lists, so that it gives tensors; anything else as it is."""
    give = getattr(data, "with_format", None)
    form = getattr(data, "format", None)
    formatted = form.get("type") if isinstance(form, dict) else getattr(data, "_formatting", data)  # a streaming one
    return give("torch") if callable(give) and formatted is None else data


def _unknown(data: Any) -> DataError:
    hint = "; call it, and pass what it returns" if callable(data) else ""
    return DataError(
        f"data of type {type(data).__name__} cannot be read ({shown(data)}){hint}: give a DataLoader, a Dataset, a "
        "list of samples, an iterable of samples, a tensor, or a tuple or dict of equally long tensors"
    )


# --- samples, ready batches, or something that could be either


class _Items(IterableDataset[Any]):
    """Whatever an object yields; told the epoch where that wants to know it."""

    def __init__(self, data: Any) -> None:
        self._data = data
        if callable(getattr(data, "set_epoch", None)):
            self.set_epoch = data.set_epoch

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data)


def _collate_samples(samples: list[Any]) -> Any:
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
    values = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else ()
    has_number = any(isinstance(value, (int, float)) for value in values)
    if len(tensors) < 2 or 0 in dimensions or dimensions in ({1}, {_ALWAYS_SAMPLES}) or has_number:
        return False
    rows = {tensor.size(0) for tensor in tensors}
    return len(rows) == 1 and rows != {1}


# --- whether all ranks were given the same data


def data_facts(called: str, source: Source | None) -> dict[str, Any]:
    """What every rank must have alike, as plain values by name; `called` is the data's keyword.

    Samples are read twice, seeded alike on every rank, and only what is the same both times is compared: what a
    dataset draws at random may differ.
    """
    if source is None:
        return {called: "none"}
    facts: dict[str, Any] = {called: "given"}
    facts |= {f"{called}'s {name}": value for name, value in source.fingerprint().items()}
    facts |= {f"{called}'s batch_size": source.loader_batch, f"{called}'s drop_last": source.drop_last}
    looks = []
    with source._untouched():
        for seed in _SEEDS:
            with Lane(seed):
                looks.append([_told(leaf) for _, leaf in leaves(source.first())])
    if len(looks[0]) == len(looks[1]):
        same = [a for a, b in zip(*looks, strict=True) if a == b]
        facts[f"{called}'s first samples"] = "; ".join(same[:4]) + f" (in all {digest(same):08x})"
    return facts


def _told(leaf: Any) -> str:
    """What is compared of a leaf."""
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_nested:
        return f"{str(leaf.dtype).removeprefix('torch.')} of shape {tuple(leaf.shape)} {digest(leaf):08x}"
    if callable(getattr(leaf, "tobytes", None)):  # an array, an image
        return f"{type(leaf).__name__} {digest(leaf.tobytes()):08x}"
    return repr(leaf)[:80] if isinstance(leaf, (int, float, str, bytes)) else type(leaf).__name__
