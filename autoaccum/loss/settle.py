"""What the divisors read off a loss's graph mean, settled on a few samples before training.

A divisor that was read is a number. What kind of number shows over several sets of samples, single ones, two unequal
parts and all:

- a count adds up: d(A and B) = d(A) + d(B), but for a number that is added to it (`mask.sum() + 1e-8`);
- a constant is the same for every set: the term is a sum over the samples;
- a penalty is one too, but nothing in its graph grows with the samples: it is a function of the parameters;
- a floor (`clamp(min=1)`) shows where nothing counts. Only what counts in the batch itself tells it from a count of
  one, so each count that the batch offers (counts.py) is held against the divisors: one that agrees is a rule.

What is none of these is no mean: the loss compares samples, or divides twice.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autoaccum.loss.asking import SAMPLES, Evaluate, Rows, Seen, SeenTerm, look
from autoaccum.loss.counts import Count, countable, samples
from autoaccum.loss.divisor import TINY, TRUSTED, Divisor, near
from autoaccum.loss.graph import WAYS
from autoaccum.loss.reading import Reading

__all__ = ["settle"]

_MOST_RULES = 12
_EXACT, _CLOSE = 1e-12, 1e-6  # relative: float64 and whole numbers; weights counted in float32
_SUMS = ("Sum", "Nansum", "Dot")

Amounts = Mapping[Count, Sequence[float]]


def settle(
    evaluate: Evaluate,
    batches: Sequence[Any],
    targets: Callable[[Any], Any],
    most: int = SAMPLES,
    declared: Sequence[Count] = (),
) -> Reading | None:
    """Runs the loss on a few sets of samples, and says how its divisors are to be read; none where they cannot be.

    None: nothing counts in any of these samples, or what does is too little to tell; ask again with others.

    Args:
        evaluate: runs the model and the loss on some samples.
        batches: on the host; up to eight of their samples are used.
        targets: finds a batch's targets.
        most: samples that may run at once.
        declared: counts that stand for what somebody declared, held against the divisors before all others.
    """
    seen, still = look(evaluate, batches, most)
    counts = [*declared, *countable(seen[-1].batch, targets(seen[-1].batch))]
    amounts = {count: [count.of(each.batch) for each in seen] for count in counts}
    plain, deep, joined = (_settled(seen, way, amounts, still) for way in WAYS)
    if isinstance(deep, Reading) and (isinstance(plain, str) or (plain and _constants(deep) < _constants(plain))):
        return deep
    if not isinstance(plain, str):
        return plain
    if isinstance(joined, Reading) and not _constants(joined):
        return joined
    return _by_values(seen, amounts, plain, still)


def _constants(reading: Reading) -> int:
    return sum(divisor.kind == "constant" for divisor in reading.divisors.values())


def _grow(seen: Sequence[Seen]) -> bool:
    """Whether some sets have more samples than others, without which nothing shows what grows with them."""
    return len({len(each.rows) for each in seen}) > 1


def _settled(seen: Sequence[Seen], way: str, amounts: Amounts, still: bool) -> Reading | str | None:
    """The divisors as read in one way; why that is no mean; None where these sets cannot tell."""
    terms = [each.ways[way] for each in seen]
    names = [[term.name for term in each] for each in terms]
    if any(each != names[-1] for each in names):
        return "its terms differ between parts of a batch" if _grow(seen) else None
    if not names[-1]:
        return "its graph is empty"
    divisors: dict[str, Divisor] = {}
    alone = len(names[-1]) == 1  # the value of the whole loss is the term's
    for place, column in enumerate(zip(*terms), 1):
        divisor = _divisor(column, seen, amounts)
        if not isinstance(divisor, Divisor):
            return divisor
        values = [each.value if alone else term.value for term, each in zip(column, seen)]
        if still and divisor.kind != "penalty" and None not in values:
            parts = _divided(seen, values, [_over(term, divisor.scaled) for term in column])
            if _adds_up(parts, seen[-1].rounding) is False:
                return f"its {divisor.reduction} over all samples is no sum of those over their parts"
        divisors["loss" if alone else f"term {place}"] = divisor
    return Reading(divisors, way=way)


def _over(term: SeenTerm, scaled: bool) -> float:
    """What a term divides by, its factor within it where that changes with the samples."""
    return (term.divisor or 0.0) / (term.factor if scaled and term.factor else 1.0)


def _divided(seen: Sequence[Seen], values: Sequence[float | None], divisors: Sequence[float]) -> dict[Rows, float]:
    """What each set's value was before it was divided; 0 where nothing counts."""
    return {each.rows: (value or 0.0) * own if own else 0.0 for each, value, own in zip(seen, values, divisors)}


