"""Nested batches: walk them, measure them, cut them, join them, move them.

The batch dimension is 0. A tensor without dimensions has none, and goes to every part, as do numbers and texts; a list
with one item a sample is cut as a list. `structure.py` says what a batch may be made of, and which lists are such.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from autoaccum.data.structure import (
    AsSamples,
    Marked,
    Piece,
    alike,
    children,
    disagreement,
    graphs_in,
    is_list,
    join_graphs,
    kind_of,
    labelled,
    lists,
    rebuild,
    steps,
    tensors,
)
from autoaccum.errors import DataError
from autoaccum.memory.resident import dense_parts

__all__ = [
    "batch_size",
    "choose",
    "copied",
    "flat_size",
    "join",
    "map_tensors",
    "move",
    "nbytes",
    "repeat",
    "spans",
    "split",
    "take_rows",
    "tensors",
]


def map_tensors(f: Callable[[Tensor], Any], batch: Any) -> Any:
    """Like `batch`, each tensor replaced by `f(tensor)`; containers are new, other leaves the same objects."""
    if isinstance(batch, Tensor):
        return f(batch)
    inside = children(batch)
    return batch if inside is None else rebuild(batch, [map_tensors(f, child) for child in inside])


def copied(batch: Any) -> Any:
    """Containers of its own around the same leaves, for code that may take a sample apart."""
    return map_tensors(lambda tensor: tensor, batch)


def batch_size(batch: Any) -> int:
    """Samples in the batch: the size of dimension 0 of its tensors, or the length of lists with one item a sample.

    Raises:
        DataError: leaves disagree (both are named), or nothing in the batch has a batch dimension.
    """
    size = flat_size(batch)
    if size is not None:
        return size
    if isinstance(batch, Piece):
        return len(batch.samples)
    known = (len(items) for items in lists(batch) if isinstance(items, Marked) and items.samples)
    size = next(known, graphs_in(batch))
    if size is None:  # first what can be nothing but samples: three channels of an image are not three of them
        size = _listed_size(batch, labelled)
    if size is not None:
        return size
    sizes = {path: tensor.size(0) for path, tensor in tensors(batch) if tensor.dim()}
    if len(set(sizes.values())) == 1:
        return next(iter(sizes.values()))
    size = _listed_size(batch, alike)
    if size is not None:
        return size
    if sizes:
        raise disagreement(sizes)
    raise DataError(
        f"a batch of type {type(batch).__name__} has no batch dimension: it needs a tensor with samples along "
        "dimension 0, or lists with one item a sample that are equally long"
    )


def _listed_size(batch: Any, are_samples: Callable[[Any], bool]) -> int | None:
    """The length of the first list whose items are samples, where the whole batch can be read so."""
    for items in lists(batch):
        if are_samples(items) and AsSamples(batch, len(items)).fits:
            return len(items)
    return None


def split(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """The batch cut along its batch dimension into parts of `sizes` samples; tensors are views, the rest is shared.

    A DataError names the leaf where the batch does not have sum(sizes) samples.
    """
    total = sum(sizes)
    flat = flat_size(batch) == total
    if flat and len(sizes) == 1:
        return [batch]
    if isinstance(batch, Piece):
        return [batch.take(span) for span in spans(sizes)]

    def cut(leaf: Any) -> list[Any]:
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_nested:
            return list(torch.split_with_sizes(leaf, list(sizes)))
        return [_rows(leaf, span) for span in spans(sizes)]

    if isinstance(batch, Tensor) and flat:
        return cut(batch)
    if flat:
        return [rebuild(batch, list(parts)) for parts in zip(*map(cut, children(batch) or ()))]
    return AsSamples(batch, total).checked().parts(batch, cut, len(sizes))


def spans(sizes: Sequence[int]) -> list[range]:
    """The places of the samples of each of several parts, which follow one another."""
    return [range(stop - size, stop) for size, stop in zip(sizes, accumulate(sizes))]


def repeat(batch: Any, size: int) -> Any:
    """`size` samples: those of the batch in order, from the first again where they run out. Tensors are copies."""
    length = batch_size(batch)
    if length == 0:
        raise DataError(f"a batch without samples cannot be repeated to {size}: give one with at least one sample")
    return choose(batch, [position % length for position in range(size)])


def choose(batch: Any, rows: Sequence[int]) -> Any:
    """The samples at `rows`, in that order. Tensors are copies; a DataError where the batch's leaves disagree."""
    if isinstance(batch, Piece):
        return batch.take(rows)
    return AsSamples(batch, batch_size(batch)).checked().parts(batch, lambda leaf: [_rows(leaf, rows)], 1)[0]


