"""What a plan says of its sizes: one line on each value, the value first and the reason after it.

People trust a number that explains itself. So a line names the figures it follows from, is true of this very plan, and
leaves out what does not apply to it.
"""

from collections.abc import Sequence

from autoaccum.errors import PlanError
from autoaccum.planning.bn_momentum import mode_reason, momentum_reason
from autoaccum.planning.plan_fields import PlanFields
from autoaccum.planning.split import shares

__all__ = ["batch_norm_lines", "format_sizes", "size_lines", "tail_line"]


def format_sizes(sizes: Sequence[int]) -> str:
    """Sizes for a sentence: "86, 85, 85"; "64 each"; where there are many, "16 of 17 and 48 of 16"."""
    runs = [(sizes.count(size), size) for size in dict.fromkeys(sizes)]
    if len(runs) == 1 and len(sizes) > 1:
        return f"{sizes[0]} each"
    if len(sizes) <= 4 or len(runs) > 4:
        return ", ".join(map(str, sizes))
    return " and ".join(f"{number} of {size}" for number, size in runs)


def size_lines(plan: PlanFields, sizes: tuple[int, ...]) -> dict[str, str]:
    """The lines on the target, this rank's share, and its micro-batches of these `sizes`."""
    over = f" over {plan.world_size} ranks" if plan.world_size > 1 else ""
    window = plan.usual_window
    asked = "exactly as asked"
    if window != plan.target_batch:
        asked = f"where {plan.target_batch} were asked for: an epoch has {plan.samples}"
    lines = {"target_batch": f"{window} samples an optimizer step{over}, {asked}"}
    if over:
        lines["share"] = _share_line(plan, sum(sizes))
    if "limit" in plan.reasons:
        lines["limit"] = plan.reasons["limit"]  # the caller's, put where it is read first
    if plan.by_length and sizes:
        lines |= _by_length_lines(plan, sizes)
    else:
        lines |= _micro_batch_lines(plan.limits[plan.rank], sizes, "limit" in plan.reasons)
    if plan.minimum > 1:
        lines["minimum"] = (
            f"{plan.minimum}: a layer forbids smaller micro-batches (BatchNorm needs two values a channel)"
        )
    if plan.multiple_of > 1 and sizes:
        lines["multiple_of"] = _multiple_line(plan.multiple_of, sizes, by_length=bool(plan.by_length))
    return lines


def _micro_batch_lines(limit: int, sizes: tuple[int, ...], explained: bool) -> dict[str, str]:
    """The lines on the largest size and the number. A limit `explained` by the caller need not be what fits at most."""
    if not sizes:
        idle = "0: the samples do not reach this rank; it joins every vote and every sum with nothing of its own"
        return {"micro_batch": idle, "accumulation_steps": idle}
    if len(sizes) == 1:
        why = f"within the limit of {limit}" if explained else f"since up to {limit} fit"
        return {
            "micro_batch": f"{sizes[0]}: all at once, {why}",
            "accumulation_steps": f"1 micro-batch of {sizes[0]}: nothing needs to be accumulated",
        }
    bound = f"the limit is {limit}" if explained else f"at most {limit} samples fit at once"
    fewest = f"within the limit of {limit}" if explained else f"that fit, since {bound}"
    alike = len(set(sizes)) == 1
    listed = f" of {sizes[0]}" if alike else f"{' of' if len(sizes) <= 4 else ','} {format_sizes(sizes)}"
    return {
        "micro_batch": f"{sizes[0]}: {'each' if alike else 'the largest'} of the {len(sizes)} micro-batches; {bound}",
        "accumulation_steps": f"{len(sizes)} micro-batches{listed}: the fewest {fewest}",
    }


