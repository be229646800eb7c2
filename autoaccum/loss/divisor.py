"""What a divisor read off a loss's graph is, once settled: a count, a constant or a penalty."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from autoaccum.errors import LossError
from autoaccum.loss.counts import Count
from autoaccum.loss.graph import Number, Term

__all__ = ["CLOSE", "DECLARE", "EXACT", "TINY", "TRUSTED", "Divisor", "Rule", "near"]

CLOSE = 1e-6  # relative: float32 counts weights no closer
TINY = 1e-3  # of the largest count: a floor that only keeps a quotient finite
EXACT = 1e-12  # as float64 and whole numbers do
TRUSTED = 24  # micro-batches in which rules gave what was read, before they are asked instead
DECLARE = (
    "return autoaccum.Mean(numerator, denominator) from step=, or declare reduction=f(batch), the number of what counts"
)
_WORDS = {
    "NllLoss": "the total weight of its targets",
    "NllLoss2D": "the total weight of its targets",
    "Mean": "the elements of its mean",
}


def near(one: float, other: float, close: float = CLOSE) -> bool:
    """Whether two divisors are the same, but for rounding."""
    return math.isclose(one, other, rel_tol=close)


class Rule(NamedTuple):
    """A count of the batch, and what it is multiplied by to be the divisor."""

    counted: Count
    scale: float

    def of(self, batch: object) -> float:
        """The divisor of a batch."""
        return self.counted.of(batch) * self.scale


@dataclass
class Divisor:
    """What one term's divisor is.

    Attributes:
        reduction: the node's name.
        kind: "count", "constant" or "penalty".
        amount: what a constant is.
        offset: what is added to the count.
        floor: what it never falls below.
        scaled: whether the term's factor changes with the samples, and belongs to the divisor.
        divided: whether somebody divided beside the reduction, so that a floor may hide.
        close: how closely it was seen to add up, relative.
        zero_seen: whether a divisor of 0 was seen, which no floor would leave.
        rules: counts that gave every divisor so far; those that give another one later are struck off.
        confirmed: micro-batches in which they gave what was read.
    """

    reduction: str
    kind: str
    amount: float = 0.0
    offset: float = 0.0
    floor: float = 0.0
    scaled: bool = False
    divided: bool = False
    zero_seen: bool = False
    close: float = CLOSE
    rules: list[Rule] = field(default_factory=list)
    confirmed: int = 0

    def of(self, term: Term) -> Number:
        """The divisor of a term of this kind, above 0; a LossError where it cannot be read this time."""
        own, factor = term.divisor, term.factor
        if own is None:
            raise LossError(
                f"the loss of this micro-batch ends in {term.name}, which was a plain sum or mean before: {DECLARE}"
            )
        if self.scaled and (isinstance(factor, Tensor) or factor):
            own = own / factor
        return own.abs() if isinstance(own, Tensor) else abs(own)

    @property
    def hides_floor(self) -> bool:
        """Whether a divisor may be a floor rather than a count."""
        return self.kind == "count" and self.divided and not self.zero_seen and not self.offset

    @property
    def trusted(self) -> bool:
        """Whether the rules have been right often enough to be asked instead of the graph."""
        return self.kind != "count" or (bool(self.rules) and self.confirmed >= TRUSTED)

    def foretold(self, batch: object) -> float | None:
        """The count of a batch by the rules, before the model runs; None where there are none, or they differ."""
        amounts = [rule.of(batch) for rule in self.rules]
        return amounts[0] if amounts and all(near(amount, amounts[0]) for amount in amounts) else None

    def check(self, divisor: Number) -> None:
        """Refuses a constant that is another one this time: it was a floor, or samples happened to count alike."""
        if not isinstance(divisor, Tensor) and not near(divisor, self.amount):
            raise LossError(
                f"the loss divides by {divisor:g} in this micro-batch, and by {self.amount:g} for all samples tried, "
                f"which seemed a constant: {DECLARE}"
            )

    def count(self, divisor: float, batch: object, value: Tensor) -> float:
        """What a batch adds to the window's divisor, given its own, and the term's value.

        Raises:
            LossError: that cannot be told, as it may be a floor.
        """
        self.zero_seen = self.zero_seen or divisor == 0
        self.confirmed += 1
        if not self.hides_floor:
            if self.confirmed <= TRUSTED:
                self.rules = [rule for rule in self.rules if near(rule.of(batch), divisor, self.close)]
            return max(divisor - self.offset, 0.0)
        if self.floor and not self.rules:
            if near(divisor, self.floor):
                return 0.0
            if divisor * TINY < self.floor:  # a count is far above a floor that only keeps a quotient finite
                raise LossError(
                    f"the loss divides by {divisor:g} in this micro-batch, and by at least {self.floor:g} in all "
                    f"samples tried, which seemed a floor: {DECLARE}"
                )
            return divisor
        return self._count_or_floor(divisor, batch, value)

    def _count_or_floor(self, divisor: float, batch: object, value: Tensor) -> float:
        """Of a divisor that may be a floor: a count by the rules, or, where these are below it, the floor."""
        amounts = [(rule, rule.of(batch)) for rule in self.rules]
        given = [rule for rule, amount in amounts if near(amount, divisor, self.close)]
        below = [rule for rule, amount in amounts if amount < divisor]
        self.rules = given or (below if not self.floor or near(divisor, self.floor) else [])
        kept = [amount for rule, amount in amounts if rule in self.rules]
        if given or (not kept and not self.floor and divisor and float(value.detach())):
            return divisor
        if not kept and not self.floor:
            raise LossError(
                f"the loss of a micro-batch is 0, and divides by {divisor:g}, which may be a floor such as "
                f"clamp(min=1), and no count: {DECLARE}"
            )
        if not kept or not all(near(amount, kept[0]) for amount in kept):
            raise LossError(
                f"the loss divides by {divisor:g} in this micro-batch, where {amounts[0][0].counted.name}, by which it "
                f"divided before, would be {amounts[0][1]:g}: {DECLARE}"
            )
        self.floor = divisor
        return kept[0]

    def whole(self, total: float) -> float:
        """What the loss of all samples is divided by, of the sum of its parts' counts."""
        return max(total + self.offset, self.floor) if self.kind == "count" else total

    @property
    def words(self) -> str:
        """What it is, for a reader."""
        if self.kind == "constant":
            return "adds up"
        if self.kind == "penalty":
            return "counts once, whatever the samples"
        more = f" + {self.offset:.3g}" if self.offset else ""
        more += f", at least {self.floor:g}" if self.floor else ""
        what = self.rules[0].counted.name if self.rules else _WORDS.get(self.reduction, "what it divides its sum by")
        return f"divides by {what}{more}"
