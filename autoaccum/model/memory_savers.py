"""The ladder: what makes a step smaller when not even one sample fits, in the order of what it costs.

    chunked_loss              a head over many classes and its cross entropy are computed some rows at a time
    bf16                      autocast: most activations in half the bytes, and bf16's rounding
    checkpointing/4, /2       each fourth or second of the repeated blocks keeps its inputs only, and runs again
    selective_checkpointing   all of them, but matrix products are kept
    checkpointing             all of them
    save_on_cpu               what the forward keeps for the backward waits in the host's memory
    …+…                       both

Only bf16 changes numbers. The others give the plain step's gradients. A rung is installed for as long as something runs
under it: the model's class, its `state_dict` and its own settings are then as before.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from autoaccum.model.checkpointing import How, checkpointed, why_not
from autoaccum.model.host_saving import SavedOnHost
from autoaccum.model.lazy_logits import LEAST_CLASSES, chunked, heads

__all__ = ["CHANGES", "RUNGS", "installed", "obstacle"]

RUNGS = {
    "chunked_loss": "a head's logits are computed with their loss, some rows at a time, and never held together",
    "bf16": "autocast rounds most of the forward pass to bf16; slow where the device has none of its own",
    "checkpointing/4": "each fourth of the repeated blocks runs once more in the backward pass, for the same gradients",
    "checkpointing/2": "each second of the repeated blocks runs once more in the backward pass, for the same gradients",
    "selective_checkpointing": "the repeated blocks run once more in the backward pass, but for their matrix products",
    "checkpointing": "the repeated blocks run once more in the backward pass, for the same gradients",
    "chunked_loss+checkpointing": "logits are never held together, and the repeated blocks run once more in the "
    "backward pass",
    "save_on_cpu": "activations wait in the host's memory, and travel there and back in every micro-batch",
    "checkpointing+save_on_cpu": "the repeated blocks run once more in the backward pass, and their inputs wait in the "
    "host's memory",
}

CHANGES = frozenset({"bf16"})
"""Rungs under which the result is not the plain step's."""


def obstacle(rung: str, model: nn.Module, device: torch.device, precision: str) -> str | None:
    """Why a rung cannot be taken at all, in a few words; None where it can be tried.

    Args:
        rung: one of RUNGS.
        model: which would be trained under it.
        device: where.
        precision: as the user gave it; what was asked for by name is not changed.
    """
    for saver in rung.split("+"):
        why = _obstacle(saver, model, device, precision)
        if why is not None:
            return why
    return None


def _obstacle(saver: str, model: nn.Module, device: torch.device, precision: str) -> str | None:
    if saver == "bf16":
        return None if precision == "auto" else f'precision="{precision}" was asked for'
    if saver == "chunked_loss":
        return None if heads(model) else f"no head was found: a linear layer over {LEAST_CLASSES:,} classes or more"
    if saver == "save_on_cpu":
        cpu = device.type == "cpu"
        return "frees nothing here, since the training is in the host's memory already" if cpu else None
    return why_not(model, How.named(saver))


@contextmanager
def installed(rung: str | None, model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model runs under `rung` inside; bf16 is the Precision's part, and changes nothing here."""
    with ExitStack() as stack:
        for saver in rung.split("+") if rung is not None else ():
            if saver == "chunked_loss":
                stack.enter_context(chunked(model))
            elif saver == "save_on_cpu":
                stack.enter_context(SavedOnHost(model, device))
            elif saver != "bf16":
                stack.enter_context(checkpointed(model, How.named(saver)))
        yield
