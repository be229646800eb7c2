"""Why an accumulated gradient is not the large batch's: found by trying what would make it so.

The gradients of a few parts of the batch are looked at one by one. If a loss is a mean over something that can be
counted, then gradient × count adds up over the parts; so each count that the batch offers (counts.py) is tried, and the
one that adds up is what should be declared. If none does, but some weights of the parts' gradients give the whole's,
the denominators are at fault all the same. If two counts together explain every subset of the parts, the loss has two
terms. If nothing does, the loss compares samples with one another.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoaccum.loss.asking import Rows, ragged
from autoaccum.loss.counts import Count, countable
from autoaccum.loss.objective import Objective

__all__ = ["Cause", "Diagnosis", "Evidence", "diagnose"]

_TINY = 1e-300


class Cause:
    """The causes in short, as a report names them."""

    TOO_LARGE = "k times too large"
    TOO_SMALL = "k times too small"
    UNEVEN = "uneven denominators"
    SEVERAL = "several denominators"
    DIVIDED_TWICE = "divided twice"
    COUPLED = "batch-coupled loss"
    SIZE_BOUND = "depends on the batch size"
    NOT_FINITE = "not finite in a part"
    RANDOM = "randomness"


class Diagnosis(NamedTuple):
    """One of the causes, and what it means and asks for, in words."""

    cause: str
    text: str


class Evidence:
    """The gradients of subsets of a batch, each run when it is first asked for.

    Attributes:
        parts: two or three sets of rows that make up the batch.
        whole: all rows.
        tolerance: relative; what is closer is the same.
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
            batch: gives the samples at some rows.
            gradient: gives the gradient accumulated over micro-batches of these rows: a vector in double precision.
            tolerance: relative; what is closer is the same.
        """
        self.whole: Rows = tuple(range(samples))
        first, _ = ragged(samples)
        cuts = sorted({0, (first + 1) // 2, first, samples})
        self.parts: list[Rows] = [self.whole[start:stop] for start, stop in itertools.pairwise(cuts)]
        self.batch, self.tolerance = batch, tolerance
        self._gradient = gradient
        self._seen: dict[Rows, Tensor] = {}

    def of(self, rows: Rows) -> Tensor:
        """The gradient of the loss over these samples at once."""
        if rows not in self._seen:
            self._seen[rows] = self._gradient([rows])
        return self._seen[rows]

    @property
    def cancelled(self) -> float:
        """How many times larger the parts' gradients are than the whole's, to which they add up."""
        parts = math.fsum(float(self.of(part).norm()) * len(part) / len(self.whole) for part in self.parts)
        return parts / max(float(self.of(self.whole).norm()), _TINY)

    @property
    def adds_up(self) -> bool:
        """Whether the accumulated gradient is the plain sum of its parts': nothing was divided."""
        pieces = [tuple(itertools.chain(*self.parts[:-1])), self.parts[-1]]
        total = self.of(pieces[0]) + self.of(pieces[1])
        return float((self._gradient(pieces) - total).norm()) <= self.tolerance * float(total.norm())

    def residual(self, *counts: Callable[[Any], float]) -> float:
        """How far the gradients are from those of a loss whose terms are means over these counts; relative.

        A part j brings unknown sums a_j, b_j, ... to the gradient of a subset S: Σ a_j / A_S + Σ b_j / B_S + ... There
        are more subsets than unknowns, so that some combinations of the gradients must vanish whatever the sums are:
        those in the left null space of the matrix of 1 / A_S.
        """
        subsets = self._subsets(every=len(counts) > 1)
        columns = []
        for count in counts:
            amounts = [count(self.batch(rows)) for rows in subsets]
            for part in self.parts:
                # A part in which nothing counts brings nothing, to no subset.
                counted = amounts[subsets.index(part)] > 0
                if counted and not all(a for a, s in zip(amounts, subsets) if set(part) <= set(s)):
                    return math.inf  # more samples, and none of them counts: a collator made other labels of them
                columns.append([1 / a if counted and set(part) <= set(s) else 0.0 for a, s in zip(amounts, subsets)])
        matrix = torch.tensor(columns, dtype=torch.float64).T
        left, values, _ = torch.linalg.svd(matrix / matrix.amax(dim=0).clamp_min(_TINY))
        conditions = left[:, int((values > 1e-9 * values.max()).sum()) :].T
        if not len(conditions):
            return math.inf
        # Coordinates in an orthonormal basis stand for the long vectors: no precision is lost, as in their products.
        gradients = torch.linalg.qr(torch.stack([self.of(rows) for rows in subsets], dim=1)).R.T
        terms = (conditions.abs() * gradients.norm(dim=1)).amax(dim=1).clamp_min(_TINY)
        return float(((conditions @ gradients).norm(dim=1) / terms).max())

    def _subsets(self, *, every: bool) -> list[Rows]:
        """The parts and the whole; or all unions of parts."""
        sizes = range(1, len(self.parts) + 1) if every else (1, len(self.parts))
        chosen = itertools.chain(*(itertools.combinations(self.parts, size) for size in sizes))
        return [tuple(itertools.chain(*parts)) for parts in chosen]

    def weights(self) -> list[float] | None:
        """Weights above 0 with which the parts' gradients give the whole's; None where there are none."""
        parts = torch.stack([self.of(rows) for rows in self.parts], dim=1)
        whole = self.of(self.whole)
        if len(whole) <= len(self.parts):
            return None  # any vector is some sum of so many others
        scales = parts.norm(dim=0).clamp_min(_TINY)
        terms = torch.linalg.lstsq(parts / scales, whole[:, None], driver="gelsd").solution[:, 0]
        off = float((parts / scales @ terms - whole).norm())
        if off > self.tolerance * float(terms.abs().max()) or bool((terms <= 0).any()):
            return None
        return [float(weight) for weight in terms / scales]


