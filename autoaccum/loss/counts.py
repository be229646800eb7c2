"""What can be counted in a batch: samples, labels, elements, masks; each with the words that declare it.

Counted where the targets lie: on the host for batches that wait there, so that nothing waits for the device.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoaccum.data import tree
from autoaccum.data.structure import AsSamples
from autoaccum.errors import DataError, LossError, shown

__all__ = [
    "CUTS", "IGNORED", "Count", "as_denominator", "as_number", "countable", "elements", "holds_indices",
    "ignored_by", "other_than", "samples", "tokens",
]  # fmt: skip

IGNORED = -100  # torch's default ignore_index, which Transformers keeps

_PADDING = (IGNORED, 0, -1, 1, 2, 255)  # what padding is labelled with
_MOST_DIMS = 2  # masks, lengths and weights have no more


def holds_indices(targets: Any) -> bool:
    """Whether `targets` are class indices: a tensor of integers."""
    return isinstance(targets, Tensor) and not (
        targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
    )


def samples(batch: Any) -> float:
    """Samples in `batch`."""
    return float(tree.batch_size(batch))


def tokens(targets: Tensor, ignore_index: int = IGNORED) -> float:
    """Class indices in `targets`, of any shape, other than `ignore_index`."""
    if ignore_index < 0 and targets.numel() and targets.min().item() > ignore_index:
        return float(targets.numel())  # the common case, at half the cost
    return float(torch.count_nonzero(targets.ne(ignore_index)))


def elements(targets: Any) -> float:
    """Numbers in `targets`; a DataError where they are no tensor."""
    if not isinstance(targets, Tensor):
        raise DataError(
            f"the targets are a {type(targets).__name__}, whose elements cannot be counted: make them a tensor, "
            "or declare reduction=f(batch)"
        )
    return float(targets.numel())


def as_denominator(value: Any, source: str) -> float:
    """`value`, which `source` gave, as a denominator: finite, 0 or above; a LossError for anything else."""
    number = as_number(value, source, "a denominator is what the mean loss was divided by")
    if isinstance(value, bool) or not (math.isfinite(number) and number >= 0):
        raise LossError(
            f"{source} gave {shown(value)}, a {type(value).__name__}: a denominator is finite and not negative, and 0 "
            "only where nothing in the batch counts"
        )
    return number


def as_number(value: Any, source: str, meaning: str) -> float:
    """`value`, which `source` gave, as one number; a tensor of one element is read. A LossError for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()  # an error of the device's, which may come here, stays what it is
    try:
        if not isinstance(value, (str, Tensor)):
            return float(value)
    except (OverflowError, TypeError, ValueError):
        pass
    kind = type(value).__name__ + (f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "")
    raise LossError(f"{source} gave {shown(value)}, a {kind}, and not one number: {meaning}")


class Count(NamedTuple):
    """Something a mean may run over: its name, the argument that declares it, and what counts it in a batch."""

    name: str
    declare: str
    of: Callable[[Any], float]


def countable(batch: Any, targets: Any) -> Iterator[Count]:
    """Everything that could be counted in `batch`, on the host, the likeliest first.

    `targets`: those of its tensors that are compared with the outputs; None where that is not clear.
    """
    yield Count("the samples", "reduction='sample_mean'", samples)
    leaves = AsSamples(batch, tree.batch_size(batch)).leaves()
    for path, leaf in sorted(leaves, key=lambda each: each[1] is not targets):
        if not isinstance(leaf, Tensor):
            yield from _rows(path, leaf)
        elif not leaf.is_nested:
            if leaf is targets:
                yield from _labels(path, leaf)
            elif leaf.dim() > 1:
                code = f"batch{path}.numel()"
                yield Count(code, f"reduction=lambda batch: {code}", _elements(path))
            if 0 < leaf.dim() <= _MOST_DIMS and not leaf.is_complex() and leaf.layout == torch.strided:
                yield from _marks(path, leaf)


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda leaf: leaf,
    "[:, 1:]": lambda leaf: leaf[:, 1:],
    "[:, :-1]": lambda leaf: leaf[:, :-1],
    "[:, 2:]": lambda leaf: leaf[:, 2:],
}
"""The columns of labels that a head may count: it shifts the others away."""


def other_than(ignore_index: int, cut: str = "") -> str:
    """In words: the targets that count."""
    return f"the targets{cut} other than {ignore_index}"


def ignored_by(loss: Any) -> int:
    """The class index that a loss says it ignores."""
    index = getattr(loss, "ignore_index", None)
    return IGNORED if index is None else int(index)


def _labels(path: str, labels: Tensor) -> Iterator[Count]:
    """Labels: those that are not ignored, by whatever number, nor shifted away; or all of them."""
    if holds_indices(labels):
        for index in sorted(_PADDING, key=lambda index: not bool((labels == index).any())):  # what occurs, first
            for cut in CUTS if labels.dim() == 2 else [""]:
                usual = "reduction='token_mean'" if index == IGNORED and not cut else ""
                yield _marked(path, cut, "!=", index, other_than(index, cut), usual)
    yield Count("the elements of the targets", "reduction='element_mean'", _elements(path))


def _marks(path: str, leaf: Tensor) -> Iterator[Count]:
    """The sum of a mask, of lengths or of weights; what in it is not 0."""
    negative = bool((leaf < 0).any())
    if not negative:
        yield from (_marked(path, cut) for cut in (["", "[:, 1:]"] if leaf.dim() == 2 else [""]))
    yield from (_marked(path, "", sign) for sign in (["!=", "==", ">"] if negative else ["!=", "=="]))


_COMPARED: dict[str, Callable[[Tensor, int], Tensor]] = {"!=": torch.ne, "==": torch.eq, ">": torch.gt}


def _marked(path: str, cut: str, sign: str = "", number: int = 0, name: str = "", declare: str = "") -> Count:
    """A count as one would write it in a lambda: cut a leaf, compare it with a number or not, and sum."""
    code = f"(batch{path}{cut} {sign} {number}).sum()" if sign else f"batch{path}{cut}.sum()"

    def of(batch: Any) -> float:
        leaf = CUTS[cut](_at(batch, path))
        if sign:
            leaf = _COMPARED[sign](leaf, number)
        return float(leaf.sum() if leaf.dtype.is_floating_point and leaf.dtype.itemsize > 4 else leaf.double().sum())

    return Count(name or code, declare or f"reduction=lambda batch: {code}", of)


def _rows(path: str, items: Any) -> Iterator[Count]:
    """The rows of all samples together, of whatever each has in a list: boxes, points, key points."""
    for inner in dict.fromkeys(at for item in items for at, leaf in tree.tensors(item) if leaf.dim()):
        yield Count(
            f"the rows of sample{inner} in batch{path}",
            f"reduction=lambda batch: sum(len(sample{inner}) for sample in batch{path})",
            lambda batch, inner=inner: float(  # type: ignore[misc]
                sum(len(leaf) for item in _at(batch, path) for at, leaf in tree.tensors(item) if at == inner)
            ),
        )


def _at(batch: Any, path: str) -> Any:
    """The tensor, or the list of samples, at `path`."""
    return next(leaf for at, leaf in AsSamples(batch, tree.batch_size(batch)).leaves() if at == path)


def _elements(path: str) -> Callable[[Any], float]:
    return lambda batch: float(_at(batch, path).numel())
