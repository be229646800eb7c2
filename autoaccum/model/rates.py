"""A plan's learning rates and settings in an optimizer's groups, and out again.

The groups are the user's, who may train with the same optimizer twice. Scaling what is scaled already would multiply
the rate at every call, so what the groups had of their own is remembered for as long as the optimizer lives.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autoaccum.planning.plan import Plan

__all__ = ["apply_plan", "scheduled", "take_back"]


@dataclass
class _Applied:
    """By group: the settings before and after. And the schedule that went on from there."""

    own: list[dict[str, Any]]
    written: list[dict[str, Any]]
    scheduler: Any = None


# On the optimizer itself, which leaves it out of its state_dict: a table of ours would hold, through the schedule,
# every optimizer that was ever trained with.
_NAME = "_autoaccum_applied"


def apply_plan(made: Plan, optimizer: Optimizer) -> None:
    """Puts the plan's rates and settings into every parameter group alike."""
    groups = optimizer.param_groups
    written = [{**({"lr": group["lr"]} if "lr" in group else {}), **made.group_settings(group)} for group in groups]
    own = [{name: _kept(group[name]) for name in new} for group, new in zip(groups, written, strict=True)]
    for group, new in zip(groups, written, strict=True):
        group.update(new)
    vars(optimizer)[_NAME] = _Applied(own, written)


def scheduled(optimizer: Optimizer, scheduler: Any) -> Any:
    """Notes that `scheduler` owns the rates that `apply_plan` wrote from here on; returns it."""
    vars(optimizer)[_NAME].scheduler = scheduler
    return scheduler


def take_back(optimizer: Optimizer) -> None:
    """Puts the groups' own settings back where an earlier plan's, or those of its schedule, still stand.

    What their owner has changed since is left as it is.
    """
    before: _Applied | None = vars(optimizer).pop(_NAME, None)
    if before is None:
        return
    rates = before.scheduler.get_last_lr() if isinstance(before.scheduler, LRScheduler) else None
    # Not strict: groups may have been added since.
    for at, (group, own, written) in enumerate(zip(optimizer.param_groups, before.own, before.written, strict=False)):
        for name, value in written.items():
            stands = rates[at] if rates is not None and name == "lr" else value
            if bool(group[name] == stands):
                group[name] = own[name]
        if "initial_lr" not in own:
            group.pop("initial_lr", None)  # of the schedule that has ended: the next counts from the rate itself


def _kept(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value  # schedules write into a rate that is a tensor
