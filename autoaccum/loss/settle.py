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

from autoaccum.loss.asking import WAYS, Evaluate, Seen, SeenTerm, look
from autoaccum.loss.counts import Count, countable
from autoaccum.loss.divisor import CLOSE, Divisor, Rule, Settled, Unread, near

__all__ = ["settle"]

_SAMPLES = 8
_MOST_RULES = 12


def settle(
    evaluate: Evaluate,
    batches: Sequence[Any],
    targets: Callable[[Any], Any],
    most: int = _SAMPLES,
    declared: Sequence[Count] = (),
) -> Settled | Unread | None:
    """Runs the loss on a few sets of samples, and says how its divisors are to be read.

    None: nothing counts in any of these samples, or what does is too little to tell; ask again with others.

    Args:
        evaluate: runs the model and the loss on some samples.
        batches: on the host; up to eight of their samples are used.
        targets: finds a batch's targets.
        most: samples that may run at once.
        declared: counts that stand for what somebody declared, held against the divisors before all others.
    """
    seen = look(evaluate, batches, min(most, _SAMPLES))
    counts = [*declared, *(c for c in countable(seen[-1].batch, targets(seen[-1].batch)) if not c.sums)]
    amounts = {count: [count.of(each.batch) for each in seen] for count in counts}
    still = all(each.value == each.again or math.isnan(each.value) for each in seen)
    plain, deep, joined = (_settled(seen, number, amounts, still) for number in range(len(WAYS)))
    if isinstance(deep, Settled) and (isinstance(plain, str) or (
        isinstance(plain, Settled) and deep.sums < plain.sums
    )):  # fmt: skip
        return deep
    if isinstance(plain, str) and isinstance(joined, Settled) and joined.divisors[0].kind == "count":
        return joined
    return _by_values(seen, amounts, plain, still) if isinstance(plain, str) else plain


Amounts = Mapping[Count, Sequence[float]]


def _settled(seen: Sequence[Seen], way: int, amounts: Amounts, still: bool) -> Settled | str | None:
    """The divisors as read in one way; a text where they cannot be."""
    terms = [each.ways[way] for each in seen]
    names = [[term.name for term in each] for each in terms]
    if any(each != names[-1] for each in names):
        return "its terms differ between parts of a batch"
    divisors: list[Divisor] = []
    for column in zip(*terms):
        alone = len(names[-1]) == 1  # the value of the whole loss is the term's
        values = [each.value if alone else term.value for term, each in zip(column, seen)]
        known = None if None in values else [value for value in values if value is not None]
        found = _divisor(column, seen, known, amounts)
        if not isinstance(found, Divisor):
            return found
        if still and known is not None and not _adds_up(column, seen, known, found, alone):
            return f"its {found.reduction} over all samples is no sum of those over their parts"
        divisors.append(found)
    return Settled(WAYS[way], divisors) if divisors else "its graph is empty"


def _divisor(
    column: Sequence[SeenTerm], seen: Sequence[Seen], values: Sequence[float] | None, amounts: Amounts
) -> Divisor | str | None:
    """One term over all sets."""
    last = column[-1]
    made = Divisor(last.name, "count", divided=any(term.divided for term in column))
    grows = any(term.shapes not in (None, last.shapes) for term in column)
    if any(term.divisor is None for term in column):
        made.kind = "penalty"
        ends = f"it ends in {last.name} of something that is no plain sum or mean"
        return ends if grows or len(seen) == 1 else made
    factors = {term.factor for term in column}
    made.scaled = max(factors) - min(factors) > CLOSE * max(factors)
    found = [(term.divisor or 0.0) / (term.factor if made.scaled and term.factor else 1.0) for term in column]
    made.zero_seen = not all(found)
    if not any(found):
        return None
    if len(seen) == 1:
        # One set shows no growth. What a reduction itself counts are samples, or elements of them.
        made.kind = "constant" if last.name in _SUMS else "count"
        return None if made.divided else made
    if max(found) - min(found) <= CLOSE * max(found):
        return _constant(made, found, seen, values, grows)
    return _count(made, found, seen, amounts)


def _count(made: Divisor, found: Sequence[float], seen: Sequence[Seen], amounts: Amounts) -> Divisor | str:
    """One that changes with the samples: a count by itself, or by a rule where it has a floor."""
    fit = _fit(found, seen)
    made.offset = fit or 0.0
    made.rules = [] if fit else _rules(made, found, amounts)
    if fit is not None or made.rules:
        return made
    sizes = ", ".join(str(len(each.rows)) for each in seen[-3:])
    return f"it divides by {', '.join(f'{each:.4g}' for each in found[-3:])} for {sizes} samples, which is no count"


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
    return all(each <= _OFF * math.fsum(map(abs, singles)) for each in off)


