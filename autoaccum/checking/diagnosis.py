"""Why an accumulated gradient is not the large batch's, by what the loss's graph says that it divides by.

Whatever was declared, the loss is read on the samples that were looked at (settle.py). A sum that is divided as a mean,
a mean that is added up, a mean over something else than was declared, several denominators under one: each is seen in
the divisors. What is no mean compares samples with one another.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from autoaccum.loss.divisor import DECLARE, near
from autoaccum.loss.objective import Objective
from autoaccum.loss.reading import Reading

__all__ = ["Cause", "Diagnosis", "declaration", "diagnose", "no_mean"]


class Cause:
    """The causes in short, as a report names them."""

    TOO_LARGE = "k times too large"
    TOO_SMALL = "k times too small"
    UNEVEN = "uneven denominators"
    SEVERAL = "several denominators"
    COUPLED = "batch-coupled loss"
    SIZE_BOUND = "depends on the batch size"
    NOT_FINITE = "not finite in a part"
    RANDOM = "randomness"


class Diagnosis(NamedTuple):
    """One of the causes, and what it means and asks for, in words."""

    cause: str
    text: str


def diagnose(objective: Objective, found: Reading | None, parts: Sequence[Any], *, added_up: bool) -> Diagnosis:
    """The likely cause, and what to declare.

    Args:
        objective: as it was declared.
        found: what its loss divides by, as it was read on all samples.
        parts: the micro-batches whose accumulated gradient was wrong.
        added_up: whether that was the plain sum of their own gradients.
    """
    if found is not None and not found.divisors:
        return no_mean(found.unseen or "")
    if found is not None and len(found.divisors) > 1:
        words = dict.fromkeys(divisor.words for divisor in found.divisors.values())
        return Diagnosis(
            Cause.SEVERAL,
            f"several denominators: of the loss's terms one {'; one '.join(words)}, and all are weighted alike.\n"
            "Return the terms from step=, and declare each: reduction={term: f(batch)}; or leave "
            'reduction="auto", which reads them',
        )
    by, declare = declaration(found)
    late = objective.denominators(parts[0]) is None
    if by == "nothing":
        if late:
            declare = (
                "Return a plain tensor from the step and declare reduction='sum', or return "
                "autoaccum.Mean(numerator, denominator) whose denominator does not grow with the batch"
            )
        text = "k times too small (1/k): the loss is a sum over its samples, and is divided as if it were a mean.\n"
        return Diagnosis(Cause.TOO_SMALL, text + declare)
    if not added_up and (late or _weighed_right(objective, found, parts)):
        return no_mean(f"it is a mean over {by}, and weighed by that, its parts' gradients do not give the whole's")
    cause, does = Cause.UNEVEN, "weighted by something else, which gives a mean of means"
    if added_up:
        cause, does = Cause.TOO_LARGE, "added up undivided"
    return Diagnosis(cause, f"{cause}: the loss is a mean over {by}, and is {does}.\n{declare}")


def declaration(found: Reading | None) -> tuple[str, str]:
    """(what the loss is a mean over; a sentence on what to do about it); ("nothing", …) of a sum."""
    divisor = next(iter(found.divisors.values())) if found is not None and len(found.divisors) == 1 else None
    if divisor is not None and divisor.kind != "count":
        return "nothing", "Declare reduction='sum'"
    if divisor is None or not divisor.rules:
        return "what nothing in the batch counts", DECLARE[0].upper() + DECLARE[1:]
    return divisor.rules[0].name, f"Declare {divisor.rules[0].declare}"


def no_mean(why: str) -> Diagnosis:
    """Of a loss that compares samples."""
    return Diagnosis(
        Cause.COUPLED,
        f"a batch-coupled loss: {why}, as where samples are compared with one another (contrastive pairs, triplets, "
        "balance between experts, statistics over the batch, a root of a mean); accumulating cannot be right.\n"
        "Use a micro-batch as large as the target batch, or keep that term out of the loss (MSE for RMSE); where it is "
        f"a mean over what counts, {DECLARE}",
    )


def _weighed_right(objective: Objective, found: Reading | None, parts: Sequence[Any]) -> bool:
    """Whether the parts weigh as the loss divides, as far as that can be counted: then no denominator is at fault."""
    weights = [sum((objective.reading.count(part) or {}).values()) for part in parts]
    if found is None:
        return False
    (divisor,) = found.divisors.values()
    if not divisor.rules:  # nothing says what it comes to in a part
        return near(divisor.amount, sum(weights), 1e-4)
    amounts = [divisor.foretold(part) for part in parts]
    first, weight = amounts[0], weights[0]
    return first is not None and all(
        own is not None and near(own * weight, first * declared, 1e-4) for own, declared in zip(amounts, weights)
    )
