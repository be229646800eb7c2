"""What a loss may be divided by: everything that a batch lets one count, each with the words that declare it."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from autoaccum.data import tree
from autoaccum.data.structure import Reading
from autoaccum.errors import DataError, LossError, SetupError, shown
from autoaccum.loss.call import targets_in
from autoaccum.loss.counting import IGNORED, holds_indices
from autoaccum.loss.objective import Objective

__all__ = ["Count", "countable"]

_NAMED = {
    "sample_mean": "the samples",
    "token_mean": "the labels that count",
    "weighted_mean": "the class weights",
    "element_mean": "the elements of the targets",
}
_IGNORED = (IGNORED, 0, -1, 1, 2)  # what padding is labelled with
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


def countable(objective: Objective, batch: Any) -> Iterator[Count]:
    """Everything that could be counted in `batch`, the likeliest first."""
    yield Count("nothing", "reduction='sum'", lambda _: 1.0)
    for reduction, name in _NAMED.items():
        count = _named(objective, reduction, name, batch)
        if count is not None:
            yield count
    yield from _labels(objective, batch)
    for path, leaf in Reading(batch, tree.batch_size(batch)).leaves():
        if not isinstance(leaf, Tensor):
            yield from _rows(path, leaf)
        elif leaf.dim() <= _MOST_DIMS and not leaf.is_complex():
            yield from _leaf(path, leaf)


def _named(objective: Objective, reduction: str, name: str, batch: Any) -> Count | None:
    """A reduction that has a name; None where this loss or these targets cannot have it."""
    try:
        other = Objective(objective.model, loss=objective.loss, step=objective.step, reduction=reduction)
        other.denominators(batch)
    except (SetupError, DataError, LossError):
        return None

    def of(part: Any) -> float:
        (amount,) = (other.denominators(part) or {}).values()
        return amount

    return Count(name, f"reduction={shown(reduction)}", of)


def _labels(objective: Objective, batch: Any) -> Iterator[Count]:
    """Labels without those that are ignored by another number, or shifted away."""
    labels = targets_in(batch, apart=objective.loss is not None or objective.step is not None)
    if not holds_indices(labels):
        return
    path = next(path for path, leaf in tree.tensors(batch) if leaf is labels)
    for index in _IGNORED:
        yield _written(f"the labels other than {index}", path, "", lambda leaf: leaf, f" != {index}")
        if labels.dim() == 2:
            yield _written(
                f"the labels from the second on other than {index}", path, "[:, 1:]", _behead, f" != {index}"
            )
            yield _written(
                f"the labels up to the last but one other than {index}", path, "[:, :-1]", _curtail, f" != {index}"
            )


def _leaf(path: str, leaf: Tensor) -> Iterator[Count]:
    """The sum of a mask, of lengths or of weights; what in it is not 0."""
    if bool((leaf >= 0).all()):
        yield _written(f"the sum of batch{path}", path, "", lambda leaf: leaf, "")
        if leaf.dim() == 2:
            yield _written(f"the sum of batch{path}[:, 1:]", path, "[:, 1:]", _behead, "")
    yield _written(f"what in batch{path} is not 0", path, "", lambda leaf: leaf, " != 0")


def _rows(path: str, items: Any) -> Iterator[Count]:
    """The rows of all samples together, of whatever each has in a list: boxes, points, key points."""
    for inner in dict.fromkeys(at for item in items for at, leaf in tree.tensors(item) if leaf.dim()):
        name = f"the rows of sample{inner} in batch{path}"
        yield Count(
            name,
            f"reduction=lambda batch: sum(len(sample{inner}) for sample in batch{path})",
            lambda batch, inner=inner: float(  # type: ignore[misc]
                sum(len(leaf) for item in _at(batch, path) for at, leaf in tree.tensors(item) if at == inner)
            ),
        )


def _at(batch: Any, path: str) -> Any:
    """The list of samples at `path`."""
    return next(leaf for at, leaf in Reading(batch, tree.batch_size(batch)).leaves() if at == path)


def _behead(leaf: Tensor) -> Tensor:
    return leaf[:, 1:]


def _curtail(leaf: Tensor) -> Tensor:
    return leaf[:, :-1]


def _written(name: str, path: str, index: str, cut: Callable[[Tensor], Tensor], unlike: str) -> Count:
    """A count as one would write it in a lambda: cut a leaf, compare it with a number or not, and sum."""
    excluded = int(unlike.removeprefix(" != ")) if unlike else None

    def of(batch: Any) -> float:
        leaf = cut(next(leaf for at, leaf in tree.tensors(batch) if at == path))
        return float((leaf if excluded is None else leaf != excluded).double().sum())

    code = f"(batch{path}{index}{unlike})" if unlike else f"batch{path}{index}"
    return Count(name, f"reduction=lambda batch: {code}.sum()", of)
