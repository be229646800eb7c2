"""How a nested batch is opened, closed and read.

Choices made here:

- Own code rather than `torch.utils._pytree`, which takes a UserDict (a tokenizer's BatchEncoding) or a dataclass for a
  single leaf. Mappings, dataclasses (frozen too), named tuples, lists and tuples are opened, and keep their class.
- A list can be a container of leaves ([inputs, targets]) or hold one item a sample (file names, images of different
  sizes). It is read as the second where its items are alike and as many as the samples, and only where the first
  reading does not fit, or the items are records or hold no tensors. `AsSamples` decides, for a batch that comes alone.
  Where a source gave it, the list's own type says what the source's batches showed (`per_sample.py`).
- What this code does not know (a graph batch, a packed sequence) is a leaf. It cannot be cut, and `uncut` names it.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from autoaccum.errors import DataError

__all__ = [
    "AsSamples",
    "Marked",
    "Piece",
    "alike",
    "children",
    "disagreement",
    "graphs_in",
    "is_list",
    "join_graphs",
    "kind_of",
    "labelled",
    "leaves",
    "lists",
    "marked",
    "plain",
    "rebuild",
    "steps",
    "tensors",
]


class Marked(list[Any]):
    """A list or tuple of which is known what it holds.

    Attributes:
        kind: list or tuple, as it was.
        samples: it holds one item a sample; else parts of one batch, however many samples that has.
    """

    def __init__(self, items: Iterable[Any], kind: type, *, samples: bool) -> None:
        super().__init__(items)
        self.kind, self.samples = kind, samples

    def _make(self, items: Iterable[Any]) -> "Marked":
        """Another one that holds other items, as named tuples have it."""
        return Marked(items, self.kind, samples=self.samples)


@dataclasses.dataclass(init=False, eq=False)
class Piece:
    """A micro-batch that knows the samples in it, as the dataset gave them, beside what the collate function made of
    them.

    A trainer's collator may put two rows into the batch for each sample, or all samples into one row: such a batch
    cannot be cut along its rows. A piece is cut along its samples, and what is cut is collated again. As a dataclass of
    one field it is walked like any batch.
    """

    batch: Any

    def __init__(self, samples: Sequence[Any], collate: Callable[[list[Any]], Any]) -> None:
        """Collates."""
        self.samples, self._collate = list(samples), collate
        self.batch = collate(list(self.samples))

    def take(self, places: Sequence[int]) -> "Piece":
        """The samples at `places`, in that order, collated anew."""
        return Piece([self.samples[place] for place in places], self._collate)

    def joined(self, others: "Sequence[Piece]") -> "Piece":
        """These samples and those of `others`, collated as one batch."""
        return Piece([sample for piece in (self, *others) for sample in piece.samples], self._collate)


def kind_of(node: Any) -> type:
    """The node's type, without a mark."""
    return node.kind if isinstance(node, Marked) else type(node)


def marked(items: Any, *, samples: bool) -> Any:
    """The list or tuple, as one that holds samples, or parts; one of a user's own class stays as it is."""
    kind = kind_of(items)
    return Marked(items, kind, samples=samples) if kind in (list, tuple) else items


def plain(node: Any) -> Any:
    """The batch as the user's code made it, without marks; itself where it has none."""
    inside = children(node)
    if not inside or (type(node) is not Marked and all(type(child) is Tensor for child in inside)):
        return node  # nearly all are such, and this is asked for every micro-batch
    below = [plain(child) for child in inside]
    if isinstance(node, Marked):
        return node.kind(below)
    return rebuild(node, below) if any(new is not old for new, old in zip(below, inside)) else node


def graphs_in(node: Any) -> int | None:
    """Graphs in a batch of them, as PyTorch Geometric joins them into one object; None for anything else."""
    count = getattr(node, "num_graphs", None)
    known = isinstance(count, int) and hasattr(node, "to_data_list") and hasattr(node, "from_data_list")
    return count if known else None


def join_graphs(kind: type, graphs: Sequence[Any]) -> Any:
    """The graphs as one batch of a `kind`, by the class that can join them: its subclasses are made for each sort."""
    joins = next(each for each in kind.__mro__ if "from_data_list" in vars(each))
    return joins.from_data_list(list(graphs))  # type: ignore[attr-defined]


