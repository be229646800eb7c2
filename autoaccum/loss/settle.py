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

from autoaccum.loss.asking import SAMPLES, WAYS, Evaluate, Seen, SeenTerm, look
from autoaccum.loss.counts import Count, countable
from autoaccum.loss.divisor import CLOSE, EXACT, TINY, Divisor, Rule, near
from autoaccum.loss.reading import Reading

__all__ = ["Unread", "settle"]

_MOST_RULES = 12
_SUMS = ("Sum", "Nansum", "Dot")
_NOTHING = Count("nothing", "reduction='sum'", lambda _: 1.0)
_OF_A_MEAN = "of a mean or a sum over samples, which makes it no mean"

Amounts = Mapping[Count, Sequence[float]]


@dataclass(frozen=True)
class Unread:
    """A loss whose divisor cannot be read, or is none.

    Attributes:
        why: in words.
        rule: a count by which its values add up all the same; None where none or several do.
        untried: what else counted the same in all samples that were tried, in words.
        bent: its graph shows that it is a function of a mean.
        wrong: its values add up by nothing that was tried, so that no accumulation of it can be right.
        twice: it divides by the square of this count.
        power: it divides by this power of the number of samples.
    """

    why: str
    rule: Count | None = None
    untried: str | None = None
    bent: bool = False
    wrong: bool = False
    twice: Count | None = None
    power: float | None = None


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
    seen = look(evaluate, batches, min(most, SAMPLES))
    counts = [*declared, *countable(seen[-1].batch, targets(seen[-1].batch))]
    amounts = {count: [count.of(each.batch) for each in seen] for count in counts}
    still = all(each.value == each.again or math.isnan(each.value) for each in seen)
    plain, deep, joined = (_settled(seen, number, amounts, still) for number in range(len(WAYS)))
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


def _settled(seen: Sequence[Seen], way: int, amounts: Amounts, still: bool) -> Reading | Unread | None:
    """The divisors as read in one way."""
    terms = [each.ways[way] for each in seen]
    names = [[term.name for term in each] for each in terms]
    if any(each != names[-1] for each in names):
        return Unread("its terms differ between parts of a batch")
    divisors: list[Divisor] = []
    for column in zip(*terms):
        alone = len(names[-1]) == 1  # the value of the whole loss is the term's
        values = [each.value if alone else term.value for term, each in zip(column, seen)]
        found = _divisor(column, seen, amounts)
        if not isinstance(found, Divisor):
            return found
        known = [value for value in values if value is not None]
        if still and len(known) == len(seen) and not _adds_up(column, seen, known, found, alone):
            return Unread(f"its {found.reduction} over all samples is no sum of those over their parts")
        divisors.append(found)
    return Reading(WAYS[way], divisors) if divisors else Unread("its graph is empty")


def _divisor(column: Sequence[SeenTerm], seen: Sequence[Seen], amounts: Amounts) -> Divisor | Unread | None:
    """One term over all sets: what it divides by; why that is no mean; None where these sets cannot tell."""
    last = column[-1]
    made = Divisor(last.name, "count", divided=any(term.divided for term in column))
    grows = any(term.shapes not in (None, last.shapes) for term in column)
    if any(term.divisor is None for term in column):
        made.kind = "penalty"
        if last.bent and grows:
            return Unread(f"it takes the {last.name} {_OF_A_MEAN}", bent=True)
        ends = f"it ends in {last.name} of something that is no plain sum or mean"
        return Unread(ends) if grows or len(seen) == 1 else made
    factors = {term.factor for term in column}
    made.scaled = max(factors) - min(factors) > CLOSE * max(factors)
    made.divided = made.divided or made.scaled
    found = [(term.divisor or 0.0) / (term.factor if made.scaled and term.factor else 1.0) for term in column]
    made.zero_seen, made.amount = not all(found), found[-1]
    if not any(found):
        return None
    if len(seen) == 1:
        # One set shows no growth. What a reduction itself counts are samples, or elements of them.
        made.kind = "constant" if last.name in _SUMS else "count"
        return None if made.divided else made
    if max(found) - min(found) > CLOSE * max(found):
        return _count(made, found, seen, amounts)
    made.kind = "constant" if grows else "penalty"
    return _constant(made, column, seen[-1].took and (made.divided or factors != {1.0})) if grows else made


