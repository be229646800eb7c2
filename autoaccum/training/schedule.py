"""Learning-rate schedules, counted in optimizer steps: one step per update, whatever k and the ranks."""

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from autoaccum.errors import SetupError

__all__ = ["build_schedule"]


def build_schedule(
    schedule: str | Callable[[Optimizer], Any], optimizer: Optimizer, *, warmup_steps: int, total_steps: int | None
) -> Any:
    """The scheduler, or None where the rate never changes.

    Args:
        schedule: "constant", "linear" or "cosine" (down to 0 at `total_steps`), or `f(optimizer) -> LRScheduler`.
        optimizer: whose groups' rates are the peak.
        warmup_steps: optimizer steps over which the rate rises linearly from 1/warmup_steps of the peak.
        total_steps: optimizer steps in the whole training; None where nobody knows.

    Raises:
        SetupError: an unknown name, a schedule that needs a length the data does not have, or bad warm-up steps.
    """
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise SetupError(f"warmup_steps={warmup_steps!r}: give a whole number of optimizer steps, 0 or more")
    if callable(schedule):
        if warmup_steps:
            raise SetupError(
                f"warmup_steps={warmup_steps} beside a schedule of your own: put the warm-up into the schedule"
            )
        return schedule(optimizer)
    if schedule not in ("constant", "linear", "cosine"):
        raise SetupError(f'schedule={schedule!r}: choose "constant", "linear", "cosine" or a function of the optimizer')
    if schedule == "constant" and warmup_steps == 0:
        return None
    if schedule != "constant" and total_steps is None:
        raise SetupError(
            f"schedule={schedule!r} must know where it ends, and this stream has no length: give max_steps"
        )
    return LambdaLR(optimizer, _factor(schedule, warmup_steps, total_steps or 0))


def _factor(schedule: str, warmup: int, total: int) -> Callable[[int], float]:
    """The factor on the peak rate at each step. A function: a checkpoint leaves it out, so what was asked for holds."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor
