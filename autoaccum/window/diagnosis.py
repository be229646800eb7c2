"""Why an accumulated gradient is not the large batch's: found by trying what would make it so.

The gradients of a few parts of the batch are looked at one by one. If a loss is a mean over something that can be
counted, then gradient × count adds up over the parts; so each count that the batch offers (samples, tokens, elements,
class weights, masks) is tried, and the one that adds up is what should be declared. If none does, but some weights of
the parts' gradients give the whole's, the denominators are at fault all the same. If two counts together explain every
subset of the parts, the loss has two terms. If nothing does, the loss compares samples with one another.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoaccum.data import tree
from autoaccum.errors import DataError, LossError, SetupError
from autoaccum.window.call import targets_in
from autoaccum.window.counting import IGNORED, holds_indices
from autoaccum.window.loss import Objective

__all__ = [
    "COUPLED",
    "DIVIDED_TWICE",
    "NOT_FINITE",
    "RANDOM",
    "SEVERAL",
    "SIZE_BOUND",
    "TOO_LARGE",
    "TOO_SMALL",
    "UNEVEN",
    "Diagnosis",
    "Evidence",
    "Rows",
    "diagnose",
    "ragged",
]

TOO_LARGE = "k times too large"
TOO_SMALL = "k times too small"
UNEVEN = "uneven denominators"
SEVERAL = "several denominators"
DIVIDED_TWICE = "divided twice"
COUPLED = "batch-coupled loss"
SIZE_BOUND = "depends on the batch size"
NOT_FINITE = "not finite in a part"
RANDOM = "randomness"

_LEAF_DIMS = 3  # masks and lengths are counted; images are not


class Diagnosis(NamedTuple):
    """What is wrong, in short; and in words, with what to declare."""

    cause: str
    text: str


class _Count(NamedTuple):
    """Something a mean may run over.

    Attributes:
        name: in words.
        declare: the argument that says so.
        of: counts it in a batch.
    """

    name: str
    declare: str
    of: Callable[[Any], float]


Rows = tuple[int, ...]


def ragged(samples: int) -> tuple[int, int]:
    """Two unequal micro-batches that together have `samples` samples, 2 or more: 8 is 5 + 3."""
    first = samples // 2 + 1 if samples > 2 else 1
    return first, samples - first


class Evidence:
    """The gradients of subsets of the batch, each run when it is first asked for.

    Attributes:
        parts: two or three sets of rows that make up the batch; the last is the second of two micro-batches.
        whole: all rows.
    """

    def __init__(
        self,
        samples: int,
        batch: Callable[[Rows], Any],
        gradient: Callable[[Sequence[Rows]], Tensor],
        tolerance: float,
    ) -> None:
        """Runs nothing.

        Args:
            samples: of the whole batch.
            batch: gives the samples at some rows, on the host.
            gradient: gives the gradient accumulated over micro-batches of these rows, a vector.
            tolerance: relative; what is closer is the same.
        """
        self.whole: Rows = tuple(range(samples))
        first, _ = ragged(samples)
        inner = (first + 1) // 2
        cuts = sorted({0, inner, first, samples})
        self.parts: list[Rows] = [self.whole[start:stop] for start, stop in itertools.pairwise(cuts)]
        self.batch = batch
        self.tolerance = tolerance
        self._gradient = gradient
        self._seen: dict[Rows, Tensor] = {}

    def of(self, rows: Rows) -> Tensor:
        """The gradient of the loss over these samples at once."""
        if rows not in self._seen:
            self._seen[rows] = self._gradient([rows])
        return self._seen[rows]

    @property
    def adds_up(self) -> bool:
        """Whether the accumulated gradient is the plain sum of its parts' gradients: nothing was divided."""
        pieces = [tuple(itertools.chain(*self.parts[:-1])), self.parts[-1]]
        total = torch.stack([self.of(piece) for piece in pieces]).sum(0)
        return self.near(self._gradient(pieces), total, float(total.norm()))

    def near(self, one: Tensor, other: Tensor, scale: float) -> bool:
        """Whether two vectors are the same, within the tolerance of `scale`."""
        return float((one - other).norm()) <= self.tolerance * scale

    def subsets(self, least: int) -> list[Rows]:
        """The unions of `least` parts or more, and the single parts."""
        sizes = [1, *(size for size in range(2, len(self.parts) + 1) if size >= least)]
        chosen = itertools.chain(*(itertools.combinations(self.parts, size) for size in sizes))
        return [tuple(sorted(itertools.chain(*parts))) for parts in chosen]

    def explained(self, *counts: Callable[[Any], float]) -> bool:
        """Whether means over these counts, a term each, would give the gradients that were seen.

        Each part j brings unknown sums a_j, b_j, ... to the gradient of a subset S: Σ a_j / A_S + Σ b_j / B_S + ... With
        more subsets than unknowns, some combinations of the gradients must vanish whatever the sums are; they are the
        left null space of the matrix of 1 / A_S.
        """
        subsets = self.subsets(2 if len(counts) > 1 else len(self.parts))
        amounts = [[count(self.batch(rows)) for count in counts] for rows in subsets]
        unknowns = [
            [1.0 / amount if amount and set(part) <= set(rows) else 0.0 for amount in of for part in self.parts]
            for rows, of in zip(subsets, amounts)
        ]
        matrix = torch.tensor(unknowns, dtype=torch.float64)
        matrix = matrix / matrix.abs().max(dim=0, keepdim=True).values.clamp_min(1e-300)
        u, s, _ = torch.linalg.svd(matrix)
        rank = int((s > 1e-9 * s.max()).sum())
        conditions = u[:, rank:].T
        if not len(conditions):
            return False
        gradients = torch.stack([self.of(rows) for rows in subsets])
        terms = conditions.abs() * gradients.norm(dim=1)
        left = (conditions @ gradients).norm(dim=1)
        return bool((left <= self.tolerance * terms.max(dim=1).values.clamp_min(1e-300)).all())

    def weights(self) -> list[float] | None:
        """Non-negative weights with which the parts' gradients give the whole's; None where there are none."""
        parts = torch.stack([self.of(rows) for rows in self.parts])
        whole = self.of(self.whole)
        scales = parts.norm(dim=1).clamp_min(1e-300)
        solved = torch.linalg.lstsq((parts / scales[:, None]).T, whole[:, None], driver="gelsd").solution[:, 0] / scales
        if parts.shape[1] <= len(self.parts) or bool((solved < -self.tolerance).any()):
            return None
        scale = float((solved * scales).max().clamp_min(whole.norm()))
        return solved.tolist() if self.near(solved @ parts, whole, scale) else None


