"""What a loss divides by, settled before the plan is made, on a model that is held still."""

from typing import Any

import torch
from torch import nn

from autoaccum.data import tree
from autoaccum.loss.objective import Objective
from autoaccum.model.snapshot import Snapshot
from autoaccum.window.determinism import Determinism

__all__ = ["settle_loss"]


def settle_loss(model: nn.Module, objective: Objective, batch: Any, most: int, device: torch.device) -> None:
    """Runs the loss on at most `most` samples of `batch`, which lies on the host; the model is left as it was."""
    modules = [module for module in (model, objective.loss) if isinstance(module, nn.Module)]
    samples = min(most, tree.batch_size(batch))
    with (
        Snapshot(*modules, device=device, parameters=False),
        Determinism(*modules, samples=samples, device=device) as fixed,
    ):
        objective.settle([batch], samples, fixed.begin)