def _by_length_lines(plan: PlanFields, sizes: tuple[int, ...]) -> dict[str, str]:
    """The lines on sizes that follow from the lengths in each window."""
    room = plan.by_length
    shown = [room[0], room[len(room) // 2], room[-1]] if len(room) > 3 else list(room)
    told = ", ".join(f"{samples} of up to {length}" for length, samples in shown)
    return {
        "micro_batch": f"{sizes[0]}: of the longest samples seen; shorter ones run more at once",
        "accumulation_steps": f"{len(sizes)} micro-batches{',' if len(sizes) > 4 else ' of'} {format_sizes(sizes)}, "
        "were all samples of a window as long as the longest seen; each window takes as many as its lengths need",
        "by_length": f"samples at once by padded length: {told}; a window is sorted by length and cut where that costs "
        f"least, and none longer than {room[-1][0]} fits",
    }


def _share_line(plan: PlanFields, share: int) -> str:
    parts = shares(plan.usual_window, plan.limits, minimum=plan.minimum)
    alike = len(set(plan.limits)) == 1
    how = "evenly" if alike else f"in proportion to the limits {format_sizes(plan.limits)}"
    text = f"{share} of the {plan.usual_window} samples for rank {plan.rank}, shared {how}: {format_sizes(parts)}"
    if idle := parts.count(0):
        text += f"; {f'{idle} idle ranks join' if idle > 1 else 'the idle rank joins'} every vote and sum all the same"
    return text


def _multiple_line(unit: int, sizes: tuple[int, ...], *, by_length: bool) -> str:
    odd = [size for size in sizes if size % unit]
    if by_length:
        return f"{unit}: set aside, since sizes follow from the lengths in each window"
    if len(odd) > 1:
        return f"{unit}: set aside, since multiples of it would take more than these {len(sizes)} micro-batches"
    rest = f", but one of {odd[0]} that takes the remainder" if odd else ""
    return f"{unit}: every micro-batch is a multiple of it{rest}"


def tail_line(plan: PlanFields) -> str:
    """The line on an epoch's windows, and on what becomes of a short last one; a PlanError where there is no window."""
    if plan.samples is None:
        return {
            "step": "step: a short last window is trained on too, with its own denominator",
            "drop": "drop: a short last window is left out of each epoch",
        }[plan.tail]
    length, target = plan.samples, plan.target_batch
    runs = dict(plan.windows.runs(length))
    if not runs:
        raise PlanError(
            f"samples={length} is an epoch without a window, of {target} samples with tail='drop', else of "
            f'{plan.minimum} or more (minimum={plan.minimum}): use tail="step", a target batch of at most {length}, or '
            "more data"
        )
    full, odd = runs.get(target, 0), [size for size in runs if size != target]
    windows = [f"{full} window{'s' if full > 1 else ''} of {target}"] if full else []
    windows += [f"one of {size}" for size in odd]
    if not full:
        windows = [f"one window of {odd[0]}{', short of the target' if odd[0] < target else ''}"]
    text = f"{plan.tail}: {length} samples an epoch are {' and '.join(windows)}"
    unfit = f"too few for a micro-batch (minimum={plan.minimum})"
    if odd and odd[0] > target:
        text += f"; a tail of {odd[0] - target}, {unfit}, joins the window before it"
    elif odd and full:
        text += ", which has its own denominator"
    if dropped := length - full * target - sum(odd):
        text += f"; a tail of {dropped}, {'short of a window' if plan.tail == 'drop' else unfit}, is dropped"
    return text


def batch_norm_lines(plan: PlanFields, sizes: tuple[int, ...]) -> dict[str, str]:
    """The lines on BatchNorm's momentum and statistics; none where the model is known to have no such layer."""
    if plan.batch_norm_layers == 0:
        return {}
    momentum = momentum_reason(plan.layer_momentum, len(sizes), plan.batch_norm)
    if plan.batch_norm_layers is None:  # plain arithmetic, for a model not seen
        return {"bn_momentum": f"{momentum} (if the model has BatchNorm)"}
    return {
        "bn_momentum": momentum,
        "batch_norm": mode_reason(plan.batch_norm, plan.usual_window, sizes, plan.world_size),
    }