def diagnose(objective: Objective, evidence: Evidence) -> Diagnosis:
    """The likely cause, and what to declare.

    Args:
        objective: as it was declared.
        evidence: the gradients of parts of a batch on which the accumulated gradient was wrong.
    """
    counts = list(_counts(objective, evidence.batch(evidence.whole)))
    for count in counts:
        if evidence.explained(count.of):
            return _denominator(objective, evidence, count)
    for count in counts:
        if count.declare and evidence.explained(lambda batch, count=count: count.of(batch) ** 2):  # type: ignore[misc]
            return Diagnosis(
                DIVIDED_TWICE,
                f"the loss is divided by {count.name} twice: what is taken for a sum is a mean already.\n"
                f"Return the mean itself with {count.declare}, or the sum of the losses as a Mean's numerator.",
            )
    weights = evidence.weights()
    if weights is not None:
        return _unknown(evidence, weights)
    if len(evidence.parts) > 2:
        for one, other in itertools.combinations(_distinct(counts, evidence), 2):
            if evidence.explained(one.of, other.of):
                return _two_terms(one, other)
    return Diagnosis(
        COUPLED,
        "a batch-coupled loss: no weights of the parts' gradients give the whole's, so it compares samples with one "
        "another (contrastive pairs, triplets, balance between experts, statistics of the batch), and accumulating cannot "
        "be right.\nUse a micro-batch as large as the target batch, or leave that term out of the loss; where it adds "
        "terms with different denominators, return them from step= and declare reduction={name: f(batch)}.",
    )


def _denominator(objective: Objective, evidence: Evidence, count: _Count) -> Diagnosis:
    summed = evidence.adds_up
    remedy = f"Declare {count.declare}."
    if objective.denominators(evidence.batch(evidence.whole)) is None:
        numerator = "the losses' sum, never their mean"
        remedy = (
            f"Return a plain tensor from the step and declare {count.declare}, or return autoaccum.Mean with {numerator}, "
            f"as the numerator and {count.name} as the denominator."
        )
    if not count.declare.startswith("reduction='sum'"):
        if summed:
            return Diagnosis(
                TOO_LARGE, f"k times too large: the loss is a mean over {count.name}, and is not divided.\n{remedy}"
            )
        return Diagnosis(
            UNEVEN,
            f"uneven denominators: the loss is a mean over {count.name}, and is weighted by something else, which makes it "
            f"a mean of means.\n{remedy}",
        )
    if objective.denominators(evidence.batch(evidence.whole)) is None:
        remedy = (
            "Return a plain tensor from the step and declare reduction='sum', or return autoaccum.Mean with a denominator "
            "that grows with the batch."
        )
    return Diagnosis(
        TOO_SMALL,
        f"1/k, k times too small: the loss is a sum over its samples, and is divided as if it were a mean.\n{remedy}",
    )


