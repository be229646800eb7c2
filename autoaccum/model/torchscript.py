"""What a layer was before it was compiled to TorchScript, which keeps no more of it than its name."""

import torch
from torch import nn

__all__ = ["layer_class"]


def layer_class(module: nn.Module) -> type:
    """The module's class; that of torch.nn which it was compiled from, where it is TorchScript."""
    if not isinstance(module, torch.jit.ScriptModule):
        return type(module)
    original = getattr(nn, module.original_name, None)
    return original if isinstance(original, type) else type(module)
