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
from autoaccum.model.optimizer_on_host import OptimizerOnHost, why_not_apart
from autoaccum.settings import RUNGS

__all__ = ["BY_NAME", "CHANGES", "RUNGS", "installed", "obstacle"]

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
    if rung in BUDGETS and compiled is None:
        return "the model is not compiled: give compile=True"
    if "chunked_loss" in savers and not heads(model):
        return f"no head was found: a linear layer over {LEAST_CLASSES:,} classes or more"
    blocks = next((saver for saver in savers if "checkpointing" in saver), None)
    return None if blocks is None else why_not(model, How.named(blocks))


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
