"""What a divisor read off a loss's graph is, once settled: a count, a constant or a penalty; and how it is read on."""

import collections
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from autoaccum.errors import LossError
from autoaccum.loss.counts import Count
from autoaccum.loss.graph import Number, Term, Way, read

__all__ = ["CLOSE", "DECLARE", "EXACT", "TINY", "TRUSTED", "Divisor", "Rule", "Settled", "Unread", "near"]

CLOSE = 1e-6  # relative: float32 counts weights no closer
TINY = 1e-3  # of the largest count: a floor that only keeps a quotient finite
EXACT = 1e-12  # as float64 and whole numbers do
TRUSTED = 24  # micro-batches in which rules gave what was read, before they are asked instead


def near(one: float, other: float, close: float = CLOSE) -> bool:
    """Whether two divisors are the same, but for rounding."""
    return math.isclose(one, other, rel_tol=close)


class Rule(NamedTuple):
    """A count of the batch, and what it is multiplied by to be the divisor."""

    counted: Count
    scale: float

    def of(self, batch: Any) -> float:
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
        """The divisor of a term of this kind, above 0.

        Raises:
            LossError: it cannot be read this time.
        """
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

    def foretold(self, batch: Any) -> float | None:
        """The count of a batch by the rules, before the model runs; None where there are none, or they differ."""
        amounts = [rule.of(batch) for rule in self.rules]
        return amounts[0] if amounts and all(near(amount, amounts[0]) for amount in amounts) else None

    def check(self, divisor: Number) -> None:
        """Refuses a constant that is another one this time.

        Raises:
            LossError: it is, so that it was a floor, or a count of samples that happened to be alike.
        """
        if not isinstance(divisor, Tensor) and not near(divisor, self.amount):
            raise LossError(
                f"the loss divides by {divisor:g} in this micro-batch, and by {self.amount:g} for all samples tried, "
                f"which seemed a constant: {DECLARE}"
            )

    def count(self, divisor: float, batch: Any, value: Tensor) -> float:
        """What a batch adds to the window's divisor, given its own, and the term's value.

        Raises:
            LossError: that cannot be told, as it may be a floor.
        """
        if divisor == 0:
            self.zero_seen = True
        self.confirmed += 1
        if not self.hides_floor:
            if self.confirmed <= TRUSTED:
                self.rules = [rule for rule in self.rules if near(rule.of(batch), divisor, self.close)]
            return max(divisor - self.offset, 0.0)
        if self.floor and not self.rules:
            self._check_floor(divisor)
            return 0.0 if near(divisor, self.floor) else divisor
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

    def _check_floor(self, divisor: float) -> None:
        """Refuses what is neither a floor that only keeps a quotient finite, nor a count, which is far above it."""
        if not near(divisor, self.floor) and divisor * TINY < self.floor:
            raise LossError(
                f"the loss divides by {divisor:g} in this micro-batch, and by at least {self.floor:g} in all samples "
                f"tried, which seemed a floor: {DECLARE}"
            )

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


_WORDS = {
    "NllLoss": "the total weight of its targets",
    "NllLoss2D": "the total weight of its targets",
    "Mean": "the elements of its mean",
}
DECLARE = (
    "return autoaccum.Mean(numerator, denominator) from step=, or declare reduction=f(batch), the number of what counts"
)


@dataclass
class Settled:
    """How a loss is read from here on."""

    way: Way
    divisors: list[Divisor]

    @property
    def sums(self) -> int:
        """Terms that add up."""
        return sum(divisor.kind == "constant" for divisor in self.divisors)

    @property
    def words(self) -> str:
        """What the terms are divided by."""
        if len(self.divisors) == 1:
            return self.divisors[0].words
        words = collections.Counter(divisor.words for divisor in self.divisors)
        return "; ".join(f"{each} ({number} term{'s' * (number > 1)})" for each, number in words.items())

    def terms(self, loss: Tensor) -> tuple[Term, ...] | None:
        """The loss's terms; None where a compiled function hides them.

        Raises:
            LossError: they are not those that were settled.
        """
        terms = read(loss, self.way)
        names = [term.name for term in terms]
        if names != [divisor.reduction for divisor in self.divisors]:
            if any("Compiled" in name for name in names):
                return None
            raise LossError(
                f"the loss of this micro-batch is made of {', '.join(names) or 'nothing'}, and was of "
                f"{', '.join(divisor.reduction for divisor in self.divisors)} before: compute every term each time, as "
                "0 where nothing counts, or return the terms from step= as autoaccum.Mean(numerator, denominator)"
            )
        return terms


@dataclass(frozen=True)
class Unread:
    """A loss whose divisor cannot be read.

    Attributes:
        why: in words.
        rule: a count by which its values add up all the same; None where none or several do.
        untried: what else counted the same in all samples that were tried, in words.
        bent: whether its graph shows that it is no mean.
        wrong: whether its values add up by nothing that was tried, so that no accumulation of it can be right.
    """

    why: str
    rule: Count | None = None
    wrong: bool = False
    untried: str | None = None
    bent: bool = False