def children(node: Any) -> list[Any] | None:
    """What a container holds, in order; None for a leaf."""
    kind = type(node)
    if kind is list or kind is tuple:  # nearly all are one of these two or a dict, which need no slower question
        return list(node)
    if kind is dict or isinstance(node, Mapping):
        return list(node.values())
    if isinstance(node, (Tensor, str, bytes, PackedSequence, torch.Size)):
        return None
    if isinstance(node, (list, tuple)):
        return list(node)
    is_record = dataclasses.is_dataclass(node) and not isinstance(node, type)
    return [getattr(node, field.name) for field in dataclasses.fields(node)] if is_record else None


def steps(node: Any) -> list[str]:
    """How each of `children(node)` is written behind the node's own path."""
    if isinstance(node, Mapping):
        return [f"[{key!r}]" for key in node]
    if isinstance(node, (list, tuple)):
        names = getattr(node, "_fields", None)
        return [f".{name}" for name in names] if names else [f"[{index}]" for index in range(len(node))]
    return [f".{field.name}" for field in dataclasses.fields(node)]


def rebuild(node: Any, inside: list[Any]) -> Any:
    """A container like `node` that holds `inside` instead."""
    kind = type(node)
    if kind is tuple or kind is list:
        return kind(inside)
    if kind is dict:
        return dict(zip(node, inside))
    if isinstance(node, MutableMapping):
        new: Any = copy.copy(node)  # keeps what a subclass carries beside its items
        for key, child in zip(node, inside):
            new[key] = child
        return new
    if isinstance(node, Mapping):
        return kind(dict(zip(node, inside)))
    if isinstance(node, (list, tuple)):
        return getattr(node, "_make", kind)(inside)
    new = copy.copy(node)
    for field, child in zip(dataclasses.fields(node), inside):
        object.__setattr__(new, field.name, child)  # a frozen dataclass allows no other way
    return new


def leaves(node: Any, path: str = "", whole: Callable[[Any], bool] = lambda node: False) -> Iterator[tuple[str, Any]]:
    """Each leaf with its path, in order: "['input_ids']", "[0].image"; a lone leaf's path is "".

    A node that is `whole` is a leaf, whatever is in it.
    """
    inside = None if whole(node) else children(node)
    if inside is None:
        yield path, node
        return
    for step, child in zip(steps(node), inside) if inside else ():
        yield from leaves(child, path + step, whole)


def tensors(node: Any) -> Iterator[tuple[str, Tensor]]:
    """Each tensor with its path, in order."""
    return ((path, leaf) for path, leaf in leaves(node) if isinstance(leaf, Tensor))


def tensors_in(node: Any) -> list[Tensor]:
    """All tensors, in one and the same order each time."""
    found, waiting = [], [node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Tensor):
            found.append(node)
        else:
            waiting += children(node) or ()
    return found


# What is the same for all samples wherever it stands alone.
_SHARED = (str, bytes, Number, Enum, type, type(None), torch.Size, torch.dtype, torch.device)