def _adds_up(amounts: Mapping[Rows, float], close: float, scale: float = 0.0) -> bool | None:
    """Whether the amount of each set is the sum of its samples', or where these were not seen of its two parts'.

    To within `close` times `scale`, or the sum of their magnitudes; None where no set can be held against others.
    """
    found = None
    for rows, own in amounts.items():
        singles = [(row,) for row in rows]
        parts: list[Rows] = [*singles]
        if not amounts.keys() >= set(singles):
            parts = [each for each in amounts if len(each) > 1 and set(each) < set(rows)]
        if len(rows) > 1 and sum(map(len, parts)) == len(rows):
            each = [amounts[part] for part in parts]
            found = abs(math.fsum(each) - own) <= close * (scale or math.fsum(map(abs, each)))
            if not found:
                return False
    return found


def _divisor(column: Sequence[SeenTerm], seen: Sequence[Seen], amounts: Amounts) -> Divisor | str | None:
    """One term over all sets: what it divides by; why that is no mean; None where these sets cannot tell."""
    last, factors, more = column[-1], {term.factor for term in column}, _grow(seen)
    made, grows = Divisor(reduction=last.name), any(term.graph not in (None, last.graph) for term in column)
    if any(term.divisor is None for term in column):
        made.kind = "penalty"
        return made if more and not grows else f"it ends in {last.name} of something that is no plain sum or mean"
    made.scaled = max(factors) - min(factors) > _CLOSE * max(factors)
    found = [_over(term, made.scaled) for term in column]
    divided = made.scaled or any(term.divided for term in column)
    if not any(found):
        return None
    made.amount, made.hides_floor = min(each for each in found if each), divided and all(found)
    if more and max(found) - min(found) > _CLOSE * max(found):
        return _count(made, found, seen, amounts)
    if more:
        made.kind = "constant" if grows else "penalty"
        may_change = grows and seen[-1].took and (made.hides_floor or factors != {1.0})  # a floor never left here
        return None if may_change else made
    # Of sets alike in size: what a reduction itself counts are samples, or elements of them; else a rule has to say it.
    if made.reduction in _SUMS and not divided:
        made.kind = "penalty" if len(column) > 1 and len({term.value for term in column}) == 1 else "constant"
        return made
    made.rules = _rules(made, found, amounts, _EXACT)
    return made if made.rules or not divided else None


def _count(made: Divisor, found: Sequence[float], seen: Sequence[Seen], amounts: Amounts) -> Divisor | str | None:
    """One that changes with the samples: it adds up, by itself or beside a number, or a rule says how it does.

    A number that is added and a floor show by little, so that they are looked for before rounding is allowed for.
    """

    def total(own: Sequence[float], close: float) -> bool:
        return bool(_adds_up(dict(zip((each.rows for each in seen), own)), close, max(found)))

    least = min(each for each in found if each)
    for close in (_EXACT, _CLOSE):
        made.rules = _rules(made, found, amounts, close)
        if made.rules or total(found, close):
            return made
        offset = _offset(found, seen)
        if offset > 0 and total([each - offset for each in found], close):
            made.offset, made.hides_floor = offset, False
            many = sum(each > offset * (1 + close) for each, own in zip(found, seen) if len(own.rows) == 1)
            return made if many > 1 else None
        if least < TINY * max(found) and total([0.0 if near(each, least) else each for each in found], close):
            made.floor = least
            return made
    if len({round(each / max(found), 6) for each in found}) == 2:
        return None  # one of the two may be a floor, and the other tells too little
    sizes = ", ".join(str(len(each.rows)) for each in seen[-3:])
    return (
        f"it divides by {', '.join(f'{each:.4g}' for each in found[-3:])} for {sizes} samples, which is no count, as "
        "where a mean is divided again"
    )


