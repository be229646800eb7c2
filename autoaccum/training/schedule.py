"""Learning-rate schedules, counted in optimizer steps: one step per update, whatever k and the ranks."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR

from autoaccum.errors import SetupError, shown
from autoaccum.planning.learning_rate import number

__all__ = ["build_schedule", "check_schedule", "schedule_name"]

_RATES = ("lr", "initial_lr", "max_lr")  # of a group, that building a schedule may write


def build_schedule(
    schedule: str | Callable[[Optimizer], Any],
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    total_steps: int | None,
    tell: Callable[[str], None] = lambda text: None,
) -> Any:
    """The scheduler, or None where the rate never changes.

    Args:
        schedule: "constant", "linear" or "cosine" (down to 0 at `total_steps`), or `f(optimizer) -> LRScheduler`.
        optimizer: whose groups' rates are the peak.
        warmup_steps: optimizer steps over which the rate rises linearly from 1/warmup_steps of the peak.
        total_steps: optimizer steps in the whole training; None where nobody knows.
        tell: hears, in one line, of a schedule of the user's own that has rates of its own.

    Raises:
        SetupError: a schedule that needs a length the data does not have, or what the function gave is no schedule of
            this optimizer and its rates, or is over before the training.
    """
    check_schedule(schedule, warmup_steps)
    if callable(schedule):
        before = _rates(optimizer)
        made = schedule(optimizer)
        _check_own(made, before, optimizer, tell)
        if isinstance(made, OneCycleLR) and total_steps is not None and made.total_steps < total_steps:
            raise SetupError(
                f"OneCycleLR has total_steps={made.total_steps}, and the training takes {total_steps} optimizer steps: "
                f"give total_steps={total_steps}, and count optimizer steps, not micro-batches"
            )
        if total_steps is None and any(isinstance(part, OneCycleLR) for part in _parts(made)):
            tell("OneCycleLR raises once its total_steps are taken, and how many this stream gives is not known: give "
                 "max_steps, so that it ends in time")  # fmt: skip
        return made
    if schedule == "constant" and warmup_steps == 0:
        return None
    if schedule != "constant" and total_steps is None:
        raise SetupError(
            f"schedule={shown(schedule)} must know where it ends, and this stream has no length: give max_steps"
        )
    return LambdaLR(optimizer, _factor(schedule, warmup_steps, total_steps or 0))


def check_schedule(schedule: Any, warmup_steps: Any) -> None:
    """Refuses, by name, what is no schedule, and no number of warm-up steps for it, before anything runs."""
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or not 0 <= warmup_steps < 2**63:
        raise SetupError(f"warmup_steps={shown(warmup_steps)}: give a whole number of optimizer steps, 0 or more")
    if callable(schedule):
        if warmup_steps:
            raise SetupError(
                f"warmup_steps={warmup_steps} beside a schedule of your own: put the warm-up into the schedule"
            )
    elif not isinstance(schedule, str) or schedule not in ("constant", "linear", "cosine"):
        raise SetupError(
            f'schedule={shown(schedule)}: choose "constant", "linear", "cosine" or a function of the optimizer'
        )


def schedule_name(scheduler: Any) -> str | None:
    """Its class, with those of the schedulers it is made of, in order; None where the rate never changes."""
    if scheduler is None:
        return None
    inner = ", ".join(str(schedule_name(each)) for each in getattr(scheduler, "_schedulers", ()))
    return f"{type(scheduler).__name__}({inner})" if inner else type(scheduler).__name__


def _check_own(
    made: Any, before: list[dict[str, float | None]], optimizer: Optimizer, tell: Callable[[str], None]
) -> None:
    """Whether what the user's function made is a schedule of this optimizer that counts from its rates.

    A schedule counts from the rates that stood when it was made. One that was made before the plan scaled them, which
    are `before`, would take them back after the first step.
    """
    if not all(callable(getattr(made, name, None)) for name in ("step", "state_dict", "load_state_dict")):
        raise SetupError(
            f"schedule= gave {shown(made)}, which is no schedule: return something with step(), state_dict() and "
            "load_state_dict(), such as torch.optim.lr_scheduler.LambdaLR(optimizer, ...)"
        )
    for part in _parts(made):
        other = getattr(part, "optimizer", optimizer)
        if isinstance(other, Optimizer) and other is not optimizer:
            raise SetupError(
                f"schedule= gave a {type(part).__name__} of another optimizer, a {type(other).__name__}, so the rates "
                "that are trained with would never change: build it on the optimizer that the function is given, "
                f"schedule=lambda optimizer: {type(part).__name__}(optimizer, ...)"
            )
    peaks = [rates["lr"] if rates["initial_lr"] is None else rates["initial_lr"] for rates in before]
    for part in _parts(made):
        found = _differing(getattr(part, "base_lrs", ()), peaks)
        # A cycle has a lowest and a highest rate of its own: the highest may be these.
        one_cycle = isinstance(part, OneCycleLR)
        highest = [group["max_lr"] for group in optimizer.param_groups] if one_cycle else getattr(part, "max_lrs", None)
        if found is None or (highest is not None and _differing(highest, peaks) is None):
            continue
        own, peak = found
        # What builds a schedule writes the rates it counts from; but a CyclicLR does not, beside an older schedule's.
        if before == _rates(optimizer) and not isinstance(part, CyclicLR):
            raise SetupError(
                f"schedule= gave a {type(part).__name__} that was built before the plan's rate was set: it counts from "
                f"{number(own)}, and the plan's rate is {number(peak)}, which would hold for the first step only: "
                f"build it inside the function, schedule=lambda optimizer: {type(part).__name__}(optimizer, ...), or "
                'keep the optimizer\'s rate with lr_rule="none"'
            )
        tell(
            f"the schedule sets its own rates, a {type(part).__name__} that counts from {number(own)}, and the plan's "
            f"rate of {number(peak)} is not used: give the schedule rates that suit the target batch"
        )
        return


def _parts(scheduler: Any) -> Iterator[Any]:
    """The schedulers that a scheduler is made of, in order, itself first."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _parts(inner)


def _rates(optimizer: Optimizer) -> list[dict[str, float | None]]:
    """Each group's, copied: where a rate is a tensor, schedules write into it."""
    groups = optimizer.param_groups
    return [{name: None if group.get(name) is None else float(group[name]) for name in _RATES} for group in groups]


def _differing(rates: Any, peaks: list[float | None]) -> tuple[float, float] | None:
    """The first of `rates` that is not its group's peak, and that; None where all are, or there are none to compare."""
    for rate, peak in zip(rates, peaks, strict=False):
        if rate is not None and peak is not None and not math.isclose(float(rate), peak, rel_tol=1e-6):
            return float(rate), peak
    return None


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
