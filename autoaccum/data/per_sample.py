"""Which lists in a source's batches hold one item a sample, and which hold parts of one batch: settled once.

Three RGB images in a list beside three labels look like three inputs of three samples. One batch does not tell, and no
batch is read by itself where others of the source can be: between two batches of different sizes, what grew holds one
item a sample, and a list that stayed as long as it was holds parts. What was settled is written into the batch, by the
lists' own type (`structure.Marked`), so that whoever cuts it later reads it so.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from autoaccum.data import tree
from autoaccum.data.structure import AsSamples, Piece, alike, children, is_list, marked, rebuild, steps
from autoaccum.errors import DataError

__all__ = ["ListReader"]

_TRIED = (2, 3, 5, 9)  # samples in batches made to be compared; a collate function may drop some


_Outline = dict[str, tuple[bool, int | None]]
"""A batch without its data, by path: whether it is a list, and its length; of a tensor, its size along dimension 0."""


class ListReader:
    """Reads the lists of one source's batches, each always in the same way."""

    def __init__(self) -> None:
        self._asked = False
        self._per_sample: dict[str, bool] = {}  # by the list's path
        self._seen: list[_Outline] = []

    def read(self, batch: Any, other: Callable[[int], Any] | None = None) -> Any:
        """The batch, with every list that could be mistaken marked as what it is.

        `other` makes a batch of about so many samples; None where batches can only be taken as they come. A DataError
        where a list can be read either way, and no other batch tells which is meant.
        """
        if tree.flat_size(batch) is not None or isinstance(batch, Piece):  # a piece is cut along samples that it knows
            return batch
        unsettled = [path for path, _ in self._lists(batch, "") if path not in self._per_sample]
        if unsettled:
            self._settle(batch, other)
            for path, node in self._lists(batch, ""):
                if path not in self._per_sample and _ambiguous(batch, node):
                    raise DataError(_ASK.format(path=path or "the batch", count=len(node)))
        return self._marked(batch, "", self._samples(batch)) if self._per_sample else batch

    def look(self, batch: Any, *, sure: bool = False) -> None:
        """Takes in a batch that is compared with those to be read; of those before it, two are kept.

        `sure`: it was made to differ from the others in its samples, so that what stayed as it was belongs to none.
        """
        outline = dict(_outline(batch, ""))
        for before in self._seen:
            self._per_sample.update(_grown(before, outline, sure=sure))
        if outline not in self._seen:
            self._seen = [*self._seen[-1:], outline]

    def _lists(self, node: Any, path: str) -> Iterator[tuple[str, Any]]:
        """Each list with its path, but those inside one sample's item."""
        inside = children(node)
        if inside is None:
            return
        if is_list(node) and node:
            yield path, node
            if self._per_sample.get(path):
                return
        for step, child in zip(steps(node), inside):
            yield from self._lists(child, path + step)

    def _settle(self, batch: Any, other: Callable[[int], Any] | None) -> None:
        if other is None or self._asked:
            self.look(batch)
            return
        self._asked = True
        for size in _TRIED:
            try:
                made = other(size)
            except DataError:  # a collate function may want more at once: the next size, or the batches that come
                continue
            if made is not None:  # else all were dropped
                self.look(made, sure=True)
            if all(path in self._per_sample for path, _ in self._lists(batch, "")):
                return

    def _samples(self, batch: Any) -> int | None:
        """Samples in the batch: of the lists known to hold them, or else along the tensors."""
        known = (len(node) for path, node in self._lists(batch, "") if self._per_sample.get(path))
        return next(known, next((tensor.size(0) for _, tensor in tree.tensors(batch) if tensor.dim()), None))

    def _marked(self, node: Any, path: str, samples: int | None) -> Any:
        inside = children(node)
        if not inside:
            return node
        own = self._per_sample.get(path) if is_list(node) else None
        if own:
            return marked(node, samples=True)
        below = [self._marked(child, path + step, samples) for step, child in zip(steps(node), inside)]
        if any(new is not old for new, old in zip(below, inside)):
            node = rebuild(node, below)
        # Longer or shorter than the samples, it cannot be mistaken, and stays of its own type.
        mistaken = own is False and len(node) == samples and alike(node)
        return marked(node, samples=False) if mistaken else node


_ASK = (
    "{path} of the batch is a list of {count} items, and can be read as {count} samples or as {count} parts that each "
    "hold all samples; no batch of another size tells which is meant. Stack what belongs to samples into one tensor, "
    "or name parts by a dict; or give the samples in a Dataset, from which batches of any size can be made"
)


def _outline(node: Any, path: str) -> Iterator[tuple[str, tuple[bool, int | None]]]:
    inside = children(node) or ()
    size = len(inside) if is_list(node) else node.size(0) if isinstance(node, Tensor) and node.dim() else None
    yield path, (is_list(node), size)
    for step, child in zip(steps(node), inside) if inside else ():
        yield from _outline(child, path + step)


def _grown(before: _Outline, after: _Outline, *, sure: bool) -> dict[str, bool]:
    """Of each list in both: whether it holds one item a sample. Empty where nothing, or more than one thing, grew."""
    lists: dict[str, bool] = {}
    sizes: set[tuple[int, int]] = set()
    passed: tuple[str, ...] = ()  # what paths begin with that are not compared
    for path, (listed, one) in before.items():  # outer ones first
        if path not in after or path.startswith(passed):
            continue
        listed_after, other = after[path]
        grew = one != other
        if listed == listed_after:
            if listed:
                lists[path] = grew
            if one is not None and other is not None and (grew or not listed):
                sizes.add((one, other))
        if listed != listed_after or (listed and grew):  # what is inside belongs to single samples
            passed += (f"{path}[", f"{path}.")
    if sure:
        sizes = {(one, other) for one, other in sizes if one != other}
    return lists if len(sizes) == 1 and not any(one == other for one, other in sizes) else {}


def _ambiguous(batch: Any, items: Any) -> bool:
    """Whether the items could be samples, and parts of as many samples too."""
    if items is batch and isinstance(items[0], Tensor):
        return False  # inputs and targets
    held = [[tensor for _, tensor in tree.tensors(item)] for item in items]
    rows = {tensor.size(0) if tensor.dim() else None for tensors in held for tensor in tensors}
    return all(held) and rows == {len(items)} and alike(items) and AsSamples(batch, len(items), parts=items).fits
