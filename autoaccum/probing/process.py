"""What the process needs beyond PyTorch's count, where its own memory is limited.

Libraries keep kernels and scratch for each shape they have met, and an allocator cannot give back what lies between
live blocks: what rests in the process between steps grows with every size that is run. What a step needs above that
hardly depends on the size.
"""

from collections.abc import Callable

import torch

from autoaccum.memory.watch import ProcessGrowth
from autoaccum.units import format_bytes

__all__ = ["ProcessNeeds"]

# Of a process's limit. What libraries will take for a size that was not run is known to about a hundredth; and a size
# that ran leaves so much that one next to it, in the same window, may be new to them once more. Several threads: MKL
# adds up a weight's gradient in a buffer for each where there is room, and keeps them. A window's first micro-batch,
# with no gradients there yet, has room that a trial has not: 6 of 105 MiB and 10 of 186 were taken so.
UNKNOWN, UNKNOWN_BY_THREADS, CUSHION = 0.01, 0.07, 0.005


class ProcessNeeds:
    """Measured from step to step; of no account where the budget counts PyTorch's bytes alone."""

    def __init__(self, growth: ProcessGrowth, held: Callable[[], int]) -> None:
        self.growth = growth
        self._held, self._held_at_start = held, held()
        self._needs = 0  # beyond PyTorch's count, in the last step
        self._passing = 0  # of that, what it needed above what rests
        self._rest = 0  # beyond PyTorch's count, between steps
        self._left = self._once = 0  # what the last step left resting, and what of that it will not leave again

    @property
    def counted(self) -> bool:
        """Whether the budget counts the whole process."""
        return self.growth.counts

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

    def budget(self, limit: int) -> int:
        """Bytes that PyTorch may have in use under a `limit` in bytes, by what the steps so far showed."""
        if self.growth.bytes is None:
            return limit
        return int(limit * (1.0 - _unknown())) - self._needs - self._more()

    @property
    def reason(self) -> str:
        """Why that is less than the limit, as the end of a sentence."""
        return (
            f"the process was measured to need {format_bytes(self._needs)} more than PyTorch counts, "
            f"{format_bytes(self._more())} more with another size, and {_unknown():.0%} is kept for what is not known"
        )

    def within(self, limit: int) -> bool:
        """Whether the last step left `limit` bytes whole."""
        return self._held_at_start + (self.growth.bytes or 0) <= limit * (1.0 - CUSHION)

    def near(self, limit: int) -> bool:
        """Whether the process has come so near to `limit` bytes that an error may well be for want of memory."""
        now = self.growth.now()
        return now is not None and self._held_at_start + now >= 0.5 * limit

    def _more(self) -> int:
        """How many more bytes beyond PyTorch's count the next step will need than the last."""
        return max(0, self._rest + self._passing - self._once - self._needs)

    def _at_rest(self) -> int:
        """Bytes beyond PyTorch's count that the process has between two steps, above where it stood at first."""
        return (self.growth.now() or 0) - (self._held() - self._held_at_start)


def _unknown() -> float:
    return UNKNOWN if torch.get_num_threads() == 1 else UNKNOWN_BY_THREADS