def _constant(made: Divisor, column: Sequence[SeenTerm], may_change: bool) -> Divisor | Unread | None:
    """One that is the same for every set: a sum, unless it may be a floor that is never left here."""
    widths = {term.quotients for term in column}
    if len(widths) == 1 and None not in widths:  # a mean over classes of means over their samples
        return Unread(f"it takes quotients, one by one, {_OF_A_MEAN}", bent=True)
    return None if may_change else made


def _count(made: Divisor, found: Sequence[float], seen: Sequence[Seen], amounts: Amounts) -> Divisor | Unread | None:
    """One that changes with the samples: it adds up, by itself or beside a number, or a rule says how it does.

    A number that is added and a floor show by little, so that they are looked for before rounding is allowed for.
    """
    least = min(each for each in found if each)
    for close in (EXACT, CLOSE):
        made.close = close
        made.rules = _rules(made, found, amounts)
        if made.rules or _total(found, seen, 0.0, close):
            return made
        offset = _offset(found, seen)
        if offset > 0 and _total(found, seen, offset, close):
            made.offset = offset
            many = sum(each > offset * (1 + close) for each, own in zip(found, seen) if len(own.rows) == 1)
            return made if many > 1 else None
        if least < TINY * max(found) and _total(
            [0.0 if near(each, least) else each for each in found], seen, 0.0, close
        ):
            made.floor = least
            return made
    if len({round(each / found[-1], 6) for each in found}) == 2:
        return None  # one of the two may be a floor, and the other tells too little
    sizes = [len(each.rows) for each in seen]
    why = (
        f"it divides by {', '.join(f'{each:.4g}' for each in found[-3:])} for {', '.join(map(str, sizes[-3:]))} "
        "samples, which is no count"
    )
    squares = {count: [each**2 for each in own] for count, own in amounts.items()}
    twice = next((count for count, own in squares.items() if _alike(found, own)), None)
    pairs = [(math.log(each / found[-1]), math.log(size / sizes[-1])) for each, size in zip(found, sizes) if each]
    powers = [up / over for up, over in pairs if over]
    even = bool(powers) and max(powers) - min(powers) <= 0.02 * max(map(abs, powers))
    return Unread(why, twice=twice, power=powers[0] if even else None)


def _alike(found: Sequence[float], own: Sequence[float]) -> bool:
    """Whether one is a multiple of the other, which counts something."""
    return own[-1] > 0 and all(near(each * own[-1], other * found[-1]) for each, other in zip(found, own))


def _adds_up(
    column: Sequence[SeenTerm], seen: Sequence[Seen], values: Sequence[float], found: Divisor, alone: bool
) -> bool:
    """Whether what is divided adds up over the samples, as far as single ones were run."""
    if found.kind == "penalty":
        return True
    sums = {}
    for term, each, value in zip(column, seen, values):
        divisor = 1.0 if found.kind == "constant" else (term.divisor or 0.0)
        if found.scaled and found.kind == "count":
            divisor /= term.factor or 1.0
        sums[each.rows] = value * divisor if divisor else 0.0
    singles = [sums.get((row,), math.nan) for row in seen[-1].rows]
    if alone and any(math.isnan(single) for single in singles):
        return all(math.isfinite(total) for total in sums.values())
    off = [abs(math.fsum(singles[row] for row in rows) - total) for rows, total in sums.items() if len(rows) > 1]
    return all(each <= seen[-1].rounding * math.fsum(map(abs, singles)) for each in off)