_OFF = 1e-2  # relative; what is wrong is so by far more, rounding in 16 bits by less
_SUMS = ("Sum", "Nansum", "Dot")


def _constant(
    made: Divisor, found: Sequence[float], seen: Sequence[Seen], values: Sequence[float] | None, grows: bool
) -> Divisor | None:  # fmt: skip
    """The same for every set: a sum or a penalty, unless what was divided by is a floor that is never left here."""
    if not made.divided:
        made.kind = "constant" if grows else "penalty"
        return made
    nonzero = sum(len(each.rows) == 1 and value != 0 for each, value in zip(seen, values or ()))
    if nonzero > 1 or (values is None and found[-1] > 1):
        made.kind = "constant" if grows else "penalty"
        return made
    return None


def _fit(found: Sequence[float], seen: Sequence[Seen]) -> float | None:
    """The number beside a count that adds up, often 0; None where nothing adds up."""
    whole = seen[-1].rows
    divisors = {each.rows: divisor for each, divisor in zip(seen, found)}
    singles = [divisors.get((row,)) for row in whole]
    parts = [rows for rows in divisors if 1 < len(rows) < len(whole)]
    close = CLOSE * found[-1]
    known = [single for single in singles if single is not None]
    if len(known) < len(whole):  # no single samples: the parts are all there is
        both = sum(divisors[rows] for rows in parts)
        return 0.0 if len(parts) == 2 and abs(both - found[-1]) <= close else None
    offset = (math.fsum(known) - found[-1]) / (len(whole) - 1)
    off = [math.fsum(known[row] for row in rows) - divisors[rows] for rows in parts]
    if abs(offset) <= close and all(abs(each) <= close for each in off):
        exact = [abs(each - (len(rows) - 1) * offset) <= 1e-3 * abs(offset) for each, rows in zip(off, parts)]
        return offset if exact and all(exact) and offset > 0 else 0.0
    if parts and all(abs(each - (len(rows) - 1) * offset) <= close for each, rows in zip(off, parts)):
        return offset if min(known) >= offset - close else None
    return None


def _rules(made: Divisor, found: Sequence[float], amounts: Amounts) -> list[Rule]:
    """The counts of the batch that give every divisor, but for a floor."""
    rules = []
    for count, own in amounts.items():
        if own[-1] <= 0:
            continue
        scale = found[-1] / own[-1]
        if scale < 1 - CLOSE or abs(scale - round(scale)) > CLOSE * scale:
            continue  # weights that happen to be equal in these samples
        given = [scale * each for each in own]
        floors = {round(divisor, 9) for divisor, each in zip(found, given) if not near(divisor, each)}
        fitting = [divisor for divisor, each in zip(found, given) if near(divisor, each)]
        below = all(each < divisor or near(divisor, each) for divisor, each in zip(found, given))
        if len(floors) > made.divided or not below or len(set(fitting)) < 2 or (floors and min(fitting) < max(floors)):
            continue
        rules.append((max(floors, default=0.0), Rule(count, scale)))
    if not rules:
        return []
    made.floor = rules[0][0]
    return [rule for floor, rule in rules if floor == made.floor][:_MOST_RULES]


def _by_values(seen: Sequence[Seen], amounts: Amounts, why: str, still: bool) -> Unread:
    """A loss that cannot be read, and the one count by which its values add up."""
    whole, fitting = seen[-1], dict[tuple[float, ...], Count]()
    for count, own in (*amounts.items(), (Count("nothing", "reduction='sum'", lambda _: 1.0), [1.0] * len(seen))):
        sums = {each.rows: each.value * amount if amount else 0.0 for each, amount in zip(seen, own)}
        singles = [sums.get((row,), math.nan) for row in whole.rows]
        scale = math.fsum(map(abs, singles))
        off = [abs(math.fsum(singles[row] for row in rows) - sums[rows]) for rows in sums if len(rows) > 1]
        if scale and off and all(each <= 1e-5 * scale for each in off):
            fitting.setdefault(tuple(round(amount / (own[-1] or 1.0), 9) for amount in own), count)
    if len(fitting) == 1:
        return Unread(why, next(iter(fitting.values())))
    tried = len(seen) > 1 and math.isfinite(whole.value) and all(math.isfinite(each.value) for each in seen)
    return Unread(why, wrong=still and tried and not fitting)