def _offset(found: Sequence[float], seen: Sequence[Seen]) -> float:
    """The number beside a count, as single samples and all of them show it: n times in those, once in these."""
    singles = {each.rows[0]: divisor for each, divisor in zip(seen, found) if len(each.rows) == 1}
    whole = seen[-1].rows
    if len(singles) < 3 or len(whole) < 2 or not singles.keys() >= set(whole) or max(found) in singles.values():
        return 0.0
    offset = (math.fsum(singles[row] for row in whole) - found[-1]) / (len(whole) - 1)
    least = min(singles.values())  # where nothing counts it stands alone, and exactly
    return least if abs(offset - least) <= 1e-3 * least else offset if offset <= least else 0.0


def _rules(made: Divisor, found: Sequence[float], amounts: Amounts, close: float) -> list[Count]:
    """The counts of the batch that give every divisor, but for a floor, which is noted."""
    rules = []
    for count, own in amounts.items():
        amount, divisor = max(zip(own, found))
        scale = divisor / amount if amount > 0 else 0.0
        if scale < 1 - _CLOSE or abs(scale - round(scale)) > close * scale:
            continue  # weights that happen to be equal in these samples
        given = [scale * each for each in own]
        floors = {round(divisor, 12) for divisor, each in zip(found, given) if not near(divisor, each, close)}
        fitting = {divisor for divisor, each in zip(found, given) if near(divisor, each, close)}
        below = all(each < divisor or near(divisor, each, close) for divisor, each in zip(found, given))
        if len(floors) > made.hides_floor or not below or len(fitting) < 2 or (floors and min(fitting) < max(floors)):
            continue
        rules.append((max(floors, default=0.0), count if scale == 1 else _times(count, scale)))
    made.floor = rules[0][0] if rules else 0.0
    return [rule for floor, rule in rules if floor == made.floor][:_MOST_RULES]


def _times(count: Count, scale: float) -> Count:
    return count._replace(of=lambda batch: count.of(batch) * scale)


def _by_values(seen: Sequence[Seen], amounts: Amounts, why: str, still: bool) -> Reading | None:
    """A loss that cannot be read, by the one count by which its values add up; None where several that differ do."""
    values = [each.value for each in seen]
    nothing = Count("nothing", "reduction='sum'", samples)
    fitting = dict[tuple[float, ...], list[Count]]()
    for count, own in (*amounts.items(), (nothing, [1.0] * len(seen))):
        shows = _grow(seen) and any(value * amount for value, amount in zip(values, own) if amount)
        if shows and _adds_up(_divided(seen, values, own), seen[-1].rounding):
            fitting.setdefault(tuple(round(amount / (max(own) or 1.0), 9) for amount in own), []).append(count)
    if len(fitting) > 1:
        return None
    if not fitting:
        return Reading(unseen=why, is_no_mean=still and _grow(seen) and math.isfinite(values[-1]))
    ((rule, *others),) = fitting.values()
    divisor = Divisor("constant" if rule is nothing else "count", [rule], TRUSTED)
    tokens = next((count.name for count in others if count.declare == "reduction='token_mean'"), None)
    alike = f"{why}, and {tokens} were as many in each sample tried as {rule.name}" if tokens else None
    return Reading({"loss": divisor}, "values", f"as its values over parts of a batch show ({why})", unseen=alike)
