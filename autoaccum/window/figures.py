"""Numbers on their way from a device to the host, which nobody has to wait for yet.

A copy to pinned memory is queued behind what makes the numbers. Reading them waits until that has run, and not for what
was queued since: of a loss that is fetched before its backward pass, the forward pass.
"""

import torch
from torch import Tensor

__all__ = ["Figures"]


class Figures:
    """The values of one tensor."""

    def __init__(self, values: Tensor) -> None:
        """Begins to fetch them; other devices than CUDA's are waited for when they are read."""
        self._values, self._event = values.detach(), None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """All of them, in order."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values.reshape(-1).tolist()]
