"""A loss whose denominators stand in its graph: settled once, then read at each micro-batch.

One term: its divisor is read when the loss has run, and enters the window's sum then. Several: each one's share must be
known before the first backward pass, from counts of the batch that have proved right, or from a pass that only reads.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from autoaccum.data import tree
from autoaccum.errors import LossError
from autoaccum.loss.asking import Evaluate
from autoaccum.loss.counts import Count
from autoaccum.loss.divisor import DECLARE, TRUSTED, Divisor, Settled, Unread, near
from autoaccum.loss.graph import Term, read, weigh
from autoaccum.loss.mean import Mean, Several, Sum
from autoaccum.loss.settle import settle
from autoaccum.loss.values import apportioned
from autoaccum.memory.oom import Verdict, out_of_memory

__all__ = ["OwnMeans", "Reader", "Returned"]


class Returned(NamedTuple):
    """A step that says its denominators itself, as Means, each time it ran; the names of its terms."""

    names: tuple[str, ...]


class OwnMeans(Exception):
    """A step returned Means: nothing has to be read.

    Attributes:
        names: of its terms.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names


class Reader:
    """Reads one loss.

    Attributes:
        found: how it is read; None: nothing has settled that so far.
        rehearses: only the memory that a step takes matters.
        asked: some samples were asked before.
    """

    def __init__(self) -> None:
        self.found: Settled | Unread | Returned | None = None
        self.rehearses = False
        self.asked = False

    @property
    def names(self) -> tuple[str, ...]:
        """The loss's terms."""
        if isinstance(self.found, Returned):
            return self.found.names
        if isinstance(self.found, Settled) and len(self.found.divisors) > 1:
            return tuple(f"term {number}" for number, _ in enumerate(self.found.divisors, 1))
        return ("loss",)

    @property
    def reads(self) -> bool:
        """Whether the graph is asked, as far as is known."""
        return not isinstance(self.found, (Unread, Returned))

    @property
    def price(self) -> str:
        """What reading costs, in words, where it is more than a look at the graph: of several terms."""
        if not isinstance(self.found, Settled) or self.names == ("loss",):
            return ""
        counts = [divisor for divisor in self.found.divisors if divisor.kind == "count"]
        if not counts:
            return ""
        until = f", until {TRUSTED} of them have shown that the batch says the same" if all(
            divisor.rules for divisor in counts
        ) else ""  # fmt: skip
        return f"; to know each term's share beforehand each micro-batch runs forward once more{until}"

    @property
    def adds_up(self) -> bool:
        """Whether the loss is one term that is never divided."""
        return isinstance(self.found, Settled) and self.names == ("loss",) and self.found.divisors[0].kind != "count"

    def settle(
        self,
        evaluate: Evaluate,
        batches: Sequence[Any],
        targets: Callable[[Any], Any],
        most: int,
        declared: Sequence[Count] = (),
    ) -> bool:
        """Asks a few samples, while nothing is known, as `settle.settle` does; False where they did not fit.

        What a trial shows is not kept, but for a step's Means: its samples are few, and may be the same one.
        """
        self.asked = True
        most = min(most, max(map(tree.batch_size, batches)))
        try:
            found = settle(evaluate, batches, targets, most, declared)
            self.found = None if self.rehearses else found
        except OwnMeans as returned:
            self.found = Returned(returned.names)
        except Exception as error:
            if most == 1 or out_of_memory(error) is not Verdict.SURELY:
                raise
            return False
        return True

    def count(self, batch: Any, otherwise: Callable[[Any], dict[str, float]]) -> dict[str, float] | None:
        """The denominators of a batch by rules that have proved right; None where there are none, or they differ.

        Args:
            batch: best on the host.
            otherwise: counts where nothing can be read.
        """
        if isinstance(self.found, Unread):
            return {"loss": self.found.rule.of(batch)} if self.found.rule is not None else otherwise(batch)
        if not isinstance(self.found, Settled) or not all(divisor.trusted for divisor in self.found.divisors):
            return None
        amounts = [
            divisor.foretold(batch) if divisor.kind == "count" else float(tree.batch_size(batch))
            for divisor in self.found.divisors
        ]
        if None in amounts:
            return None
        return {name: amount or 0.0 for name, amount in zip(self.names, amounts)}

    def ahead(self, batches: Sequence[Any]) -> list[dict[str, float]] | None:
        """All terms' denominators before a window runs; None where a pass must read them."""
        if self.rehearses:
            return [dict.fromkeys(self.names, float(tree.batch_size(batch))) for batch in batches]
        counted = [self.count(batch, lambda batch: {}) for batch in batches]
        known = [each for each in counted if each is not None]
        return known if len(known) == len(batches) else None

    def expected(self, batches: Sequence[Any]) -> float:
        """The one term's denominator by the likeliest of its rules; 0 where it has none."""
        if not isinstance(self.found, Settled) or self.names != ("loss",) or not self.found.divisors[0].rules:
            return 0.0
        rule = self.found.divisors[0].rules[0]
        return math.fsum(rule.of(batch) for batch in batches)

    def may_count(self, batch: Any) -> bool:
        """Whether one of the rules, or what has none, lets a batch count."""
        if not isinstance(self.found, Settled):
            return True
        return any(divisor.foretold(batch) != 0 for divisor in self.found.divisors)

    def whole(self, name: str, total: float) -> float:
        """What a term of the whole window is divided by, of the sum of its micro-batches' denominators."""
        if not isinstance(self.found, Settled):
            return total
        return self.found.divisors[self.names.index(name)].whole(total)

    def terms(
        self, loss: Tensor, on_host: Any, known: Mapping[str, float] | None, values: Mapping[Any, Tensor]
    ) -> dict[str, Mean]:
        """The terms of a loss that ran.

        Args:
            loss: one element, with its graph.
            on_host: the batch, best on the host.
            known: its denominators, where they were counted before.
            values: the results of one element on the way to the loss, by their nodes.

        Raises:
            LossError: the loss is not made as it was, or cannot be told to be a count.
        """
        if not isinstance(self.found, Settled) or not loss.requires_grad:
            return {name: self._unsettled(loss, float(tree.batch_size(on_host))) for name in self.names}
        terms = self.found.terms(loss)
        if terms is None:
            return {"loss": self._hidden(loss, on_host)}
        apart = [loss] if len(terms) == 1 else apportioned(loss.detach(), terms, values)
        parts = {
            name: self._mean(value, term, divisor, on_host)
            for name, value, term, divisor in zip(self.names, apart, terms, self.found.divisors)
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
            return Mean.of(value, float(tree.batch_size(on_host)))
        own = divisor.of(term)
        if divisor.kind == "constant":
            divisor.check(own)
            return Sum(value, float(tree.batch_size(on_host)))
        if isinstance(own, Tensor) and value.requires_grad and not divisor.hides_floor:
            weigh(term, own.sign())  # keeps the 0 / 0 of a batch in which nothing counts out of the gradient
            return Mean.of(value, own - divisor.offset, own)
        own = float(own)
        count = max(own - divisor.offset, 0.0) if self.rehearses else divisor.count(own, on_host, value)
        return Mean.of(value, count, own)

    def _hidden(self, loss: Tensor, on_host: Any) -> Mean:
        """Of a loss that is compiled, by what was learnt while it was not."""
        assert isinstance(self.found, Settled)
        divisor = self.found.divisors[0]
        if self.adds_up:
            return Sum(loss, float(tree.batch_size(on_host)))
        counted = divisor.foretold(on_host) if self.names == ("loss",) and not divisor.hides_floor else None
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
