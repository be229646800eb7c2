"""The moment at which a window begins, so that it can be run again as if it had not begun."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoaccum.random_state import RandomState

__all__ = ["WindowStart"]


class WindowStart:
    """The buffers and random generators as they are when a window begins."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        device: torch.device,
        noted: Callable[[], Any] | None = None,
        without: Collection[nn.Module] = (),
    ) -> None:
        """Looks the modules up; `mark` keeps. `noted`: what else notes something, and goes back with `restore()`.

        `without`: layers in them whose buffers are not kept.
        """
        self._device, self._noted = device, noted if noted is not None else lambda: None
        # The dicts themselves, of layers without buffers too: a first forward may add one, and the walk takes long.
        layers = [layer for module in modules for layer in module.modules() if layer not in without]
        self._owners = [layer._buffers for layer in layers]
        # TorchScript's are views of the layer in C++, in which no other object can be put.
        self._rebound = [layer._buffers for layer in layers if not isinstance(layer, torch.jit.ScriptModule)]
        self._entries: list[dict[str, Tensor | None]] = []
        self._buffers: list[Tensor] = []
        self._saved: list[Tensor] = []
        self._random: RandomState | None = None

    def mark(self, random: RandomState | None = None) -> None:
        """Keeps the state of this moment; `random` is that of the generators, where it is known."""
        buffers = [buffer for owner in self._owners for buffer in owner.values() if buffer is not None]
        if len(buffers) != len(self._buffers) or any(a is not b for a, b in zip(buffers, self._buffers)):
            self._buffers = buffers
            self._saved = [buffer.detach().clone() for buffer in buffers]
            self._entries = [dict(owner) for owner in self._rebound]
        elif buffers:
            with torch.no_grad():
                torch._foreach_copy_(self._saved, buffers)
        self._random = RandomState(self._device, quick=True) if random is None else random
        self._notes = self._noted()

    def restore(self) -> None:
        """Puts the state of `mark` back."""
        self.restore_buffers()
        if self._random is not None:
            self._random.restore()
            if self._notes is not None:
                self._notes.restore()

    def restore_buffers(self) -> None:
        """Puts the buffers back; the generators go on."""
        if self._buffers:
            with torch.no_grad():
                torch._foreach_copy_(self._buffers, self._saved)
        # `self.seen = self.seen + 1` puts another tensor in a buffer's place.
        for owner, entries in zip(self._rebound, self._entries):
            owner.clear()
            owner.update(entries)
