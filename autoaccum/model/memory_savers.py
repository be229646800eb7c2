"""The ladder: what makes a step smaller when not even one sample fits, in the order of what it costs.

A rung is one saver, or two with a plus. It is installed for as long as something runs under it: the model's class, its
`state_dict` and its own settings are then as before.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from autoaccum.model.checkpointing import How, checkpointed, why_not
from autoaccum.model.compiled import BUDGETS, Compiled
from autoaccum.model.host_saving import SavedOnHost
from autoaccum.model.lazy_logits import LEAST_CLASSES, chunked, heads
from autoaccum.model.optimizer_on_host import OptimizerOnHost
from autoaccum.model.step_apart import why_not_apart

__all__ = ["BY_NAME", "CHANGES", "RUNGS", "installed", "obstacle"]

_AGAIN = "of the repeated blocks runs once more in the backward pass, for the same gradients"
_BUDGET = "of what the compiled model would keep for the backward pass is kept, and the rest is computed again"

RUNGS = {
    "chunked_loss": "a head's logits are computed with their loss, some rows at a time, and never held together",
    "bf16": "autocast rounds most of the forward pass to bf16; slow where the device has none of its own",
    "activation_memory_budget/0.5": f"half {_BUDGET}",
    "activation_memory_budget/0.2": f"a fifth {_BUDGET}",
    "checkpointing/4": f"each fourth {_AGAIN}",
    "checkpointing/2": f"each second {_AGAIN}",
    "selective_checkpointing": "the repeated blocks run once more in the backward pass, but for their matrix products",
    "checkpointing": f"each {_AGAIN}",
    "chunked_loss+checkpointing": f"logits are never held together, and each {_AGAIN}",
    "save_on_cpu": "activations wait in the host's memory, and travel there and back in every micro-batch",
    "checkpointing+save_on_cpu": f"each {_AGAIN}, and their inputs wait in the host's memory",
    "optimizer_on_host": "the optimizer's state waits in the host's memory, and travels there and back in every step",
    "step_in_backward": "each gradient is stepped with and freed as it comes, so that a window cannot run again",
}
"""What each does and costs, in words."""

CHANGES = frozenset({"bf16"})
"""Rungs under which the result is not the plain step's."""

BY_NAME = frozenset({"optimizer_on_host", "step_in_backward"})
"""Rungs that are taken only where they are asked for."""


def obstacle(
    rung: str, model: nn.Module, device: torch.device, precision: str, *, optimizers: Sequence[Optimizer] = (),
    compiled: Compiled | None = None,
) -> str | None:  # fmt: skip
    """Why a rung cannot be taken at all, in a few words; None where it can be tried.

    Args:
        rung: one of RUNGS.
        model: which would be trained under it.
        device: where.
        precision: as the user gave it; what was asked for by name is not changed.
        optimizers: that step it.
        compiled: its compiled forward, where it has one.
    """
    savers = rung.split("+")
    if device.type == "cpu" and not {"save_on_cpu", "optimizer_on_host"}.isdisjoint(savers):
        return "frees nothing here, since the training is in the host's memory already"
    if rung == "bf16":
        return None if precision == "auto" else f'precision="{precision}" was asked for'
    if rung in BY_NAME:
        return why_not_apart(optimizers)
    if rung in BUDGETS:
        return "the model is not compiled: give compile=True" if compiled is None else None
    if "chunked_loss" in savers and not heads(model):
        return f"no head was found: a linear layer over {LEAST_CLASSES:,} classes or more"
    hows = [How.named(saver) for saver in savers if "checkpointing" in saver]
    return next((why for how in hows if (why := why_not(model, how)) is not None), None)


@contextmanager
def installed(
    rung: str | None, model: nn.Module, device: torch.device, *, optimizers: Sequence[Optimizer] = (),
    compiled: Compiled | None = None,
) -> Iterator[None]:  # fmt: skip
    """The model runs under `rung` inside; bf16 and step_in_backward are the window's part, and change nothing here."""
    with ExitStack() as stack:
        for saver in rung.split("+") if rung is not None else ():
            if saver == "chunked_loss":
                stack.enter_context(chunked(model))
            elif saver == "save_on_cpu":
                stack.enter_context(SavedOnHost(model, device))
            elif saver == "optimizer_on_host":
                for optimizer in optimizers:
                    stack.enter_context(OptimizerOnHost(optimizer, device))
            elif saver in BUDGETS and compiled is not None:
                stack.enter_context(compiled.within(BUDGETS[saver]))
            elif "checkpointing" in saver:
                stack.enter_context(checkpointed(model, How.named(saver)))
        yield
