"""An optimizer's step over some of its parameters, for savers that have not all of its state at once."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

__all__ = ["step_apart", "why_not_apart"]


def why_not_apart(optimizers: Sequence[Optimizer]) -> str | None:
    """Why optimizers cannot step some parameters before others to the same result; None where they can."""
    for optimizer in optimizers:
        kind = type(optimizer)
        if not kind.__module__.startswith("torch.optim."):
            return f"{kind.__name__} is none of torch's own optimizers, which step each parameter by itself"
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return f"{kind.__name__} has hooks on its step, which would run for each parameter"
    return None


def step_apart(
    step: Callable[[], Any], optimizer: Optimizer, group: dict[str, Any], parameters: Sequence[nn.Parameter]
) -> None:
    """Calls the optimizer's `step` while it knows of no more than `parameters`, of one of its groups."""
    groups, held = optimizer.param_groups, group["params"]
    optimizer.param_groups, group["params"] = [group], list(parameters)
    try:
        step()
    finally:
        optimizer.param_groups, group["params"] = groups, held
