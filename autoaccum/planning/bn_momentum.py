"""BatchNorm under accumulation: the momentum with which k small updates move as far as one, and the lines that say so.

A BatchNorm layer updates its running statistics r at every forward, r <- (1 - m) r + m x. A window of k micro-batches
does so k times, and r forgets (1 - m)^k of its past instead of (1 - m). The momentum m' = 1 - (1 - m)^(1/k) restores
that, and is exact for statistics x that are alike in all micro-batches. They are not: the mean is 2e-3 off and the
variance 4e-2 (a small batch's variance misses what lies between the batches), where pooling the window's statistics is
exact. So pooling is what training does by default; the momentum is named for mode "momentum" and for loops that cannot
pool.
"""

import math
from numbers import Real

from autoaccum.errors import PlanError, shown

__all__ = ["MODES", "bn_momentum", "mode_reason", "momentum_reason"]

MODES = ("pooled", "momentum", "keep")
_FEW = 16  # below this a micro-batch's own mean and variance are too noisy to normalise by


def bn_momentum(momentum: float | None, k: int) -> float | None:
    """The momentum with which k updates forget as much of the past as one update with `momentum`: 1 - (1 - m)^(1/k).

    None is a cumulative average, which has no momentum to change; with k of 0 or 1 it stays what it is.
    """
    if momentum is None:
        return None
    if isinstance(momentum, bool) or not isinstance(momentum, Real) or not 0 <= momentum <= 1:
        raise PlanError(
            f"bn_momentum={shown(momentum)} is not a momentum: it is the weight of the newest statistics, "
            "so give a number from 0 to 1 (BatchNorm's default is 0.1), or None for a cumulative average"
        )
    if k <= 1 or momentum == 1:
        return float(momentum)
    # expm1 and log1p keep the digits that 1 - (1 - m) ** (1 / k) loses for a small m or a large k.
    return -math.expm1(math.log1p(-momentum) / k)


def momentum_reason(momentum: float | None, k: int, mode: str) -> str:
    """One line on the plan's `bn_momentum`: its value, the formula, and whether the mode uses it."""
    if momentum is None:
        return "None: the layers keep a cumulative average, which has no momentum"
    if k <= 1:
        return f"{momentum:.4g}: the layers' own, for one update a window"
    formula = f"{bn_momentum(momentum, k):.4g} = 1 − (1 − {momentum:.4g})^(1/{k})"
    used = {
        "pooled": "for loops that cannot pool the statistics",
        "momentum": "what the layers train with",
        "keep": "not used, since the layers keep their own",
    }[mode]
    return f"{formula}, so that {k} updates forget as much as one: {used}"


def mode_reason(mode: str, window: int, sizes: tuple[int, ...], ranks: int) -> str:
    """One line on the running statistics under `mode`, and on what no mode changes: a micro-batch normalises by itself.

    A `window` is in samples over all ranks, `sizes` are this rank's micro-batches.
    """
    k = len(sizes)
    if k <= 1 and ranks == 1:
        text = f"{mode}: one micro-batch is the whole window, which BatchNorm sees at once"
    else:
        text = {
            "pooled": f"pooled: running statistics are updated once a window, from all of its {window} samples",
            "momentum": f"momentum: {k} updates a window by the momentum above, nearly what one large update gives",
            "keep": f"keep: {k} updates a window by the layers' own momentum, which forgets the past sooner",
        }[mode]
        text += "; a forward still normalises by its own micro-batch (Ghost BatchNorm, Hoffer 2017)"
    if sizes and min(sizes) < _FEW:
        text += f". Caution: {min(sizes)} samples are few to normalise by (under {_FEW}); GroupNorm does not mind"
    return text
