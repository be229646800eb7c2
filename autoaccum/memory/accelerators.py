"""Devices with a memory of their own: CUDA (and ROCm) GPUs, XPU and what speaks alike, and Apple's MPS.

What each backend counts in, and what a budget means, is told in `autoaccum.memory.budget`.

Choices:
- XPU and others are asked through their own PyTorch module before `torch.accelerator`: it had most of these functions
  earlier, and `torch.accelerator`'s fail an internal assertion on MPS (pytorch/pytorch#186430).
- CUDA's own figures make the budget, for they are what the allocator will meet; NVML only says who else is there.
- Under WSL and on Windows the driver serves an allocation from host memory when the GPU's is full. Every budget is a
  hard one there: without a cap, a training that does not fit would crawl instead of failing.
"""

import contextlib
import os
import platform
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch

from autoaccum.errors import DeviceError
from autoaccum.memory.budget import Budget, Device, row
from autoaccum.memory.host import host_memory
from autoaccum.memory.nvml import GpuInfo, gpu_info, pids_are_ours
from autoaccum.units import MIB, format_bytes, parse_bytes

__all__ = ["AcceleratorDevice", "CudaDevice", "MpsDevice", "fraction"]

HEADROOM = 256 * MIB
SAME_DEVICE = 0.1  # what a driver keeps for itself is less of a device's memory
IMPOSSIBLE = 2**50
_FIGURES = {
    "peak": ("requested_bytes.all.peak", "allocated_bytes.all.peak"), "reserved_peak": ("reserved_bytes.all.peak",),
    "allocated": ("requested_bytes.all.current", "allocated_bytes.all.current"),
    "reserved": ("reserved_bytes.all.current",), "retries": ("num_alloc_retries",),
}  # fmt: skip
_ALLOWED = re.compile(r"([\d.]+ [KMG]iB) allowed")


