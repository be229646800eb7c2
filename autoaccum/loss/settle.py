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
from dataclasses import dataclass, replace
from typing import Any

from autoaccum.loss.asking import SAMPLES, Evaluate, Rows, Seen, SeenTerm, look
from autoaccum.loss.counts import Count, countable
from autoaccum.loss.divisor import TINY, TRUSTED, Divisor, near
from autoaccum.loss.graph import WAYS
from autoaccum.loss.reading import Reading

__all__ = ["Unread", "settle"]

_MOST_RULES = 12
_EXACT, _CLOSE = 1e-12, 1e-6  # relative: float64 and whole numbers; weights counted in float32
_SUMS = ("Sum", "Nansum", "Dot")
_NOTHING = Count("nothing", "reduction='sum'", lambda _: 1.0)

Amounts = Mapping[Count, Sequence[float]]


@dataclass(frozen=True)
class Unread:
    """A loss whose divisor cannot be read, or is none.

    Attributes:
        why: in words.
        wrong: its values add up by nothing that was tried, so that no accumulation of it can be right.
    """

    why: str
    wrong: bool = False


def settle(
    evaluate: Evaluate,
    batches: Sequence[Any],
    targets: Callable[[Any], Any],
    most: int = SAMPLES,
    declared: Sequence[Count] = (),
) -> Reading | Unread | None:
    """Runs the loss on a few sets of samples, and says how its divisors are to be read.

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
    if isinstance(deep, Reading) and (
        isinstance(plain, Unread) or (plain is not None and _constants(deep) < _constants(plain))
    ):
        return deep
    if not isinstance(plain, Unread):
        return plain
    if isinstance(joined, Reading) and joined.divisors[0].kind == "count":
        return joined
    return _by_values(seen, amounts, plain, still)


def _constants(reading: Reading) -> int:
    return sum(divisor.kind == "constant" for divisor in reading.divisors)


def _settled(seen: Sequence[Seen], way: str, amounts: Amounts, still: bool) -> Reading | Unread | None:
    """The divisors as read in one way."""
    terms = [each.ways[way] for each in seen]
    names = [[term.name for term in each] for each in terms]
    if any(each != names[-1] for each in names):
        return Unread("its terms differ between parts of a batch") if _grow(seen) else None
    divisors: list[Divisor] = []
    for column in zip(*terms):
        divisor = _divisor(column, seen, amounts)
        if not isinstance(divisor, Divisor):
            return divisor
        alone = len(names[-1]) == 1  # the value of the whole loss is the term's
        values = [each.value if alone else term.value for term, each in zip(column, seen)]
        if still and divisor.kind != "penalty" and None not in values:
            found = [_over(term, divisor.scaled) for term in column]
            if not _adds_up(seen, values, found, seen[-1].rounding, alone):
                return Unread(f"its {divisor.reduction} over all samples is no sum of those over their parts")
        divisors.append(divisor)
    return Reading(way, divisors) if divisors else Unread("its graph is empty")


def _over(term: SeenTerm, scaled: bool) -> float:
    """What a term divides by, its factor within it where that changes with the samples."""
    return (term.divisor or 0.0) / (term.factor if scaled and term.factor else 1.0)


def _divisor(column: Sequence[SeenTerm], seen: Sequence[Seen], amounts: Amounts) -> Divisor | Unread | None:
    """One term over all sets: what it divides by; why that is no mean; None where these sets cannot tell."""
    last = column[-1]
    made, factors = Divisor(last.name), {term.factor for term in column}
    grows = any(term.shapes not in (None, last.shapes) for term in column)
    if any(term.divisor is None for term in column):
        made.kind = "penalty"
        ends = f"it ends in {last.name} of something that is no plain sum or mean"
        return Unread(ends) if grows or not _grow(seen) else made
    made.scaled = max(factors) - min(factors) > _CLOSE * max(factors)
    found = [_over(term, made.scaled) for term in column]
    made.hides_floor = all(found) and (made.scaled or any(term.divided for term in column))
    made.amount = found[-1]
    if not any(found):
        return None
    if not _grow(seen):
        return _alone(made, column, found, amounts)
    if max(found) - min(found) > _CLOSE * max(found):
        return _count(made, found, seen, amounts)
    made.kind = "constant" if grows else "penalty"
    may_change = grows and seen[-1].took and (made.hides_floor or factors != {1.0})  # a floor that is never left here
    return None if may_change else made


def _alone(made: Divisor, column: Sequence[SeenTerm], found: Sequence[float], amounts: Amounts) -> Divisor | None:
    """One that was seen of single samples, or of one set.

    What a reduction itself counts are samples, or elements of them; of another divisor a rule has to say it.
    """
    divided = made.scaled or any(term.divided for term in column)
    if made.reduction in _SUMS and not divided:
        same = len(column) > 1 and len({term.value for term in column}) == 1
        made.kind = "penalty" if same else "constant"
        return made
    made.rules = _rules(made, found, amounts, _EXACT)
    return made if made.rules or not divided else None


def _grow(seen: Sequence[Seen]) -> bool:
    """Whether some sets have more samples than others, without which nothing shows what grows with them."""
    return len({len(each.rows) for each in seen}) > 1


def _count(made: Divisor, found: Sequence[float], seen: Sequence[Seen], amounts: Amounts) -> Divisor | Unread | None:
    """One that changes with the samples: it adds up, by itself or beside a number, or a rule says how it does.

    A number that is added and a floor show by little, so that they are looked for before rounding is allowed for.
    """
    least = min(each for each in found if each)
    for close in (_EXACT, _CLOSE):
        made.rules = _rules(made, found, amounts, close)
        if made.rules or _total(found, seen, 0.0, close):
            return made
        offset = _offset(found, seen)
        if offset > 0 and _total(found, seen, offset, close):
            made.offset, made.hides_floor = offset, False
            many = sum(each > offset * (1 + close) for each, own in zip(found, seen) if len(own.rows) == 1)
            return made if many > 1 else None
        counted = [0.0 if near(each, least) else each for each in found]
        if least < TINY * max(found) and _total(counted, seen, 0.0, close):
            made.floor = least
            return made
    most = max(found)
    if len({round(each / most, 6) for each in found}) == 2:
        return None  # one of the two may be a floor, and the other tells too little
    sizes = ", ".join(str(len(each.rows)) for each in seen[-3:])
    return Unread(
        f"it divides by {', '.join(f'{each:.4g}' for each in found[-3:])} for {sizes} samples, which is no count, as "
        "where a mean is divided again"
    )


def _adds_up(
    seen: Sequence[Seen], values: Sequence[float | None], found: Sequence[float], rounding: float, alone: bool = False
) -> bool:
    """Whether what is divided adds up over the samples: values times what they are divided by.

    With `alone` single samples may show nothing; without it some must.
    """
    differences = _differences(
        {each.rows: (value or 0.0) * own if own else 0.0 for each, value, own in zip(seen, values, found)}
    )
    if alone and any(math.isnan(off) for off, _ in differences):
        return all(math.isfinite((value or 0.0) * own) for value, own in zip(values, found) if own)
    return all(off <= rounding * scale for off, scale in differences)


def _differences(sums: Mapping[Rows, float]) -> list[tuple[float, float]]:
    """Of each set of several samples: (what it is off the sum over its samples, the sum of their magnitudes)."""
    singles = {rows: [sums.get((row,), math.nan) for row in rows] for rows in sums if len(rows) > 1}
    return [(abs(math.fsum(own) - sums[rows]), math.fsum(map(abs, own))) for rows, own in singles.items()]


def _total(found: Sequence[float], seen: Sequence[Seen], offset: float, close: float) -> bool:
    """Whether the divisors add up, but for a number in each."""
    divisors = {each.rows: divisor - offset for each, divisor in zip(seen, found)}
    near_by = close * max(found)
    differences = _differences(divisors)
    if any(math.isnan(off) for off, _ in differences):  # no single samples: the parts are all there is
        first = [rows for rows in divisors if set(rows) < set(seen[-1].rows)]
        return not offset and len(first) == 2 and abs(sum(divisors[rows] for rows in first) - found[-1]) <= near_by
    return all(off <= near_by for off, _ in differences)


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


def _by_values(seen: Sequence[Seen], amounts: Amounts, plain: Unread, still: bool) -> Reading | Unread | None:
    """A loss that cannot be read, by the one count by which its values add up; None where several that differ do."""
    values = [each.value for each in seen]
    fitting = dict[tuple[float, ...], list[Count]]()
    for count, own in (*amounts.items(), (_NOTHING, [1.0] * len(seen))):
        shows = _grow(seen) and any(value * amount for value, amount in zip(values, own) if amount)
        if shows and _adds_up(seen, values, own, seen[-1].rounding):
            fitting.setdefault(tuple(round(amount / (max(own) or 1.0), 9) for amount in own), []).append(count)
    if len(fitting) == 1:
        ((rule, *others),) = fitting.values()
        divisor = Divisor("", "constant" if rule is _NOTHING else "count", rules=[rule], confirmed=TRUSTED)
        tokens = next((count.name for count in others if count.declare == "reduction='token_mean'"), None)
        alike = f"{plain.why}, and {tokens} were as many in each sample tried as {rule.name}" if tokens else None
        return Reading(divisors=[divisor], unread=plain.why, untried=alike)
    if fitting:
        return None
    return replace(plain, wrong=still and _grow(seen) and math.isfinite(values[-1]))
