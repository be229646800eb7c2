"""What a loss may be divided by: everything that a batch lets one count, each with the words that declare it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoaccum.data import tree
from autoaccum.data.structure import Reading
from autoaccum.loss.counting import IGNORED, holds_indices

__all__ = ["CUTS", "Count", "countable"]

_IGNORED = (IGNORED, 0, -1, 1, 2, 255)  # what padding is labelled with
_MOST_DIMS = 2  # masks, lengths and weights have no more


class Count(NamedTuple):
    """Something a mean may run over.

    Attributes:
        name: in words.
        declare: the argument that says so: "reduction='token_mean'".
        of: counts it in a batch.
    """

    name: str
    declare: str
    of: Callable[[Any], float]

    @property
    def sums(self) -> bool:
        """Whether it stands for a sum, which is divided by nothing."""
        return self.declare == "reduction='sum'"

    @property
    def how(self) -> str:
        """The argument's value."""
        return self.declare.removeprefix("reduction=")


def countable(batch: Any, targets: Any) -> Iterator[Count]:
    """Everything that could be counted in `batch`, the likeliest first.

    Args:
        batch: its tensors lie on the host, best.
        targets: those of its tensors that are compared with the outputs; None where that is not clear.
    """
    size = tree.batch_size(batch)
    yield Count("nothing", "reduction='sum'", lambda _: 1.0)
    yield Count("the samples", "reduction='sample_mean'", lambda part: float(tree.batch_size(part)))
    leaves = list(Reading(batch, size).leaves())
    paths = {id(leaf): path for path, leaf in leaves}
    if isinstance(targets, Tensor) and id(targets) in paths:
        yield from _labels(targets, paths[id(targets)])
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            yield from _rows(path, leaf)
            continue
        if leaf.dim() > 1 and not leaf.is_nested:
            yield Count(f"the elements of batch{path}", f"reduction=lambda batch: batch{path}.numel()", _elements(path))
        if 0 < leaf.dim() <= _MOST_DIMS and not leaf.is_complex() and not leaf.is_nested:
            yield from _leaf(path, leaf)


def _labels(labels: Tensor, path: str) -> Iterator[Count]:
    """Labels: those that are not ignored, by whatever number, nor shifted away; or all of them."""
    if not holds_indices(labels):
        yield Count("the elements of the targets", "reduction='element_mean'", _elements(path))
        return
    for index in sorted(_IGNORED, key=lambda index: not bool((labels == index).any())):  # what occurs, first
        usual = "reduction='token_mean'" if index == IGNORED else None
        yield _written(f"the labels other than {index}", path, "", f" != {index}", usual)
        if labels.dim() == 2:
            yield _written(f"the labels from the second on other than {index}", path, "[:, 1:]", f" != {index}")
            yield _written(f"the labels up to the last but one other than {index}", path, "[:, :-1]", f" != {index}")
            yield _written(f"the labels from the third on other than {index}", path, "[:, 2:]", f" != {index}")
    yield Count("the elements of the targets", "reduction='element_mean'", _elements(path))


def _leaf(path: str, leaf: Tensor) -> Iterator[Count]:
    """The sum of a mask, of lengths or of weights; what in it is not 0."""
    if bool((leaf >= 0).all()):
        yield _written(f"the sum of batch{path}", path, "", "")
        if leaf.dim() == 2:
            yield _written(f"the sum of batch{path}[:, 1:]", path, "[:, 1:]", "")
    yield _written(f"what in batch{path} is not 0", path, "", " != 0")
    yield _written(f"what in batch{path} is 0", path, "", " == 0")
    if bool((leaf < 0).any()):
        yield _written(f"what in batch{path} is above 0", path, "", " > 0")


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
    return next(leaf for at, leaf in Reading(batch, tree.batch_size(batch)).leaves() if at == path)


def _elements(path: str) -> Callable[[Any], float]:
    return lambda batch: float(_at(batch, path).numel())


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda leaf: leaf,
    "[:, 1:]": lambda leaf: leaf[:, 1:],
    "[:, 2:]": lambda leaf: leaf[:, 2:],
    "[:, :-1]": lambda leaf: leaf[:, :-1],
}


_COMPARED: dict[str, Callable[[Tensor, int], Tensor]] = {"!=": torch.ne, "==": torch.eq, ">": torch.gt}


def _written(name: str, path: str, cut: str, compared: str, declare: str | None = None) -> Count:
    """A count as one would write it in a lambda: cut a leaf, compare it with a number or not, and sum."""
    sign, _, number = compared.strip().partition(" ")

    def of(batch: Any) -> float:
        leaf = CUTS[cut](_at(batch, path))
        if sign:
            leaf = _COMPARED[sign](leaf, int(number))
        return float(leaf.sum() if leaf.dtype.is_floating_point and leaf.dtype.itemsize > 4 else leaf.double().sum())

    code = f"(batch{path}{cut}{compared})" if compared else f"batch{path}{cut}"
    return Count(name, declare or f"reduction=lambda batch: {code}.sum()", of)
