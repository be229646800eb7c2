"""The next micro-batch's copy to a CUDA device, on its way while the backward pass of the one before runs.

It goes through pinned memory on a stream of its own, into blocks that the usual stream allocated: the allocator sees
one stream, and the forecast one batch more from a forward pass to the end of its backward pass. Two are there at most.
On the CPU batches are where they are needed; on other accelerators each is copied when it is.
"""

from collections.abc import Sequence
from typing import Any

import torch

from autoaccum.data import tree

__all__ = ["Ahead"]


class Ahead:
    """Places the micro-batches of a window on the device."""

    def __init__(self, device: torch.device, streams: Any = None) -> None:
        """`streams` makes streams as torch.cuda does; None: that does for a CUDA device, and nothing for others."""
        self._device = device
        self._streams = torch.cuda if streams is None and device.type == "cuda" else streams
        self._side: Any = None
        self._batches: Sequence[Any] = ()
        self._taken = 0
        self._sent: tuple[Any, Any] | None = None  # a batch, and its copy on the device

    def open(self, batches: Sequence[Any], *, rehearses: bool) -> None:
        """The batches of a window. In a rehearsal the first follows the last, so that one takes what several do."""
        self._batches, self._taken = [*batches, *batches[:rehearses]], 0

    def take(self, batch: Any) -> Any:
        """The batch on the device; those of a window in its order."""
        sent = self._sent
        self.wait()
        self._taken += 1
        return sent[1] if sent is not None and sent[0] is batch else tree.move(batch, self._device)

    def send(self) -> None:
        """Starts the copy of the batch that follows, once the device has been given the forward pass of this one."""
        if self._streams is None or self._taken >= len(self._batches):
            return
        batch = self._batches[self._taken]
        tensors = [tensor for _, tensor in tree.tensors(batch)]
        if tree.flat_size(batch) is None or any(tensor.layout is not torch.strided for tensor in tensors):
            return  # what knows itself how it is moved
        if self._side is None:
            self._side = self._streams.Stream(self._device)
        copy = tree.map_tensors(lambda tensor: torch.empty_like(tensor, device=self._device), batch)
        self._sent = (batch, copy)
        # What used those blocks before may not have run yet.
        self._side.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._side):
            for (_, block), tensor in zip(tree.tensors(copy), tensors):
                pins = self._device.type == "cuda" and not tensor.is_pinned()
                block.copy_(tensor.pin_memory() if pins else tensor, non_blocking=True)

    def wait(self) -> None:
        """What the device is given from here on runs after the copy; nothing is on its way any more."""
        if self._sent is not None:
            self._streams.current_stream(self._device).wait_stream(self._side)
        self._sent = None

    def close(self) -> None:
        """Forgets the window."""
        self.wait()
        self._batches = ()
