"""What the terms of one loss are divided by, and how that is known: the one answer that the rooms above ask for.

One term whose divisor only its graph says: it is read when the loss has run, and enters the window's sum then. Several:
each one's share must be known before the first backward pass, from counts of the batch that have proved right, or from
a pass that only reads.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from autoaccum.errors import LossError
from autoaccum.loss.call import scalar
from autoaccum.loss.counts import Count, samples
from autoaccum.loss.divisor import DECLARE, TRUSTED, Divisor, near
from autoaccum.loss.graph import apportioned, read
from autoaccum.loss.mean import Mean, Several, Sum

__all__ = ["Reading"]

_TWO = "run two samples or more at a time (micro_batch=2), of which some count, or "


@dataclass
class Reading:
    """What the terms of one loss are divided by.

    Attributes:
        divisors: of its terms, by name; none where a loss that was looked at is no mean that can be accumulated.
        source: "declared" (by the settings, or torch's own loss), "graph", "values" (those over parts of a batch add up
            by this alone), "means" (which the step returns), "assumed", "unsettled" (some samples have to show it).
        how: the source in words, after what the terms are divided by; all that is known, where that is not yet seen.
        way: in which the graph is read.
        unseen: why it cannot be seen what the loss divides by, in words; None where it was declared or seen.
        is_no_mean: whether its values add up by nothing that was tried, so that no accumulation of it can be right.
        gives_sums: whether the loss is a sum, or single elements, with a declared denominator.
        cuts: what a declared mean over labels may leave out, where some samples have to show it.
        rehearses: only the memory that a step takes matters.
        singly: samples were tried one at a time, which tells no count of one from a floor.
    """

    divisors: dict[str, Divisor] = field(default_factory=dict)
    source: str = "graph"
    how: str = "as its graph says"
    way: str = "plain"
    unseen: str | None = None
    is_no_mean: bool = False
    gives_sums: bool = False
    cuts: Sequence[Count] = ()
    rehearses: bool = False
    singly: bool = False

    @property
    def reason(self) -> str:
        """One line: the denominators, how they are known, and what that costs where it is more than a look."""
        if self.source in ("unsettled", "means"):
            return self.how
        terms: dict[str, list[str]] = {}
        for name, divisor in self.divisors.items():
            terms.setdefault(divisor.words, []).append(name)
        if len(self.divisors) == 1:
            return f"{next(iter(terms))}, {self.how}"
        said = "; ".join(f"{words} ({', '.join(names)})" for words, names in terms.items())
        counts = [divisor for divisor in self.divisors.values() if divisor.kind == "count"]
        if self.source == "declared" or not counts:
            return f"{said}, {self.how}"
        learns = all(divisor.rules for divisor in counts)
        until = f", until {TRUSTED} of them have shown that the batch says the same" if learns else ""
        return (
            f"{said}, {self.how}; to know each term's share beforehand each micro-batch runs forward once more{until}"
        )

    @property
    def facts(self) -> dict[str, str]:
        """The terms, and what was seen of each: alike on all ranks that have seen it."""
        facts = {"terms": ", ".join(self.divisors)}
        if self.source in ("values", "assumed"):
            facts["the loss"] = f"is not read off its graph: {self.source}"
        if self.source != "unsettled":
            facts |= {f"{name} of the loss": divisor.kind for name, divisor in self.divisors.items()}
        return facts

    def settled(self, found: "Reading | None") -> "Reading":
        """This one, once some samples have shown what `found` says; None: nothing counts in them, or too little."""
        if found is None:
            return self
        if found.source == "means":
            return replace(self, cuts=()) if self.cuts else found
        (divisor,) = self.divisors.values()
        if self.cuts:
            names = [rule.name for each in found.divisors.values() for rule in each.rules if len(found.divisors) == 1]
            rules = [cut for cut in self.cuts if cut.name in names] or divisor.rules
            return replace(self, divisors={"loss": replace(divisor, rules=rules[:1])}, cuts=())
        if found.divisors:
            return found
        how = f"assumed since {found.unseen}: reduction= declares another denominator"
        return replace(found, divisors={"loss": replace(divisor, confirmed=TRUSTED)}, source="assumed", how=how)

    # Before the model runs.

    @property
    def late(self) -> bool:
        """Whether its denominators are only known once the loss ran."""
        # Of all that nobody declared: one rank may have seen what another has not.
        return self.source != "declared" and any(divisor.kind == "count" for divisor in self.divisors.values())

    def count(self, batch: Any) -> dict[str, float] | None:
        """The denominators of a batch, best on the host, by rules that have proved right; None where there are none."""
        if self.rehearses and self.source == "graph" and len(self.divisors) > 1:
            return dict.fromkeys(self.divisors, samples(batch))
        found = {}
        for name, divisor in self.divisors.items():
            amount = divisor.foretold(batch) if divisor.trusted else None
            if amount is None:
                return None
            found[name] = amount
        return found

    def expected(self, batches: Sequence[Any]) -> float:
        """One late term's denominator by the likeliest of its rules; 0 where it has none."""
        rules = next(iter(self.divisors.values())).rules if len(self.divisors) == 1 else []
        return math.fsum(rules[0].of(batch) for batch in batches) if rules else 0.0

    def whole(self, name: str, total: float) -> float:
        """What a term of the whole window is divided by, of the sum of its micro-batches' denominators."""
        return self.divisors[name].whole(total)

    @property
    def floors(self) -> list[float]:
        """Three figures a term, which ranks add up to `agree_on_floors`: one rank may have seen a floor alone.

        None of what was declared, which has no floor.
        """
        if self.source == "declared":
            return []
        found = [divisor.floor for divisor in self.divisors.values()]
        return [figure for floor in found for figure in (float(floor > 0), floor, floor**2)]

    def agree_on_floors(self, sums: Sequence[float]) -> list[float]:
        """Takes the floors that any rank has seen, of all ranks' `floors` added up, which end `sums`; gives the others.

        Raises:
            LossError: on all ranks, where they saw different ones.
        """
        if self.source == "declared":
            return list(sums)
        others = len(sums) - 3 * len(self.divisors)
        sums, floors = list(sums[:others]), sums[others:]
        for (name, divisor), seen, total, squares in zip(
            self.divisors.items(), floors[::3], floors[1::3], floors[2::3]
        ):
            if seen and not near(squares * seen, total**2, 1e-9):
                raise LossError(
                    f"{name} divides by at least {total / seen:g} on average over {seen:g} ranks, and by another floor "
                    f"on some of them: let every rank compute the same loss, or {DECLARE}"
                )
            divisor.floor = total / seen if seen else 0.0
        return sums

    # After it ran.

    def counted(
        self, name: str, value: Any, denominator: float | None, source: str, *, graph: bool = True, checks: bool = False
    ) -> Mean:
        """A term whose denominator was known before the loss ran, or which says its own.

        Args:
            name: the term's.
            value: what `source` returned of it: a scalar, or a Mean.
            denominator: its own; None: the Mean says it.
            source: in words.
            graph: whether it must have a graph where something counts.
            checks: whether a declared denominator is held against the graph.

        Raises:
            LossError: no scalar, or without a graph; a Mean with another denominator, or of a term that is a sum.
        """
        divisor = self.divisors[name]
        adds_up = divisor.kind == "constant"
        if isinstance(value, Mean):
            own = value.denominator
            if denominator is not None and isinstance(own, float) and not near(own, denominator):
                raise LossError(
                    f"the step's Mean for {name!r} says it was divided by {own:g}, and its declared reduction gives "
                    f"{denominator:g} for the same batch: let both count the same, or declare none"
                )
            if adds_up:
                raise LossError(
                    f"the step returned a Mean for {name!r}, and reduction='sum' says that it is added up: return the "
                    "sum"
                )
            # A tensor on a device is not waited for; where it is 0 there may be no graph either.
            counts = isinstance(own, Tensor) or own > 0 if denominator is None else denominator > 0
            numerator = scalar(value.numerator, "the step's Mean", graph=graph and counts)
            return value if denominator is None else Mean(numerator, denominator)
        if denominator is None:
            raise LossError(
                f"the step returned a {type(value).__name__} for {name!r}, and a Mean before: return a Mean each time, "
                "with a denominator of 0 where nothing counts"
            )
        loss = scalar(value, source, graph=graph and denominator > 0)
        if checks and self.source == "declared" and not self.gives_sums and divisor.compared:
            divisor.compared -= not self.rehearses  # the samples of trials are few and alike
            divisor.compare(loss, float(denominator > 0) if adds_up else denominator, self.how)
        if adds_up:
            return Sum(loss, denominator)
        return Mean(loss, denominator) if self.gives_sums else Mean.of(loss, denominator)

    def read(
        self, loss: Tensor, on_host: Any, known: Mapping[str, float] | None, values: Mapping[Any, Tensor]
    ) -> dict[str, Mean]:
        """The terms of a loss that ran, one element with its graph, read off that.

        Args:
            loss: as it was given for the batch `on_host`.
            on_host: the batch, best on the host.
            known: its denominators, where they were counted before.
            values: the results of one element on the way to the loss, by their nodes.

        Raises:
            LossError: the loss is not made as it was, or cannot be told to be a count.
        """
        if self.source == "unsettled" or not loss.requires_grad:
            return {name: self._unsettled(loss, samples(on_host)) for name in self.divisors}
        terms = read(loss, self.way)
        names, before = [term.name for term in terms], [divisor.reduction for divisor in self.divisors.values()]
        if names != before:
            divisor, *others = self.divisors.values()
            if any("Compiled" in name for name in names) and not others and not divisor.hides_floor:
                counted = divisor.foretold(on_host)  # of one term that was read, and is compiled by now
                if counted is not None:
                    return {"loss": self.counted("loss", loss, counted, "the loss")}
            raise LossError(
                f"the loss of this micro-batch is made of {', '.join(names) or 'nothing'}, and was of "
                f"{', '.join(before)} before: compute every term each time, as 0 where nothing counts, leave the loss "
                "out of torch.compile, which hides what it divides by, or return the terms from step= as "
                "autoaccum.Mean(numerator, denominator)"
            )
        apart = [loss] if len(terms) == 1 else apportioned(loss.detach(), terms, values)
        parts = {
            name: divisor.mean(term, value, on_host, rehearses=self.rehearses)
            for (name, divisor), term, value in zip(self.divisors.items(), terms, apart)
        }
        if len(parts) == 1:
            return parts
        for name, counted in (known or {}).items() if not self.rehearses else ():
            if not near(float(parts[name].denominator), counted):
                raise LossError(
                    f"{name} of the loss divides by {parts[name].denominator:g} in this micro-batch, and by "
                    f"{counted:g} by what was counted before it ran: {DECLARE}"
                )
        return Several(loss, parts, dict(zip(self.divisors, terms)))

    def _unsettled(self, loss: Tensor, size: float) -> Mean:
        """Of a loss whose divisors nobody has seen: where nothing counts it may pass."""
        if self.rehearses or not loss.requires_grad:
            return Mean.of(loss, size)
        if any(term.divisor is None or float(term.divisor) for term in read(loss)):
            raise LossError(
                "what the loss divides by changed too little over the samples tried, so that a count, a constant and a "
                f"floor such as clamp(min=1) cannot be told apart: {_TWO if self.singly else ''}{DECLARE}"
            )
        return Mean.of(loss, 0.0)
