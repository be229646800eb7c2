"""A forward pass that leaves no trace: questions are asked of a model before it is trained."""

from types import TracebackType
from typing import Any

import torch
from torch import nn

from autoaccum.interrupts import uninterrupted
from autoaccum.model.contents import Contents
from autoaccum.random_state import RandomState

__all__ = ["Untouched"]


class Untouched:
    """What a forward may change, at one moment: all that its owners hold but parameters' numbers, and generators.

    A context that puts it back at its end; or call `restore()`. Lazy layers take their shapes and keep them.
    """

    def __init__(self, *owners: Any, device: torch.device) -> None:
        """Copies it: of modules, of a step or a loss with a state of its own; `device`'s generator beside the CPU's."""
        self._contents = Contents(*owners)
        moving = [tensor for tensor in self._contents.tensors if not isinstance(tensor, nn.Parameter)]
        self._moving = [(tensor, tensor.detach().clone()) for tensor in moving]
        self._random = RandomState(device)

    def __enter__(self) -> "Untouched":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.restore()

    @uninterrupted
    def restore(self) -> None:
        """Puts it back."""
        self._contents.restore()
        with torch.no_grad():
            for tensor, saved in self._moving:
                tensor.copy_(saved)
        self._random.restore()