def _unknown(evidence: Evidence, weights: list[float]) -> Diagnosis:
    shares = ", ".join(f"{weight:.3g}" for weight in weights)
    sizes = ", ".join(str(len(part)) for part in evidence.parts)
    if abs(sum(weights) - 1) > 0.01:
        return Diagnosis(
            SIZE_BOUND,
            f"the loss reads the batch size, or is neither a mean nor a sum: of parts with {sizes} samples the whole's "
            f"gradient takes {shares}, which sum to {sum(weights):.3g} and not to 1.\n"
            "Take the batch size out of the loss, or return autoaccum.Mean(numerator, denominator) from step=.",
        )
    return Diagnosis(
        UNEVEN,
        f"uneven denominators: of parts with {sizes} samples the whole's gradient takes {shares}, which nothing in the "
        "batch counts: the loss makes its own denominator.\n"
        "Return autoaccum.Mean(numerator, denominator) from step=, or declare reduction=f(batch) that counts the same.",
    )


def _two_terms(one: _Count, other: _Count) -> Diagnosis:
    return Diagnosis(
        SEVERAL,
        f"uneven denominators of several terms: a mean over {one.name} is added to one over {other.name}, and a single "
        f"denominator serves both.\nReturn them apart from step=, and declare each: reduction={{name: "
        f"{_short(one)}, other: {_short(other)}}}.",
    )


def _short(count: _Count) -> str:
    return count.declare.removeprefix("reduction=")


def _distinct(counts: Sequence[_Count], evidence: Evidence) -> list[_Count]:
    """Counts of which none is a multiple of another."""
    found: dict[tuple[float, ...], _Count] = {}
    for count in counts:
        amounts = [count.of(evidence.batch(rows)) for rows in evidence.subsets(len(evidence.parts))]
        if count.declare != "reduction='sum'" and amounts[-1] > 0:
            found.setdefault(tuple(round(amount / amounts[-1], 9) for amount in amounts), count)
    return list(found.values())


# --- what can be counted ----------------------------------------------------------------------------------------------

_WORDS = {
    "sample_mean": "the samples",
    "token_mean": "the labels that count",
    "weighted_mean": "the class weights",
    "element_mean": "the elements of the targets",
}


def _counts(objective: Objective, batch: Any) -> Iterator[_Count]:
    """Everything a loss may divide by, the likeliest first."""
    yield _Count("nothing", "reduction='sum'", lambda _: 1.0)
    for reduction in ("sample_mean", "token_mean", "weighted_mean", "element_mean"):
        count = _named(objective, reduction, batch)
        if count is not None:
            yield count
    yield from _of_targets(objective, batch)
    for path, leaf in tree.tensors(batch):
        if 0 < leaf.dim() <= _LEAF_DIMS and not leaf.is_complex():
            yield from _of_leaf(path, leaf)


def _named(objective: Objective, reduction: str, batch: Any) -> _Count | None:
    try:
        other = Objective(objective.model, loss=objective.loss, step=objective.step, reduction=reduction)
        other.denominators(batch)
    except (SetupError, DataError, LossError):
        return None  # not a reduction that this loss or these targets can have

    def of(part: Any) -> float:
        counted = other.denominators(part)
        assert counted is not None
        return counted["loss"]

    return _Count(_WORDS[reduction], f"reduction={reduction!r}", of)


def _of_targets(objective: Objective, batch: Any) -> Iterator[_Count]:
    """Labels without those that are ignored by another number, or shifted away."""
    apart = objective.loss is not None or objective.step is not None
    targets = targets_in(batch, apart=apart)
    if not holds_indices(targets):
        return
    path = next(path for path, leaf in tree.tensors(batch) if leaf is targets)
    for index in (IGNORED, 0, -1, 1, 2):
        yield _lambda(f"the labels other than {index}", path, lambda leaf, index=index: leaf != index, f" != {index}")
        if targets.dim() == 2:
            for cut, words in ((slice(1, None), "[:, 1:]"), (slice(None, -1), "[:, :-1]")):
                yield _lambda(
                    f"the labels{words} other than {index}",
                    path,
                    lambda leaf, index=index, cut=cut: leaf[:, cut] != index,
                    f"{words} != {index}",
                )


def _of_leaf(path: str, leaf: Tensor) -> Iterator[_Count]:
    """The sum of a mask, of lengths or of weights; what in it is not 0; its elements."""
    where = f"batch{path}"
    if bool((leaf >= 0).all()):
        yield _lambda(f"the sum of {where}", path, lambda leaf: leaf, "")
        if leaf.dim() == 2:
            yield _lambda(f"the sum of {where}[:, 1:]", path, lambda leaf: leaf[:, 1:], "[:, 1:]")
    yield _lambda(f"what in {where} is not 0", path, lambda leaf: leaf != 0, " != 0")


def _lambda(name: str, path: str, f: Callable[[Tensor], Tensor], code: str) -> _Count:
    def of(batch: Any) -> float:
        return float(f(dict(tree.tensors(batch))[path]).double().sum())

    inner = f"(batch{path}{code})" if "!=" in code else f"batch{path}{code}"
    return _Count(name, f"reduction=lambda batch: {inner}.sum()", of)