def join(batches: Sequence[Any]) -> Any:
    """One batch that holds the samples of all, in order; what has no batch dimension is taken from the first.

    Raises:
        DataError: no batches, structures that differ, or tensors whose shapes do not match; the leaf is named.
    """
    if not batches:
        raise DataError("no batches to join: give at least one")
    if len(batches) == 1:
        return batches[0]
    if isinstance(batches[0], Piece):
        return batches[0].joined(batches[1:])
    return _join([AsSamples(batch, batch_size(batch)) for batch in batches], list(batches), "")


def move(batch: Any, device: torch.device | str, non_blocking: bool = True) -> Any:
    """The batch on `device`. Tensors that are there already are not copied; other objects move by their own `.to`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=non_blocking)
    inside = children(batch)
    if inside is not None:
        return rebuild(batch, [move(child, device, non_blocking) for child in inside])
    return batch.to(device) if callable(getattr(batch, "to", None)) else batch


def nbytes(batch: Any) -> int:
    """Bytes that the tensors of the batch take, wherever they are."""
    return sum(part.nbytes for _, tensor in tensors(batch) for part in dense_parts(tensor))


def _rows(leaf: Any, rows: Sequence[int]) -> Any:
    """The items at `rows` of what is cut: a tensor, a list, a batch of graphs, another library's array."""
    if isinstance(leaf, Tensor):
        return take_rows(leaf, rows)
    if is_list(leaf):
        return rebuild(leaf, [leaf[row] for row in rows])
    if graphs_in(leaf) is None:
        return leaf[list(rows)]
    graphs = leaf.to_data_list()
    return join_graphs(type(leaf), [graphs[row] for row in rows])


def take_rows(tensor: Tensor, rows: Sequence[int] | Tensor) -> Tensor:
    """The rows of a tensor, copied.

    Raises:
        DataError: it is of a layout whose rows cannot be taken.
    """
    if tensor.layout not in (torch.strided, torch.sparse_coo) or tensor.is_nested:
        raise DataError(
            f"a tensor of layout {tensor.layout} cannot be cut into samples: give a dense one, or one of coordinates "
            "(torch.sparse_coo)"
        )
    if not (isinstance(rows, Tensor) and rows.dtype == torch.int64 and rows.device == tensor.device):
        rows = torch.as_tensor(rows, dtype=torch.int64, device=tensor.device)
    return tensor.index_select(0, rows)


def flat_size(batch: Any) -> int | None:
    """The batch size of a tensor, or of a plain container of nothing but batched tensors; None for anything else.

    Nearly every batch is one of these, and this is asked for every micro-batch.
    """
    if isinstance(batch, Tensor):
        leaves: Any = (batch,)
    elif type(batch) is dict:
        leaves = batch.values()
    elif type(batch) in (list, tuple):
        leaves = batch
    else:
        return None
    size: int | None = None
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return None
        rows = leaf.size(0)
        if size is not None and rows != size:
            return None
        size = rows
    return size


def _join(readings: list[AsSamples], nodes: list[Any], path: str) -> Any:
    first = nodes[0]
    if isinstance(first, Tensor):
        if not first.dim():
            return first
        _same(nodes, lambda each: (each.dtype, each.layout, each.shape[1:]), path, "pad them to the same shape")
        return torch.cat(nodes)
    full = all(is_list(node) and len(node) == reading.size for reading, node in zip(readings, nodes))
    if full and any(reading.listed(node) for reading, node in zip(readings, nodes)):
        return rebuild(first, [item for node in nodes for item in node])
    if graphs_in(first) is not None:
        return join_graphs(type(first), [graph for node in nodes for graph in node.to_data_list()])
    if children(first) is None:
        return first
    _same(nodes, lambda node: (kind_of(node), steps(node)), path, "give batches that hold the same parts")
    columns = zip(*(children(node) or () for node in nodes))
    return rebuild(first, [_join(readings, list(column), path + step) for step, column in zip(steps(first), columns)])


def _same(nodes: list[Any], form: Callable[[Any], object], path: str, remedy: str) -> None:
    """Refuses nodes at one place of several batches that are not of one form."""
    first = nodes[0]
    for node in nodes[1:]:
        if isinstance(node, Tensor) is not isinstance(first, Tensor) or form(node) != form(first):
            raise DataError(
                f"batches cannot be joined: {path or 'the batch'} is {_describe(first)} in one and {_describe(node)} "
                f"in another; {remedy}"
            )


def _describe(node: Any) -> str:
    if isinstance(node, Tensor):
        return f"a tensor of shape {tuple(node.shape)} and {node.dtype}"
    return type(node).__name__ if children(node) is None else f"a {type(node).__name__} with {', '.join(steps(node))}"
