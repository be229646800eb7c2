"""A loss whose denominators stand in its graph, read at each micro-batch once it is settled how (settle.py).

One term: its divisor is read when the loss has run, and enters the window's sum then. Several: each one's share must be
known before the first backward pass, from counts of the batch that have proved right, or from a pass that only reads.
"""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoaccum.errors import LossError
from autoaccum.loss.counts import samples
from autoaccum.loss.divisor import DECLARE, TRUSTED, Divisor, near
from autoaccum.loss.graph import Term, apportioned, read, weigh
from autoaccum.loss.mean import Mean, Several, Sum

__all__ = ["Compared", "Reading"]

_WAITS = 4  # micro-batches in which a divisor that lies on a device is waited for


@dataclass
class Reading:
    """How one loss is read.

    Attributes:
        divisors: of its terms; none: nothing has settled that so far.
        unread: why its graph does not say it, where one divisor was learnt from its values.
        untried: what else counted the same as that one in all samples that were tried, in words.
        rehearses: only the memory that a step takes matters.
    """

    way: str = "plain"
    divisors: Sequence[Divisor] = ()
    unread: str | None = None
    untried: str | None = None
    rehearses: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The loss's terms."""
        if len(self.divisors) < 2:
            return ("loss",)
        return tuple(f"term {number}" for number, _ in enumerate(self.divisors, 1))

    @property
    def words(self) -> str:
        """What the terms are divided by."""
        words = collections.Counter(divisor.words for divisor in self.divisors)
        if len(self.divisors) == 1:
            return next(iter(words))
        return "; ".join(f"{each} ({number} term{'s' * (number > 1)})" for each, number in words.items())

    @property
    def reason(self) -> str:
        """One line: the denominator, and what reading costs where it is more than a look at the graph."""
        if not self.divisors:
            return "divides by what its graph says, read at each micro-batch"
        if self.unread is not None:
            return f"{self.words}, as its values over parts of a batch show ({self.unread})"
        counts = [divisor for divisor in self.divisors if divisor.kind == "count"]
        if len(self.divisors) == 1 or not counts:
            return f"{self.words}, as its graph says"
        learns = all(divisor.rules for divisor in counts)
        until = f", until {TRUSTED} of them have shown that the batch says the same" if learns else ""
        return (
            f"{self.words}, as its graph says; to know each term's share beforehand each micro-batch runs forward once "
            f"more{until}"
        )

    @property
    def adds_up(self) -> bool:
        """Whether the loss is one term that is never divided."""
        return len(self.divisors) == 1 and self.divisors[0].kind != "count"

    # Before the model runs.

    def count(self, batch: Any) -> dict[str, float] | None:
        """The denominators of a batch, best on the host, by rules that have proved right; None where there are none."""
        if self.rehearses and len(self.divisors) > 1:
            return dict.fromkeys(self.names, samples(batch))
        if not self.divisors or not all(divisor.trusted for divisor in self.divisors):
            return None
        amounts = [each.foretold(batch) if each.kind == "count" else samples(batch) for each in self.divisors]
        return None if None in amounts else {name: amount or 0.0 for name, amount in zip(self.names, amounts)}

    def expected(self, batches: Sequence[Any]) -> float:
        """The one term's denominator by the likeliest of its rules; 0 where it has none."""
        rules = self.divisors[0].rules if len(self.divisors) == 1 else []
        return math.fsum(rules[0].of(batch) for batch in batches) if rules else 0.0

    def may_count(self, batch: Any) -> bool:
        """Whether one of the rules, or what has none, lets a batch count."""
        return any(divisor.foretold(batch) != 0 for divisor in self.divisors)

    def whole(self, name: str, total: float) -> float:
        """What a term of the whole window is divided by, of the sum of its micro-batches' denominators."""
        return self.divisors[self.names.index(name)].whole(total) if self.divisors else total

    @property
    def floors(self) -> list[float]:
        """Three figures a term, which ranks add up to `agree_on_floors`: one rank may have seen a floor alone."""
        found = [each.floor for each in self.divisors] or [0.0]
        return [figure for floor in found for figure in (float(floor > 0), floor, floor**2)]

    def agree_on_floors(self, sums: Sequence[float]) -> None:
        """Takes the floors that any rank has seen, of all ranks' `floors` added up.

        Raises:
            LossError: on all ranks, where they saw different ones.
        """
        for name, divisor, seen, total, squares in zip(self.names, self.divisors, sums[::3], sums[1::3], sums[2::3]):
            if seen and not near(squares * seen, total**2, 1e-9):
                raise LossError(
                    f"{name} divides by at least {total / seen:g} on average over {seen:g} ranks, and by another floor "
                    f"on some of them: let every rank compute the same loss, or {DECLARE}"
                )
            divisor.floor = total / seen if seen else 0.0

    # After it ran.

    def terms(
        self, loss: Tensor, on_host: Any, known: Mapping[str, float] | None, values: Mapping[Any, Tensor]
    ) -> dict[str, Mean]:
        """The terms of a loss that ran, one element with its graph.

        Args:
            loss: as it was given for the batch `on_host`.
            on_host: the batch, best on the host.
            known: its denominators, where they were counted before.
            values: the results of one element on the way to the loss, by their nodes.

        Raises:
            LossError: the loss is not made as it was, or cannot be told to be a count.
        """
        if self.unread is not None:
            return {"loss": self._hidden(loss, on_host)}
        if not self.divisors or not loss.requires_grad:
            return {name: self._unsettled(loss, samples(on_host)) for name in self.names}
        terms = read(loss, self.way)
        names = [term.name for term in terms]
        if names != [divisor.reduction for divisor in self.divisors]:
            if any("Compiled" in name for name in names):
                return {"loss": self._hidden(loss, on_host)}
            raise LossError(
                f"the loss of this micro-batch is made of {', '.join(names) or 'nothing'}, and was of "
                f"{', '.join(divisor.reduction for divisor in self.divisors)} before: compute every term each time, as "
                "0 where nothing counts, or return the terms from step= as autoaccum.Mean(numerator, denominator)"
            )
        apart = [loss] if len(terms) == 1 else apportioned(loss.detach(), terms, values)
        parts = {
            name: self._mean(value, term, divisor, on_host)
            for name, value, term, divisor in zip(self.names, apart, terms, self.divisors)
        }
        if len(parts) == 1:
            return parts
        for name, counted in (known or {}).items() if not self.rehearses else ():
            if not near(float(parts[name].denominator), counted):
                raise LossError(
                    f"{name} of the loss divides by {parts[name].denominator:g} in this micro-batch, and by "
                    f"{counted:g} by what was counted before it ran: {DECLARE}"
                )
        return Several(loss, parts, dict(zip(self.names, terms)))

    def _mean(self, value: Tensor, term: Term, divisor: Divisor, on_host: Any) -> Mean:
        """One term.

        In a rehearsal no rule is held against what was read: a training ceases to after a few windows, and what
        counting takes in the first traces alone is no growth with their samples.
        """
        if divisor.kind == "penalty":
            return Mean.of(value, samples(on_host))
        own = divisor.of(term)
        if divisor.kind == "constant":
            divisor.check(own)
            return Sum(value, samples(on_host))
        if isinstance(own, Tensor) and value.requires_grad and not divisor.hides_floor:
            weigh(term, own.sign())  # keeps the 0 / 0 of a batch in which nothing counts out of the gradient
            return Mean.of(value, own - divisor.offset, own)
        own = float(own)
        count = max(own - divisor.offset, 0.0) if self.rehearses else divisor.count(own, on_host, value)
        return Mean.of(value, count, own)

    def _hidden(self, loss: Tensor, on_host: Any) -> Mean:
        """Of a loss whose graph does not say it, by what was learnt of it; it may be compiled since then."""
        divisor = self.divisors[0]
        if self.adds_up:
            return Sum(loss, samples(on_host))
        counted = divisor.foretold(on_host) if len(self.divisors) == 1 and not divisor.hides_floor else None
        if counted is None:
            raise LossError(
                "the loss is compiled, which hides what it divides by, and nothing in the batch counts the same: "
                f"leave the loss out of torch.compile, or {DECLARE}"
            )
        return Mean.of(loss, counted)

    def _unsettled(self, loss: Tensor, size: float) -> Mean:
        """Of a loss whose divisors nobody has seen: where nothing counts it may pass."""
        if self.rehearses or not loss.requires_grad:
            return Mean.of(loss, size)
        if any(term.divisor is None or float(term.divisor) for term in read(loss)):
            raise LossError(
                "what the loss divides by changed too little over the samples tried, so that a count, a constant and a "
                f"floor such as clamp(min=1) cannot be told apart: {DECLARE}"
            )
        return Mean.of(loss, 0.0)


