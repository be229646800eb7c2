"""What a step may take, as the budget counts it: by what was given, and by what the process needs beside PyTorch.

Where a process's own memory is limited, libraries keep kernels and scratch for each shape they have met, and an
allocator cannot give back what lies between live blocks: what rests in the process between steps grows with every size
that is run. What a step needs above that hardly depends on the size. It is measured from step to step; where the budget
counts PyTorch's bytes alone it is of no account.
"""

from collections.abc import Callable

import torch

from autoaccum.memory.budget import Budget, Device
from autoaccum.memory.watch import ProcessGrowth
from autoaccum.units import format_bytes

__all__ = ["Allowance"]

# Of what is free on a device, where others may take some of it.
SPARE = 0.01
# Of a process's limit. What libraries will take for a size that was not run is known to about a hundredth; and a size
# that ran leaves so much that one next to it, in the same window, may be new to them once more. Several threads: MKL
# adds up a weight's gradient in a buffer for each where there is room, and keeps them. A window's first micro-batch,
# with no gradients there yet, has room that a trial has not: 6 of 105 MiB and 10 of 186 were taken so.
UNKNOWN, UNKNOWN_BY_THREADS, CUSHION = 0.01, 0.07, 0.005


class Allowance:
    """The budget of steps.

    Attributes:
        given: the budget, before what the process itself was found to need.
        growth: of the process, measured around each step.
        held: tells the bytes that the training holds between two steps.
        caches: an allocator keeps what is freed, so that what it reserves is counted.
        suffers: on the CPU a budget in PyTorch's bytes is only counted; everything else runs out of memory.
    """

    def __init__(self, given: Budget, device: Device, growth: ProcessGrowth, held: Callable[[], int]) -> None:
        """`growth` was made when the budget was read, so that what happened since counts."""
        self.given, self.growth, self.held = given, growth, held
        self.caches = device.reserved() is not None
        self.suffers = device.type != "cpu" or given.kind != "torch"
        self._held_at_start = held()
        self._needs = 0  # beyond PyTorch's count, in the last step
        self._passing = 0  # of that, what it needed above what rests
        self._rest = 0  # beyond PyTorch's count, between steps
        self._left = self._once = 0  # what the last step left resting, and what of that it will not leave again

    @property
    def bytes(self) -> int:
        """Bytes that PyTorch may have in use, by what the steps so far showed."""
        if self.growth.bytes is None:
            return self.given.bytes
        return int(self.given.bytes * (1.0 - _unknown())) - self._needs - self._more()

    @property
    def reason(self) -> str:
        """Where the budget comes from, in one line."""
        if self.bytes == self.given.bytes:
            return self.given.reason
        return (
            f"{self.given.reason}; {format_bytes(self.bytes)} of it for PyTorch, since the process was measured to "
            f"need {format_bytes(self._needs)} more than PyTorch counts, {format_bytes(self._more())} more with "
            f"another size, and {_unknown():.0%} is kept for what is not known"
        )

    @property
    def room(self) -> float:
        """What a forecast may come to: an allocator that retries at every window is slow, so it leaves some free."""
        # None of a hard budget: what was run there without a retry runs in training without one.
        return self.bytes * (1.0 - (SPARE if self.caches and not self.given.hard else 0.0))

    def kept(self, peak: int) -> bool:
        """Whether the last step, which took `peak` bytes by PyTorch's count, left it whole."""
        if not self.growth.counts:
            return peak <= self.given.bytes
        return self._held_at_start + (self.growth.bytes or 0) <= self.given.bytes * (1.0 - CUSHION)

    @property
    def nearly_spent(self) -> bool:
        """Whether the process has come so near to it that an error may well be for want of memory."""
        now = self.growth.now()
        return now is not None and self._held_at_start + now >= 0.5 * self.given.bytes

    def step_begins(self) -> None:
        """Reads what rests in the process."""
        self._rest = self._at_rest()

    def step_peaked(self, peak: int) -> None:
        """The step was measured: it took `peak` bytes by PyTorch's count."""
        if self.growth.bytes is not None:
            self._needs = self.growth.bytes - (peak - self._held_at_start)
            self._passing = self._needs - self._rest

    def step_ends(self, *, ran: bool) -> None:
        """Reads what rests now; where the step left more behind than the one before, that happened once."""
        before, self._rest = self._rest, self._at_rest()
        if ran:
            self._once, self._left = max(0, self._rest - before - self._left), self._rest - before

    def _more(self) -> int:
        """How many more bytes beyond PyTorch's count the next step will need than the last."""
        return max(0, self._rest + self._passing - self._once - self._needs)

    def _at_rest(self) -> int:
        """Bytes beyond PyTorch's count that the process has between two steps, above where it stood at first."""
        return (self.growth.now() or 0) - (self.held() - self._held_at_start)


def _unknown() -> float:
    return UNKNOWN if torch.get_num_threads() == 1 else UNKNOWN_BY_THREADS
