"""The smallest micro-batch that a model takes."""

from typing import Any

import torch

from autoaccum.batch_norm.pooled_statistics import needs_two
from autoaccum.data import tree
from autoaccum.data.source import Source
from autoaccum.interrupts import interruptible
from autoaccum.loss.objective import Objective
from autoaccum.model.given_model import has_batch_norm
from autoaccum.model.precision import Precision
from autoaccum.model.shards import reset_all

__all__ = ["smallest_micro_batch"]


def smallest_micro_batch(objective: Objective, source: Source, device: torch.device, precision: Precision) -> int:
    """1, or 2 where a BatchNorm sees one value a channel in a single sample, which is then tried.

    The caller puts the model into training mode, and back to how it was.
    """
    if not has_batch_norm(objective.model):
        return 1
    batch: Any = tree.move(source.trial(1), device)
    try:
        # With gradients on: a model may ask for some inside its forward, as force fields do.
        with precision.autocast():
            interruptible(objective.forward, batch)
    except (ValueError, RuntimeError, torch.jit.Error) as error:  # a compiled model wraps the layer's ValueError
        if not needs_two(error):
            raise
        reset_all([objective.model])
        return 2
    return 1
