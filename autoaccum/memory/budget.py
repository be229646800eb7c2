"""What a device is asked, and how much of it a training may use.

`Device.budget` turns the user's `memory=` into bytes with the reason beside them, and `Device.limit` holds the training
to them where the backend can. The backends are in accelerators.py and device.py, which opens them by name.

Choices:
- A budget counts all that the training holds, its parameters too. On an accelerator the allocator knows what it holds
  already; the CPU has no such allocator, so `held` says it.
- On an accelerator bytes are what PyTorch's caching allocator reserves, for that is what the driver hands out and what
  a hard limit caps. On the CPU they are what PyTorch has allocated.
- Without `memory=`, a tenth of what is available on a host stays free: available memory is the kernel's estimate, other
  programs move it, and going past it gets the process killed instead of raising an error. A limit on the data segment
  or the address space is exact and raises, so nothing is kept back there.
- A `memory=` beyond the device's total is taken as the total: no training can ever use more. On an accelerator one
  beyond what is free at the moment is taken as asked, with that said: what is free changes, the number is the user's
  word, and an overrun is an error that a probe survives. On a host it is a killed process, or a machine that comes to
  a stand: there the budget is no more than without `memory=`.
"""

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from autoaccum.units import asked_bytes, format_bytes, named

__all__ = ["Budget", "Device", "asked_bytes", "named", "plus", "row"]


@dataclass(frozen=True)
class Budget:
    """Bytes that the training may use on the device.

    Attributes:
        bytes: 0 where nothing is left.
        reason: one readable line: where the number comes from.
        hard: an overrun breaks a promise: `Device.limit` makes it an error where the backend can.
        kind: what the number counts. "torch": bytes of PyTorch's allocator. "data segment": bytes that the process may
            still map, and "host": pages that it may still touch; the process needs somewhat more of either than
            PyTorch has allocated, so a margin belongs between.
        beyond: what the user asked for, where that is more than may be used.
    """

    bytes: int
    reason: str
    hard: bool
    kind: str
    beyond: int | None = None

    def without(self, size: int, why: str) -> "Budget":
        """The budget less `size` bytes, with the reason."""
        reason = f"{self.reason}; {format_bytes(size)} less{why}"
        return replace(self, bytes=max(0, self.bytes - size), reason=reason)


class Device(ABC):
    """A place to train on. Sizes are bytes."""

    torch_device: torch.device
    name: str
    keeps = False
    """Whether freed blocks stay in the process although a limit counts them: `release` ends that."""
    spills = False
    """Whether the driver serves allocations from host memory instead of refusing them."""

    @property
    def type(self) -> str:
        """The backend: "cpu", "cuda", "xpu", "mps", and so on."""
        return self.torch_device.type

    @abstractmethod
    def total(self) -> int:
        """All of the device's memory, or what the limit that binds allows."""

    @abstractmethod
    def free(self) -> int:
        """What anyone could allocate now."""

    def budget(self, memory: int | str | None = None, *, held: int = 0) -> Budget:
        """What the training may use: all that is free and its own, or as much as `memory` says.

        Args:
            memory: None, bytes, a size such as "8GiB", or a share of the device's total such as "80%".
            held: without `memory`, on the CPU: bytes this training holds already, which count as its own.
        """
        if memory is None:
            return self._room(held)
        total = self.total()
        size, reason = asked_bytes(memory, total)
        if size > total:
            reason += f", taken as all that {self.torch_device} has"
            size = total
        free = self.free() + max(held, self.reserved() or 0)
        if size > free:
            reason += f"; only {format_bytes(free)} is free now, and a step that needs more runs out of memory"
        return Budget(size, f"{format_bytes(size)}, {reason}", True, "torch")

    def _room(self, held: int) -> Budget:
        """The budget where the user named none."""
        size, reason = self._spare()
        return Budget(size, f"{format_bytes(size)}: {reason}", self.spills, "torch")

    def _spare(self) -> tuple[int, str]:
        """What is free and what the allocator holds, less the headroom, in bytes; and these figures in words."""
        free, own, kept = self.free(), self.reserved() or 0, self.headroom()
        reason = f"{format_bytes(free)} free on {self.name}{plus(own)}"
        return max(0, free + own - kept), reason + (f", less {format_bytes(kept)} of headroom" if kept else "")

    @contextmanager
    def limit(self, budget: Budget) -> Iterator[None]:
        """Holds PyTorch's allocator to a hard budget where the backend can, and puts the limit from before back."""
        self.expect(budget, None)
        yield

    def expect(self, budget: Budget, peak: int | None) -> None:  # noqa: B027 - other allocators keep freed blocks anyway
        """Prepares for steps of `peak` bytes; None: of any size up to the budget."""

    def reset_peak(self) -> None:  # noqa: B027 - a backend that counts no peaks has none to reset
        """Lets `peak` and `reserved_peak` start anew from what is allocated now."""

    def peak(self) -> int | None:
        """The most that PyTorch had allocated since `reset_peak`; None where the backend does not count."""
        return self._figure("peak")

    def reserved_peak(self) -> int | None:
        """The most that PyTorch's allocator had reserved since `reset_peak`; None where it does not count."""
        return self._figure("reserved_peak")

    def retries(self) -> int:
        """How often, in this process, the allocator found no memory and tried again without its cache."""
        return self._figure("retries") or 0

    def allocated(self) -> int | None:
        """What PyTorch has allocated now; None where the backend does not count."""
        return self._figure("allocated")

    def reserved(self) -> int | None:
        """What PyTorch's allocator holds now, its cache too; None where the backend does not count."""
        return self._figure("reserved")

    def _figure(self, name: str) -> int | None:
        """What the backend counts under the name of one of the methods above."""
        return None

    def beside(self) -> int | None:
        """Bytes that this process takes on the device beside what PyTorch's allocator holds; None: nobody can tell."""
        return None

    def headroom(self) -> int:
        """Bytes to leave free where the user named no budget, for what is allocated beside PyTorch's own."""
        return 0

    def drop_cache(self) -> None:  # noqa: B027 - the CPU's allocator keeps none
        """Returns the allocator's cache to the device; libraries' workspaces stay."""

    def release(self, *, young: bool = False) -> None:
        """Collects garbage and returns the allocator's cache to the device.

        `young`: only garbage from a moment ago, which in a process with PyTorch's million objects takes a fraction of
        the time.
        """
        gc.collect(1 if young else 2)
        self.drop_cache()

    def synchronize(self) -> None:  # noqa: B027 - the CPU has always done what it was given
        """Waits until the device has done all that it was given."""

    def describe(self) -> dict[str, Any]:
        """One row of `autoaccum devices`."""
        return row(self.torch_device, self.name, self.total(), self.free())


def row(
    device: torch.device, name: str, total: int | None, free: int | None, *, note: str = "", driver: str | None = None,
    processes: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:  # fmt: skip
    """A row of `autoaccum devices`: bytes in all and free, None where the device does not answer."""
    told = {"device": str(device), "type": device.type, "name": name, "total": total, "free": free}
    return {**told, "processes": list(processes), "driver": driver, "note": note}


def plus(held: int) -> str:
    """The end of a budget's reason: what is the training's own already."""
    return f", plus {format_bytes(held)} that this process holds already" if held else ""