class AsSamples:
    """A batch read as `size` samples: which of its leaves are cut, and which go to every part.

    `parts` is a list in it that is read as one of parts.
    """

    def __init__(self, batch: Any, size: int, parts: Any = None) -> None:
        self.batch, self.size, self._parts = batch, size, parts
        # Where one list of tensors must hold one item a sample, others of that length do too: the images beside boxes.
        self._sampled = False
        self._sampled = any(self.listed(items) and _has_tensors(items) for items in lists(batch))

    @property
    def fits(self) -> bool:
        """Whether every leaf can be read so."""
        return self._fits(self.batch)

    def checked(self) -> "AsSamples":
        """Itself, where the batch can be read so, else a DataError that names a leaf."""
        sizes = {path: tensor.size(0) for path, tensor in tensors(self.batch) if tensor.dim()}
        cut = sizes or any(self.listed(items) for items in lists(self.batch)) or graphs_in(self.batch) == self.size
        if self.fits and cut:
            return self
        if len(set(sizes.values())) > 1:
            raise disagreement(sizes)
        path, found = next(iter(sizes.items()), ("", "nothing"))
        raise DataError(
            f"a batch of {self.size} samples was expected, and {path or 'this one'} has {found} along dimension 0: "
            "the sizes to cut it into must sum to its samples"
        )

    def listed(self, node: Any) -> bool:
        """Whether `node` is a list with one item a sample."""
        if isinstance(node, Marked):
            return node.samples and len(node) == self.size
        if node is self._parts or not is_list(node) or not node or len(node) != self.size or not alike(node):
            return False
        if node is self.batch and isinstance(node[0], Tensor):
            return False  # at the top these are inputs and targets, and if they disagree, that is an error
        if _records(node) or not any(tensor.dim() for _, tensor in tensors(node)):
            return True
        if self._sampled and all(isinstance(item, Tensor) for item in node):
            return True
        return not all(self._fits(child) for child in node)

    def parts(self, node: Any, cut: Callable[[Any], list[Any]], count: int) -> list[Any]:
        """`count` structures like `node`: `cut` gives the parts of each batched leaf, and the rest goes to all."""
        if isinstance(node, Tensor):
            return cut(node) if node.dim() else [node] * count
        if self._whole(node):
            return cut(node)
        inside = children(node)
        if inside is None:
            return [node] * count
        columns = [self.parts(child, cut, count) for child in inside]
        return [rebuild(node, [column[index] for column in columns]) for index in range(count)]

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Each leaf that is cut, with its path: a tensor with samples along dimension 0, or a list of samples."""
        for path, leaf in leaves(self.batch, whole=self._whole):
            if leaf.dim() if isinstance(leaf, Tensor) else self.listed(leaf):
                yield path, leaf

    def uncut(self) -> Iterator[tuple[str, Any]]:
        """Each leaf, with its path, that goes whole to every part though it may hold samples: it is not known here."""
        if isinstance(self.batch, Piece):  # which is cut before it is collated, whatever is in it
            return
        for path, leaf in leaves(self.batch, whole=self._whole):
            if not (isinstance(leaf, (Tensor, *_SHARED)) or self._whole(leaf)):
                yield path, leaf

    def _whole(self, node: Any) -> bool:
        """Whether `node` is cut as one: a list of samples, or another library's array or batch of graphs."""
        shape = getattr(node, "shape", None)
        rows = shape[0] if isinstance(shape, tuple) and shape and hasattr(node, "__getitem__") else graphs_in(node)
        return rows == self.size or self.listed(node)

    def _fits(self, node: Any) -> bool:
        if isinstance(node, Tensor):
            return node.dim() == 0 or node.size(0) == self.size
        inside = children(node)
        return inside is None or all(self._fits(child) for child in inside) or self.listed(node)


def is_list(node: Any) -> bool:
    """Whether `node` is a list or a plain tuple, which may hold one item a sample."""
    return isinstance(node, (list, tuple)) and not isinstance(node, torch.Size) and not hasattr(node, "_fields")


def lists(node: Any) -> Iterator[Any]:
    """Every list and plain tuple that is not empty, outer ones first."""
    if is_list(node) and node:
        yield node
    for child in children(node) or ():
        yield from lists(child)


def labelled(items: Any) -> bool:
    """Whether the items can be nothing but samples: alike, and each has a tensor beside a number or a scalar."""
    single = any(
        not item.dim() if isinstance(item, Tensor) else isinstance(item, (int, float)) and not isinstance(item, bool)
        for item in children(items[0]) or ()
    )
    return single and alike(items) and _has_tensors(items)


def alike(items: Any) -> bool:
    """Whether all items of a list are of one structure, as samples are; None stands for anything."""
    return len({_signature(item) for item in items if item is not None}) <= 1


def disagreement(sizes: Mapping[str, int]) -> DataError:
    """The error for leaves, named by their paths, that have different sizes along dimension 0."""
    (path, size), *others = sizes.items()
    other, other_size = next((name, length) for name, length in others if length != size)
    return DataError(
        f"the parts of a batch disagree on its size: {path} has {size} along dimension 0, {other} has {other_size}; "
        "samples must lie along dimension 0 of every tensor, and what is shared must have no dimensions"
    )


def _records(items: Any) -> bool:
    """Whether items that are alike may be samples by their looks: records with tensors, or whatever is `labelled`."""
    return _has_tensors(items) and (labelled(items) or not (is_list(items[0]) or children(items[0]) is None))


def _has_tensors(node: Any) -> bool:
    return next(tensors(node), None) is not None


def _signature(node: Any) -> object:
    if isinstance(node, Tensor):
        return "tensor", node.dim(), node.dtype
    if isinstance(node, (int, float)):
        return "number"
    inside = children(node)
    if inside is None:
        return type(node)
    below = [_signature(child) for child in inside]
    return (kind_of(node), frozenset(below)) if is_list(node) else (type(node), tuple(steps(node)), tuple(below))