class Compared:
    """Holds one term's declared denominators against those in its graph, where that can be read.

    One may be a multiple of the other (elements and samples), the same each time; anything else would weigh
    micro-batches otherwise than the loss does.
    """

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None  # (divisor read, denominator declared)
        self._waited = 0

    def check(self, loss: Tensor, denominator: float, declared: Callable[[], str]) -> None:
        """Refuses a micro-batch whose two have changed, and not alike.

        `denominator` is what was declared, or counted by torch's own rule, 1 for a sum; `declared` says it in words.
        """
        terms = read(loss) if denominator and loss.requires_grad and not loss.is_meta else ()
        if len(terms) != 1 or terms[0].divisor is None:
            return
        divisor, factor = terms[0].divisor, terms[0].factor
        if isinstance(divisor, Tensor) or isinstance(factor, Tensor):
            self._waited += 1
            if self._waited > _WAITS:
                return
        own = abs(float(divisor) / (float(factor) or 1.0))
        if not own or not math.isfinite(own):
            return
        self._first = self._first or (own, denominator)
        read_first, declared_first = self._first
        close = 1e-2 if loss.dtype in (torch.float16, torch.bfloat16) else 1e-4
        alike = near(own * declared_first, read_first * denominator, close)
        if not alike and not near(own, read_first, close):
            raise LossError(
                f"the loss {declared()}, which gives {declared_first:g} and {denominator:g} in two micro-batches, and "
                f"its graph says that it divides by {read_first:g} and {own:g} there: let both count the same, leave "
                f'reduction="auto", which reads it, or {DECLARE}'
            )
