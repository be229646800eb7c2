"""The devices that are here: the host, and each accelerator that PyTorch knows, opened by name."""

import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from autoaccum.errors import DeviceError, shown
from autoaccum.memory.accelerators import AcceleratorDevice, CudaDevice, MpsDevice
from autoaccum.memory.budget import Budget, Device, asked_bytes, named, plus, row
from autoaccum.memory.host import host_memory
from autoaccum.memory.watch import give_blocks_back
from autoaccum.units import format_bytes

__all__ = ["CpuDevice", "devices", "open_device"]

_HOST_RESERVE = 0.1
_HOLES = 2.0  # times a step's peak: room for a heap that keeps freed blocks


class CpuDevice(Device):
    """The host. PyTorch neither counts nor limits what it allocates there: tracing a step does the counting."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.name = _cpu_name()

    def total(self) -> int:
        """What the least limit allows in all: a resource limit, a control group, or the machine's memory."""
        return host_memory().total

    def free(self) -> int:
        """What this process may still take under the limit that binds."""
        return host_memory().available

    def budget(self, memory: int | str | None = None, *, held: int = 0) -> Budget:
        """As everywhere, but never more than without `memory`: what does not fit here cannot be tried here."""
        asked, room = super().budget(memory, held=held), self._room(held)
        if memory is None or asked.bytes <= room.bytes:
            return asked
        size, _ = asked_bytes(memory, self.total())
        reason = f"{room.reason}; {named(memory)} asks for {format_bytes(size)}, which is not there to be used"
        return Budget(room.bytes, reason, False, room.kind, beyond=size)

    def _room(self, held: int) -> Budget:
        memory = host_memory()
        size, reason = memory.available, memory.reason
        exact = memory.kind in ("data segment", "address space")
        if not exact:
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun: training processes on this host
            if processes > 1:
                size //= processes
                reason += f", shared by {processes} processes"
            size -= int(size * _HOST_RESERVE)
            reason += f", {_HOST_RESERVE:.0%} of it kept free for the system"
        size += held
        return Budget(size, f"{format_bytes(size)}: {reason}{plus(held)}", False, "data segment" if exact else "host")

    def expect(self, budget: Budget, peak: int | None) -> None:
        """Where the process itself is limited, malloc keeps freed blocks where their holes have room, else none."""
        if budget.kind == "data segment":
            kept, self.keeps = self.keeps, peak is not None and peak * _HOLES <= budget.bytes
            if not (self.keeps and kept):  # what is there already stays
                give_blocks_back(but_keep=self.keeps)

    def release(self, *, young: bool = False) -> None:
        """Collects garbage; what malloc kept is given back, now that there is no room for it."""
        super().release(young=young)
        if self.keeps:
            self.keeps = False
            give_blocks_back()

    def describe(self) -> dict[str, Any]:
        """One row of `autoaccum devices`, with where the limit comes from."""
        memory = host_memory()
        return row(self.torch_device, self.name, memory.total, memory.available, note=memory.reason)


def open_device(device: str | torch.device | None = None) -> Device:
    """The device of that name, or the best there is: a CUDA GPU, another accelerator, then the CPU.

    "cuda" without an index is the current GPU, or under torchrun the one of this process's local rank.

    Raises:
        DeviceError: it is not there, or PyTorch does not know it; the message lists those that are there.
    """
    there = _there()
    if device is None:
        return _open(next((name for name in there if name.index == _default_index(name.type)), there[0]))
    try:
        wanted = torch.device(device)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise DeviceError(f"{shown(device)} is not a device that PyTorch knows. {_listed(there)}") from error
    if wanted.type in ("cpu", "mps"):
        wanted = torch.device(wanted.type)
    elif wanted.index is None and wanted.type in {name.type for name in there}:
        wanted = torch.device(wanted.type, _default_index(wanted.type))
    # torch.device wraps an index beyond 127 round, so that "cuda:256" would be taken for "cuda:0".
    index = int(device.split(":")[1]) if isinstance(device, str) and ":" in device else 0
    if wanted not in there or index >= len(there):
        raise DeviceError(f"the device {str(device)!r} is not there{_why_not(wanted.type)}. {_listed(there)}")
    return _open(wanted)


def devices() -> list[dict[str, Any]]:
    """Every device here, accelerators first, for people to read: see `Device.describe` for the keys.

    A device that does not answer is a row with its figures None and the error in its note.
    """
    rows = []
    for torch_device in _there():
        try:
            rows.append(_open(torch_device).describe())
        except (RuntimeError, DeviceError) as error:  # a GPU in exclusive use, a driver at odds with PyTorch
            rows.append(row(torch_device, str(torch_device), None, None, note=f"does not answer: {error}"))
    return rows


def _open(torch_device: torch.device) -> Device:
    if torch_device.type == "cpu":
        return CpuDevice()
    if torch_device.type == "cuda":
        return CudaDevice(torch_device)
    if torch_device.type == "mps":
        return MpsDevice()
    return AcceleratorDevice(torch_device)


def _there() -> list[torch.device]:
    """Every device that can be trained on here, best first; never empty, for the CPU is always there."""
    found = (
        [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    other = _accelerator()
    if other == "mps":
        found.append(torch.device("mps"))
    elif other is not None:
        found.extend(torch.device(other, index) for index in range(getattr(torch, other).device_count()))
    return [*found, torch.device("cpu")]


def _accelerator() -> str | None:
    """The type of an accelerator other than CUDA; before torch 2.6 there is no `torch.accelerator` to ask."""
    if hasattr(torch, "accelerator"):
        current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return current.type if current is not None and current.type != "cuda" else None
    if torch.backends.mps.is_available():
        return "mps"
    return "xpu" if torch.xpu.is_available() else None


def _default_index(kind: str) -> int | None:
    """The device of that kind which this process uses unless told: the one made current, else the local rank's."""
    if kind in ("cpu", "mps"):
        return None
    api = getattr(torch, kind)
    current, local = int(api.current_device()), int(os.environ.get("LOCAL_RANK", "0"))
    return current or (local if local < api.device_count() else 0)


def _listed(there: list[torch.device]) -> str:
    names = ", ".join(str(device) for device in there)
    return f"There {'is' if len(there) == 1 else 'are'}: {names}. `autoaccum devices` shows what each has free"


def _why_not(kind: str) -> str:
    if kind != "cuda" or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return ": this PyTorch is built without CUDA"
    return ": no GPU can be seen (check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES)"


def _cpu_name() -> str:
    cores = psutil.cpu_count() or 1
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()} ({cores} core{'s' if cores > 1 else ''})"
