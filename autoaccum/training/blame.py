"""Which samples made a loss that is not finite: asked when the training ends of it, so it may take a few forwards."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from autoaccum.batch_norm.norm_layer import has_running_statistics
from autoaccum.data import tree
from autoaccum.errors import AutoaccumError
from autoaccum.window.accumulate import Accumulator

__all__ = ["culprits", "listed", "named"]

_NAMED = 8


def culprits(batches: Sequence[Any], accumulator: Accumulator) -> list[int]:
    """The places in the window of samples whose own loss is not finite; where they cannot run alone, their neighbours'.

    Runs the model in training mode, but for BatchNorm, where one bad sample would spoil the others: it goes by its
    running statistics. What that changes is the caller's to put back.
    """
    found: list[int] = []
    start = 0
    with ExitStack() as stack, torch.no_grad(), accumulator.precision.autocast():
        for layer in accumulator.model.modules():
            if has_running_statistics(layer) and layer.training:
                stack.callback(layer.eval().train)
        for batch in batches:
            size = tree.batch_size(batch)
            if not _finite(batch, accumulator):
                try:
                    singles = [_finite(single, accumulator) for single in tree.split(batch, [1] * size)]
                except (AutoaccumError, RuntimeError, ValueError):  # a layer of the user's may take no single sample
                    singles = [False] * size
                found += [start + place for place, finite in enumerate(singles) if not finite]
            start += size
    return found


def _finite(batch: Any, accumulator: Accumulator) -> bool:
    terms = accumulator.objective.terms(tree.move(batch, accumulator.device))
    # A mean over nothing is not a number either, and does not count.
    return all(bool(torch.isfinite(term.value)) for term in terms.values() if float(term.denominator))


def named(places: Sequence[int], size: int, indices: Any) -> str:
    """The samples to blame in words: by their indices in the data, else by their places in the window of `size`."""
    if not places:
        return f"no sample alone gives it; the window has {listed(range(size), indices)}"
    if len(places) == size and size > 1:
        return "every sample of the window gives it, so the weights have gone astray rather than the data"
    return f"it comes from {listed(places, indices)}"


def listed(places: Sequence[int], indices: Any) -> str:
    """The first few samples at these places of a window, and how many more."""
    names = range(max(places, default=0) + 1) if indices is None else indices
    shown = ", ".join(f"{names[place]}" for place in places[:_NAMED])
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    where = "the window" if indices is None else "the data"
    return f"sample{'s' if len(places) > 1 else ''} {shown}{more} of {where}"
