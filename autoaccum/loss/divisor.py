"""What one term of a loss is divided by: a count, a constant or a penalty; and what counts it in a batch."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autoaccum.errors import LossError
from autoaccum.loss.counts import Count, samples
from autoaccum.loss.graph import Term, read, weigh
from autoaccum.loss.mean import Mean, Sum

__all__ = ["DECLARE", "TINY", "TRUSTED", "WAITS", "Divisor", "near"]

TINY = 1e-3  # of the largest count: a floor that only keeps a quotient finite
TRUSTED = 24  # micro-batches in which rules gave what was read, before they are asked instead
DECLARE = (
    "return autoaccum.Mean(numerator, denominator) from step=, or declare reduction=f(batch), the number of what counts"
)
WAITS = 4  # micro-batches in which a divisor that lies on a device is waited for
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
    """What one term is divided by.

    Attributes:
        kind: "count", which adds up over the samples; "constant", of a term that is itself a sum over them; "penalty",
            of one that is a function of the parameters.
        rules: counts of the batch that gave every divisor so far; those that give another one later are struck off.
        confirmed: micro-batches in which they gave what was read.
        reduction: the name of the node that it was read at.
        amount: what a constant is; the least that a count beside other divisions was.
        offset: what is added to the count.
        floor: what it never falls below.
        scaled: whether the term's factor changes with the samples, and belongs to the divisor.
        compared: micro-batches of a training, still, in which what is declared is held against the graph.
        hides_floor: whether a divisor may be a floor rather than a count: somebody divided beside the reduction, and
            none was 0 yet.
    """

    kind: str = "count"
    rules: list[Count] = field(default_factory=list)
    confirmed: int = 0
    reduction: str = ""
    amount: float = 0.0
    offset: float = 0.0
    floor: float = 0.0
    scaled: bool = False
    hides_floor: bool = False
    compared: float = math.inf
    _first: tuple[float, float] | None = None  # (divisor read, denominator declared) that the others are held against
    _waited: int = 0

    @property
    def trusted(self) -> bool:
        """Whether the batch says it: the rules have been right often enough to be asked instead of the graph."""
        return self.kind != "count" or (bool(self.rules) and self.confirmed >= TRUSTED)

    def foretold(self, batch: Any) -> float | None:
        """The denominator of a batch, before the model runs; None for a count without rules, or whose rules differ."""
        if not self.rules:
            return None if self.kind == "count" else samples(batch)
        amount = self.rules[0].of(batch)
        return None if any(not near(rule.of(batch), amount) for rule in self.rules[1:]) else amount

    def whole(self, total: float) -> float:
        """What the loss of all samples is divided by, of the sum of its parts' counts."""
        return max(total + self.offset, self.floor) if self.kind == "count" else total

    def mean(self, term: Term, value: Tensor, batch: Any, *, rehearses: bool) -> Mean:
        """A term that was read, of this value over `batch`.

        In a rehearsal no rule is held against what was read: a training ceases to after a few windows, and what
        counting takes in the first traces alone is no growth with their samples.

        Raises:
            LossError: its divisor cannot be read this time, or told to be a count.
        """
        if self.kind == "penalty":
            return Mean.of(value, samples(batch))
        own: Any = term.divisor  # a Number
        if own is None:
            raise LossError(
                f"the loss of this micro-batch ends in {term.name}, which was a plain sum or mean before: {DECLARE}"
            )
        if self.scaled and (isinstance(term.factor, Tensor) or term.factor):
            own = own / term.factor
        own = abs(own)
        if isinstance(own, Tensor) and self.kind == "count" and value.requires_grad and not self.hides_floor:
            weigh(term, own.sign())  # keeps the 0 / 0 of a batch in which nothing counts out of the gradient
            return Mean.of(value, own - self.offset, own)
        if self.kind == "constant":
            if not isinstance(own, Tensor) and not near(own, self.amount):
                raise LossError(
                    f"the loss divides by {own:g} in this micro-batch, and by {self.amount:g} for all samples tried, "
                    f"which seemed a constant: {DECLARE}"
                )
            return Sum(value, samples(batch))
        own = float(own)
        return Mean.of(value, max(own - self.offset, 0.0) if rehearses else self._count(own, batch, value), own)

    def _count(self, divisor: float, batch: Any, value: Tensor) -> float:
        """What a batch adds to the window's divisor, given its own, and the term's value."""
        self.confirmed += 1
        self.hides_floor = self.hides_floor and divisor > 0
        if not self.hides_floor:
            if self.confirmed <= TRUSTED:
                self.rules = [rule for rule in self.rules if near(rule.of(batch), divisor)]
            return max(divisor - self.offset, 0.0)
        amounts = [(rule, rule.of(batch)) for rule in self.rules]
        given = [rule for rule, amount in amounts if near(amount, divisor)]
        under = [rule for rule, amount in amounts if amount < divisor and rule not in given]
        # A floor is never above what was divided by before: what gave less there happened to fit the samples tried.
        at_floor = near(divisor, self.floor) if self.floor else divisor <= self.amount
        self.amount = min(self.amount, divisor)
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

    def compare(self, loss: Tensor, denominator: float, how: str) -> None:
        """Holds a denominator that was declared, 1 for a sum, against the graph, where it has one term and is readable.

        One may be a multiple of the other (elements and samples), the same each time. A LossError for anything else,
        which says `how` it is known: it would weigh micro-batches otherwise than the loss does.
        """
        terms = read(loss) if denominator and loss.requires_grad and not loss.is_meta else ()
        if len(terms) != 1 or terms[0].divisor is None:
            return
        divisor, factor = terms[0].divisor, terms[0].factor
        if isinstance(divisor, Tensor) or isinstance(factor, Tensor):
            self._waited += 1
            if self._waited > WAITS:
                return
        own = abs(float(divisor) / (float(factor) or 1.0))
        if not own or not math.isfinite(own):
            return
        self._first = self._first or (own, denominator)
        first, declared = self._first
        close = 1e-2 if loss.dtype in (torch.float16, torch.bfloat16) else 1e-4
        if not near(own * declared, first * denominator, close) and not near(own, first, close):
            raise LossError(
                f"the loss {self.words}, {how}, which gives {declared:g} and {denominator:g} in two micro-batches, and "
                f"its graph says that it divides by {first:g} and {own:g} there: let both count the same, leave "
                f'reduction="auto", which reads it, or {DECLARE}'
            )

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
