"""What a divisor read off a loss's graph is, once settled: a count, a constant or a penalty."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from autoaccum.errors import LossError
from autoaccum.loss.counts import Count
from autoaccum.loss.graph import Number, Term

__all__ = ["DECLARE", "TINY", "TRUSTED", "Divisor", "near"]

TINY = 1e-3  # of the largest count: a floor that only keeps a quotient finite
TRUSTED = 24  # micro-batches in which rules gave what was read, before they are asked instead
DECLARE = (
    "return autoaccum.Mean(numerator, denominator) from step=, or declare reduction=f(batch), the number of what counts"
)
_WORDS = {
    "NllLoss": "the total weight of its targets",
    "NllLoss2D": "the total weight of its targets",
    "Mean": "the elements of its mean",
}


def near(one: float, other: float, close: float = 1e-6) -> bool:
    """Whether two divisors are the same, but for rounding: float32 counts weights no closer."""
    return math.isclose(one, other, rel_tol=close)


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
        hides_floor: whether a divisor may be a floor rather than a count: somebody divided beside the reduction, and
            none was 0 yet.
        rules: counts of the batch that gave every divisor so far; those that give another one later are struck off.
        confirmed: micro-batches in which they gave what was read.
    """

    reduction: str
    kind: str = "count"
    amount: float = 0.0
    offset: float = 0.0
    floor: float = 0.0
    scaled: bool = False
    hides_floor: bool = False
    rules: list[Count] = field(default_factory=list)
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
        self.confirmed += 1
        self.hides_floor = self.hides_floor and divisor > 0
        if not self.hides_floor:
            if self.confirmed <= TRUSTED:
                self.rules = [rule for rule in self.rules if near(rule.of(batch), divisor)]
            return max(divisor - self.offset, 0.0)
        amounts = [(rule, rule.of(batch)) for rule in self.rules]
        given = [rule for rule, amount in amounts if near(amount, divisor)]
        under = [rule for rule, amount in amounts if amount < divisor and rule not in given]
        at_floor = not self.floor or near(divisor, self.floor)
        if given and under and self.floor and at_floor:  # where nothing counts, the term is 0
            given = given if float(value.detach()) else []
        self.rules = given or (under if at_floor else [])
        if given:
            return divisor
        below = self.foretold(batch)
        if below is not None:
            self.floor = divisor
            return below
        if self.floor and not amounts and (at_floor or divisor * TINY >= self.floor):
            return 0.0 if at_floor else divisor  # a count is far above a floor that only keeps a quotient finite
        if not self.floor and not self.rules and float(value.detach()):
            return divisor
        raise LossError(
            f"the loss divides by {divisor:g} in this micro-batch, which may be a count, or a floor such as "
            f"clamp(min=1){''.join(f'; {rule.name} would be {own:g}' for rule, own in amounts[:1])}: {DECLARE}"
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
        what = self.rules[0].name if self.rules else _WORDS.get(self.reduction, "what it divides its sum by")
        return f"divides by {what}{more}"
