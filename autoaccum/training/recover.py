"""Out of memory in mid-training: the same window again, the same samples, in more pieces.

The failed attempt leaves nothing behind: its gradients and pooled statistics are dropped, every buffer and random
generator returns to the window's start. The restart happens outside the `except` block, since the traceback holds the
tensors of the step that failed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoaccum.data import tree
from autoaccum.memory.device import Device
from autoaccum.planning.split import even_split
from autoaccum.window.snapshot import RandomState

__all__ = ["WindowStart", "cut_smaller"]


class WindowStart:
    """The buffers and random generators as they are when a window begins."""

    def __init__(self, model: nn.Module, device: Device) -> None:
        """Reserves room for one copy of the buffers; `mark` fills it."""
        self._model, self._device = model, device.torch_device
        self._buffers: list[Tensor] = []
        self._saved: list[Tensor] = []
        self._random: RandomState | None = None

    def mark(self) -> None:
        """Keeps the state of this moment."""
        buffers = list(self._model.buffers())
        if len(buffers) != len(self._buffers) or any(a is not b for a, b in zip(buffers, self._buffers)):
            self._buffers = buffers
            self._saved = [buffer.detach().clone() for buffer in buffers]
        elif buffers:
            with torch.no_grad():
                torch._foreach_copy_(self._saved, buffers)
        self._random = RandomState(self._device)

    def restore(self) -> None:
        """Puts the state of `mark` back."""
        with torch.no_grad():
            if self._buffers:
                torch._foreach_copy_(self._buffers, self._saved)
        if self._random is not None:
            self._random.restore()


def cut_smaller(batches: Sequence[Any], limit: int, minimum: int) -> list[Any]:
    """The same samples in the same order, in micro-batches of at most `limit`."""
    smaller = []
    for batch in batches:
        smaller += tree.split(batch, even_split(tree.batch_size(batch), limit, minimum=minimum))
    return smaller