def diagnose(objective: Objective, evidence: Evidence) -> Diagnosis:
    """The likely cause, and what to declare.

    Args:
        objective: as it was declared.
        evidence: the gradients of parts of a batch on which the accumulated gradient was wrong.
    """
    batch = evidence.batch(evidence.whole)
    counts = list(countable(batch, objective.targets(batch)))
    found = _fitting(evidence, counts)
    if found is not None:
        return _declare(objective, evidence, found)
    found = _fitting(evidence, [_squared(count) for count in counts])
    if found is not None:
        return Diagnosis(
            Cause.DIVIDED_TWICE,
            f"divided twice: the loss is divided by {found.name}, and what is divided is their mean already.\n"
            f"Return the mean alone and declare {found.declare}, or a Mean whose numerator is the sum of the losses",
        )
    weights = evidence.weights()
    if weights is not None:
        return _undeclared(evidence, weights)
    if len(evidence.parts) > 2:
        for one, other in itertools.combinations(_distinct(evidence, counts), 2):
            if evidence.residual(one.of, other.of) <= evidence.tolerance:
                return Diagnosis(
                    Cause.SEVERAL,
                    f"several denominators: a mean over {one.name} is added to one over {other.name}, and both are "
                    "weighted alike.\nReturn the terms from step=, and declare each: "
                    f"reduction={{term: {one.how}, other: {other.how}}}",
                )
    return Diagnosis(
        Cause.COUPLED,
        "a batch-coupled loss: it compares samples with one another (contrastive pairs, triplets, balance between "
        "experts, statistics over the batch), as no weights of the parts' gradients give the whole's; accumulating "
        "cannot be right.\nUse a micro-batch as large as the target batch, or keep that term out of the loss; where "
        "it only adds terms with different denominators, return them from step= and declare reduction={term: f(batch)}",
    )


def _squared(count: Count) -> Count:
    return Count(count.name, count.declare, lambda batch: count.of(batch) ** 2)


def _fitting(evidence: Evidence, counts: Sequence[Count]) -> Count | None:
    """The first of the counts that fit as well as the best does."""
    residuals = [evidence.residual(count.of) for count in counts]
    best = min(residuals)
    if best > evidence.tolerance:
        return None
    return next(count for count, own in zip(counts, residuals) if own <= max(3 * best, evidence.tolerance / 100))


def _declare(objective: Objective, evidence: Evidence, count: Count) -> Diagnosis:
    late = objective.denominators(evidence.batch(evidence.whole)) is None
    remedy = f"Declare {count.declare}"
    if late:
        remedy = (
            f"Return a plain tensor from the step and declare {count.declare}, or return autoaccum.Mean(numerator, "
        )
        remedy += (
            "denominator) whose denominator does not grow with the batch"
            if count.sums
            else f"denominator): the sum of the losses, and {count.name}"
        )
    if count.sums:
        return Diagnosis(
            Cause.TOO_SMALL,
            "k times too small (1/k): the loss is a sum over its samples, and is divided as if it were a mean.\n"
            + remedy,
        )
    if evidence.adds_up:
        return Diagnosis(
            Cause.TOO_LARGE,
            f"k times too large: the loss is a mean over {count.name}, and is added up undivided.\n{remedy}",
        )
    return Diagnosis(
        Cause.UNEVEN,
        f"uneven denominators: the loss is a mean over {count.name}, and is weighted by something else, which gives a "
        f"mean of means.\n{remedy}",
    )


def _undeclared(evidence: Evidence, weights: Sequence[float]) -> Diagnosis:
    """Weights were found, but nothing in the batch counts so."""
    sizes = ", ".join(str(len(part)) for part in evidence.parts)
    shares = ", ".join(f"{weight:.3g}" for weight in weights)
    if abs(sum(weights) - 1) <= 10 * evidence.tolerance:
        return Diagnosis(
            Cause.UNEVEN,
            f"uneven denominators: the loss makes its own, as parts of {sizes} samples count {shares}, and nothing in "
            "the batch does.\nReturn autoaccum.Mean(numerator, denominator) from step=, or declare reduction=f(batch) "
            "that counts the same",
        )
    powers = [math.log(w) / math.log(len(p) / len(evidence.whole)) for w, p in zip(weights, evidence.parts)]
    if max(powers) - min(powers) <= 0.02 * max(map(abs, powers)):
        return Diagnosis(
            Cause.SIZE_BOUND,
            f"the loss reads the batch size: it grows with its power {1 - powers[0]:.2g}, as no mean and no sum does.\n"
            "Take the batch size out of the loss, or return autoaccum.Mean(numerator, denominator) from step=",
        )
    return Diagnosis(
        Cause.COUPLED,
        "a batch-coupled loss: a function of a mean (a root, a ratio, a logarithm) and no mean itself, as parts of "
        f"{sizes} samples count {shares}, which sum to {sum(weights):.3g}; accumulating cannot be right.\n"
        "Minimise the mean instead (MSE for RMSE), or use a micro-batch as large as the target batch",
    )


def _distinct(evidence: Evidence, counts: Sequence[Count]) -> list[Count]:
    """Counts of which none is a multiple of another."""
    found: dict[tuple[float, ...], Count] = {}
    for count in counts:
        amounts = [count.of(evidence.batch(rows)) for rows in (*evidence.parts, evidence.whole)]
        if not count.sums and amounts[-1] > 0:
            found.setdefault(tuple(round(amount / amounts[-1], 9) for amount in amounts), count)
    return list(found.values())
