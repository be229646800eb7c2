"""What a forward keeps for its backward waits in the host's memory, and travels there and back in every micro-batch.

Parameters and buffers stay where they are: torch's own context of that name would copy them for every layer that saves
them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from autoaccum.model.forward import StandIn

__all__ = ["SavedOnHost"]


class SavedOnHost(StandIn):
    """A model whose forward leaves what it keeps for the backward in host memory, pinned where CUDA copies from it."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__(module)
        self._pinned = device.type == "cuda"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, what it keeps on the host."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        held = (*self.module.parameters(), *self.module.buffers())
        staying = {_place(tensor) for tensor in held if tensor.layout is torch.strided}

        def pack(tensor: Tensor) -> tuple[torch.device | None, Tensor]:
            if tensor.layout is not torch.strided or _place(tensor) in staying:
                return None, tensor
            kept = torch.empty_like(tensor, device="cpu", pin_memory=self._pinned)
            kept.copy_(tensor)
            return tensor.device, kept

        def unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
            device, kept = packed
            return kept if device is None else kept.to(device, non_blocking=self._pinned)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self.forward(*args, **kwargs)


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