def _total(found: Sequence[float], seen: Sequence[Seen], offset: float, close: float) -> bool:
    """Whether the divisors add up, but for a number in each."""
    whole = seen[-1].rows
    divisors = {each.rows: divisor - offset for each, divisor in zip(seen, found)}
    near_by = close * abs(found[-1])
    singles = [divisors.get((row,)) for row in whole]
    parts = [rows for rows in divisors if len(rows) > 1]
    if None in singles:  # no single samples: the parts are all there is
        first = [rows for rows in parts if len(rows) < len(whole)]
        return not offset and len(first) == 2 and abs(sum(divisors[rows] for rows in first) - found[-1]) <= near_by
    return all(abs(math.fsum(singles[row] or 0.0 for row in rows) - divisors[rows]) <= near_by for rows in parts)


def _offset(found: Sequence[float], seen: Sequence[Seen]) -> float:
    """The number beside a count, as single samples and all of them show it: n times in those, once in these."""
    singles = [divisor for each, divisor in zip(seen, found) if len(each.rows) == 1]
    whole = seen[-1].rows
    if len(singles) < len(whole) or len(whole) < 3:
        return 0.0
    offset = (math.fsum(singles) - found[-1]) / (len(whole) - 1)
    least = min(singles)  # where nothing counts it stands alone, and exactly
    return least if abs(offset - least) <= 1e-3 * least else offset if offset <= least else 0.0


def _rules(made: Divisor, found: Sequence[float], amounts: Amounts) -> list[Rule]:
    """The counts of the batch that give every divisor, but for a floor, which is noted."""
    rules = []
    for count, own in amounts.items():
        if own[-1] <= 0:
            continue
        scale = found[-1] / own[-1]
        if scale < 1 - CLOSE or abs(scale - round(scale)) > made.close * scale:
            continue  # weights that happen to be equal in these samples
        given = [scale * each for each in own]
        floors = {round(divisor, 12) for divisor, each in zip(found, given) if not near(divisor, each, made.close)}
        fitting = {divisor for divisor, each in zip(found, given) if near(divisor, each, made.close)}
        below = all(each < divisor or near(divisor, each, made.close) for divisor, each in zip(found, given))
        if len(floors) > made.divided or not below or len(fitting) < 2 or (floors and min(fitting) < max(floors)):
            continue
        rules.append((max(floors, default=0.0), Rule(count, scale)))
    if not rules:
        return []
    made.floor = rules[0][0]
    return [rule for floor, rule in rules if floor == made.floor][:_MOST_RULES]


def _by_values(seen: Sequence[Seen], amounts: Amounts, plain: Unread, still: bool) -> Unread | None:
    """A loss that cannot be read, and the one count by which its values add up; None where several that differ do."""
    if plain.bent:
        return replace(plain, wrong=True)
    whole, fitting = seen[-1], dict[tuple[float, ...], list[Count]]()
    for count, own in (*amounts.items(), (_NOTHING, [1.0] * len(seen))):
        sums = {each.rows: each.value * amount if amount else 0.0 for each, amount in zip(seen, own)}
        singles = [sums.get((row,), math.nan) for row in whole.rows]
        scale = math.fsum(map(abs, singles))
        off = [abs(math.fsum(singles[row] for row in rows) - sums[rows]) for rows in sums if len(rows) > 1]
        if scale and off and all(each <= whole.rounding * scale for each in off):
            fitting.setdefault(tuple(round(amount / (own[-1] or 1.0), 9) for amount in own), []).append(count)
    if len(fitting) == 1:
        ((rule, *others),) = fitting.values()
        tokens = next((count.name for count in others if count.declare == "reduction='token_mean'"), None)
        alike = f"{plain.why}, and {tokens} were as many in each sample tried as {rule.name}" if tokens else None
        return replace(plain, rule=rule, untried=alike)
    if fitting:
        return None
    return replace(plain, wrong=still and len(seen) > 1 and math.isfinite(whole.value))