class AcceleratorDevice(Device):
    """A device whose PyTorch module speaks as `torch.cuda` does: XPU, and others through `torch.accelerator`."""

    def __init__(self, torch_device: torch.device, api: Any = None) -> None:
        self.torch_device = torch_device
        self._api = getattr(torch, torch_device.type) if api is None else api
        self._info = self._function("mem_get_info", "get_memory_info")
        self._stats = self._function("memory_stats")
        if self._info is None or self._stats is None:
            raise DeviceError(
                f"PyTorch {torch.__version__} cannot tell how much memory {torch_device} has: "
                'install a newer PyTorch, or train with device="cpu"'
            )
        named = self._function("get_device_name")
        self.name = str(named(torch_device)) if named else str(torch_device)

    def _function(self, *names: str) -> Any:
        for module in (self._api, getattr(torch, "accelerator", None)):
            for name in names:
                if hasattr(module, name):
                    return getattr(module, name)
        return None

    def _count(self, figure: str) -> int:
        nested = getattr(self._api, "memory_stats_as_nested_dict", None)
        if nested is None:
            return int(self._stats(self.torch_device).get(figure, 0))
        # The same before it is flattened into sixty entries, which would be most of what a short window costs.
        found: Any = nested(self.torch_device)
        for key in figure.split("."):
            found = found.get(key, 0) if found else 0
        return int(found)

    def total(self) -> int:
        """The device's memory."""
        return int(self._info(self.torch_device)[1])

    def free(self) -> int:
        """What no process has taken; the cache of this process's allocator counts as taken."""
        return int(self._info(self.torch_device)[0])

    def _spare(self) -> tuple[int, str]:
        size, reason = super()._spare()
        cap = int(self._fraction() * self._whole())  # of what the allocator reserves: headroom is for what it does not
        if cap < size:
            return cap, f"{reason}, but this process's memory fraction allows {format_bytes(cap)}"
        return size, reason

    def _fraction(self) -> float:
        """The share of the device that this process's allocator may reserve; older PyTorch cannot tell, so all."""
        get = self._function("get_per_process_memory_fraction")
        return float(get(self.torch_device)) if get else 1.0

    def _whole(self) -> int:
        """What the allocator takes its fraction of."""
        return self.total()

    @contextlib.contextmanager
    def limit(self, budget: Budget) -> Iterator[None]:
        """Caps what the allocator reserves at a hard budget, so that an overrun raises OutOfMemoryError.

        The cap from before is put back, and holds meanwhile where it is the smaller one. Context and libraries are not
        counted by it.
        """
        cap = self._function("set_per_process_memory_fraction")
        if not budget.hard or cap is None:
            yield
            return
        self.release()  # a cache from before would be charged to the budget, and its release counted as a retry
        before = min(1.0, self._fraction())  # allocators other than PyTorch's own tell no share
        cap(min(before, fraction(budget.bytes, self._whole())), self.torch_device)
        try:
            yield
        finally:
            cap(before, self.torch_device)

    def reset_peak(self) -> None:
        """Lets `peak` and `reserved_peak` start anew from what is allocated now."""
        reset = self._function("reset_peak_memory_stats")
        if reset:
            reset(self.torch_device)

    def _figure(self, name: str) -> int | None:
        # Bytes in tensors are those asked for, blocks may be larger; not every backend's allocator keeps the first.
        return next((found for figure in _FIGURES[name] if (found := self._count(figure))), 0)

    def headroom(self) -> int:
        """Kept free of what others leave: for kernels and communication buffers, which the allocator does not hold."""
        return min(self.total() // 50, HEADROOM)

    def drop_cache(self) -> None:
        """Returns the allocator's cache to the device; libraries' workspaces stay."""
        self._function("empty_cache")()

    def synchronize(self) -> None:
        """Waits until the device has done all that it was given."""
        self._function("synchronize")(self.torch_device)


class CudaDevice(AcceleratorDevice):
    """An NVIDIA GPU, or an AMD one under ROCm, for which PyTorch uses the same names (but NVML does not answer).

    `api` is the module to ask, torch.cuda unless another is given.
    """

    # WSL and Windows: the driver serves an allocation from host memory when the GPU's is full.
    spills = sys.platform == "win32" or "microsoft" in platform.release().lower()

    def total(self) -> int:
        """The device's memory, by its properties."""
        return int(self._api.get_device_properties(self.torch_device).total_memory)

    def _whole(self) -> int:
        """What the allocator takes its fraction of: the properties' total, in older torch what the driver tells.

        Where these differ, a fraction that is set and read back shows which it was: times that one it is whole bytes.
        """
        properties, driver = self.total(), int(self._info(self.torch_device)[1])
        if properties == driver or self._function("get_per_process_memory_fraction") is None:
            return driver
        before = min(1.0, self._fraction())
        self._api.set_per_process_memory_fraction(0.7310585786, self.torch_device)
        read = self._fraction()
        self._api.set_per_process_memory_fraction(before, self.torch_device)
        return min(properties, driver, key=lambda total: abs(read * total - round(read * total)))

    def _fraction(self) -> float:
        """The share of the device that this process's allocator may reserve.

        Torch before 2.8 tells it only in the message of a request that cannot be served, to a hundredth of a GiB.
        """
        ask = getattr(self._api, "caching_allocator_alloc", None)
        if self._function("get_per_process_memory_fraction") is not None or ask is None:
            return super()._fraction()
        try:
            ask(IMPOSSIBLE, self.torch_device)
        except torch.OutOfMemoryError as error:
            allowed = _ALLOWED.search(str(error))
        return parse_bytes(allowed[1].replace(" ", "")) / self._whole() if allowed else 1.0

    def beside(self) -> int:
        """The context, and what libraries took for themselves: by NVML, or by CUDA where that tells no processes."""
        info, _ = self._gpu()
        processes = () if info is None or not pids_are_ours() else info.processes
        mine = next((process.bytes for process in processes if process.pid == os.getpid()), None)
        if mine is None:
            free, total = map(int, self._info(self.torch_device))
            mine = total - free
        return max(0, mine - (self.reserved() or 0))

    def headroom(self) -> int:
        """None: the probe measures what kernels take as they are loaded."""
        return 0

    def free(self) -> int:
        """What no process has taken. Raises DeviceError where CUDA does not answer, as on a GPU that is full."""
        try:
            return super().free()
        except RuntimeError as error:
            raise DeviceError(
                f"{self.torch_device} ({self.name}) does not answer: {error}; {self._others()}"
            ) from error

    def _spare(self) -> tuple[int, str]:
        size, reason = super()._spare()
        reason = f"{reason}; {self._others()}"
        if self.spills:
            reason += "; a hard limit, for the driver here spills into host memory instead of refusing"
        return size, reason

    def _gpu(self) -> tuple[GpuInfo | None, str]:
        uuid = getattr(self._api.get_device_properties(self.torch_device), "uuid", None)
        return gpu_info(str(uuid)) if uuid else (None, "this PyTorch does not tell the GPU's UUID")

    def _others(self) -> str:
        info, why = self._gpu()
        if info is None:
            return f"figures from CUDA alone: {why}"
        ours = pids_are_ours()
        others = [process for process in info.processes if not (ours and process.pid == os.getpid())]
        if not others:
            return "no other process uses it"
        sizes = ("unknown size" if each.bytes is None else format_bytes(each.bytes) for each in others)
        known = ", ".join(
            f"{each.pid} {each.name or ''}".strip() + f": {size}" for each, size in zip(others[:3], sizes)
        )
        whose = "other " if ours else ""
        return f"{len(others)} {whose}process{'es' if len(others) > 1 else ''} on it ({known})"

    def release(self, *, young: bool = False) -> None:
        """Collects garbage, drops cuBLAS's workspaces, then returns the allocator's cache to the device."""
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear:
            clear()
        super().release(young=young)

    def describe(self) -> dict[str, Any]:
        """One row of `autoaccum devices`; asks CUDA for the free memory, which costs a context, only without NVML."""
        info, why = self._gpu()
        total = self.total()
        if info is None:
            return row(self.torch_device, self.name, total, self.free(), note=f"without NVML: {why}")
        free, note = info.free, ""
        if abs(info.total - total) > SAME_DEVICE * total:  # a slice of a GPU, and NVML tells of all of it
            free, note = self.free(), "free memory by CUDA: NVML tells that of the whole GPU"
        processes = [{"pid": each.pid, "name": each.name, "bytes": each.bytes} for each in info.processes]
        return row(self.torch_device, self.name, total, free, note=note, driver=info.driver, processes=processes)


class MpsDevice(Device):
    """Apple's GPU, which shares the host's memory: Metal recommends how much of it to use.

    PyTorch counts no peaks there, and its fraction cannot be read back, so a hard budget is compared, not enforced.
    """

    def __init__(self, api: Any = None) -> None:
        self.torch_device = torch.device("mps")
        self.name = f"Apple GPU ({platform.machine()})"
        self._api = torch.mps if api is None else api
        if not hasattr(self._api, "recommended_max_memory"):
            raise DeviceError(
                f"PyTorch {torch.__version__} cannot tell how much memory mps has: install PyTorch 2.5 or newer, "
                'or train with device="cpu"'
            )

    def total(self) -> int:
        """What Metal recommends as the most to use."""
        return int(self._api.recommended_max_memory())

    def free(self) -> int:
        """What of that this process has not taken, or the host's available memory where that is less."""
        return min(max(0, self.total() - (self.reserved() or 0)), host_memory().available)

    def _spare(self) -> tuple[int, str]:
        size, reason = super()._spare()
        return size, f"{reason}, of {format_bytes(self.total())} that Metal recommends to use"

    def _figure(self, name: str) -> int | None:
        told = {"allocated": self._api.current_allocated_memory, "reserved": self._api.driver_allocated_memory}
        return int(told[name]()) if name in told else None

    def drop_cache(self) -> None:
        """Returns the allocator's cache to the device."""
        self._api.empty_cache()

    def synchronize(self) -> None:
        """Waits until the device has done all that it was given."""
        self._api.synchronize()


def fraction(size: int, total: int) -> float:
    """The fraction of `total` bytes that PyTorch, which multiplies and truncates, takes for exactly `size` bytes.

    Half a byte more than size / total: the truncation could otherwise cost the last byte, and with it a segment.
    """
    return min(1.0, (size + 0.5) / total)
