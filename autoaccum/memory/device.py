"""Devices: what they hold, what is free, and how much of it a training may use.

One class a backend; those of the accelerators are in accelerators.py. `open_device` finds a device by name,
`Device.budget` turns the user's `memory=` into bytes with the reason beside them, and `Device.limit` holds the training
to them where the backend can.

Choices:
- A budget counts all that the training holds, its parameters too. On an accelerator the allocator knows what it holds
  already; the CPU has no such allocator, so `held` says it.
- On an accelerator bytes are what PyTorch's caching allocator reserves, for that is what the driver hands out and what
  a hard limit caps. On the CPU they are what PyTorch has allocated.
- Without `memory=`, a tenth of what is available on a host stays free: available memory is the kernel's estimate, other
  programs move it, and going past it gets the process killed instead of raising an error. A limit on the data segment
  or the address space is exact and raises, so nothing is kept back there beyond the caller's own headroom.
- A `memory=` beyond the device's total is taken as the total: no training can ever use more. On an accelerator one
  beyond what is free at the moment is taken as asked, with that said: what is free changes, the number is the user's
  word, and an overrun is an error that a probe survives. On a host it is a killed process, or a machine that comes to
  a stand: there the budget is no more than without `memory=`.
"""

import contextlib
import gc
import os
import platform
import re
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from autoaccum.errors import DeviceError, SetupError, shown
from autoaccum.memory.host import host_memory
from autoaccum.memory.watch import give_blocks_back
from autoaccum.units import format_bytes, parse_bytes

__all__ = ["Budget", "CpuDevice", "Device", "check_memory", "devices", "less", "open_device", "plus"]

_HOST_RESERVE = 0.1
_PERCENT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*")


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


class Device(ABC):
    """A place to train on. Sizes are bytes."""

    torch_device: torch.device
    name: str

    @property
    def type(self) -> str:
        """The backend: "cpu", "cuda", "xpu", "mps", and so on."""
        return self.torch_device.type

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.torch_device)!r})"

    @abstractmethod
    def total(self) -> int:
        """All of the device's memory, or what the limit that binds allows."""

    @abstractmethod
    def free(self) -> int:
        """What anyone could allocate now."""

    def budget(self, memory: int | str | None = None, *, headroom: int = 0, held: int = 0) -> Budget:
        """What the training may use: all that is free and its own, or as much as `memory` says.

        Args:
            memory: None, bytes, a size such as "8GiB", or a share of the device's total such as "80%".
            headroom: without `memory`: bytes to leave free.
            held: without `memory`, on the CPU: bytes this training holds already, which count as its own.

        Raises:
            SetupError: `memory` is no size, or a share outside (0%, 100%].
        """
        if memory is None:
            return self._room(headroom, held)
        total = self.total()
        size, reason = _asked(memory, total)
        if size > total:
            reason += f", taken as all that {self.torch_device} has"
            size = total
        free = self.free() + max(held, self.reserved() or 0)
        if size > free:
            reason += f"; only {format_bytes(free)} is free now{self._beyond()}"
        return Budget(size, f"{format_bytes(size)}, {reason}", True, "torch")

    @abstractmethod
    def _room(self, headroom: int, held: int) -> Budget:
        """The budget where the user named none."""

    def _beyond(self) -> str:
        """What happens to a training that needs more than is free; the end of a sentence."""
        return ", and a step that needs more runs out of memory"

    def limit(self, budget: Budget) -> AbstractContextManager[None]:
        """Holds PyTorch's allocator to a hard budget, and puts the limit from before back; elsewhere does nothing."""
        return contextlib.nullcontext()

    def reset_peak(self) -> None:  # noqa: B027 - a backend that counts no peaks has none to reset
        """Lets `peak` and `reserved_peak` start anew from what is allocated now."""

    def peak(self) -> int | None:
        """The most that PyTorch had allocated since `reset_peak`; None where the backend does not count."""
        return None

    def reserved_peak(self) -> int | None:
        """The most that PyTorch's allocator had reserved since `reset_peak`; None where it does not count."""
        return None

    def retries(self) -> int:
        """How often, in this process, the allocator found no memory and tried again without its cache."""
        return 0

    def allocated(self) -> int | None:
        """What PyTorch has allocated now; None where the backend does not count."""
        return None

    def reserved(self) -> int | None:
        """What PyTorch's allocator holds now, its cache too; None where the backend does not count."""
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

    def synchronize(self) -> None:  # noqa: B027 - the CPU has always done what it was given
        """Waits until the device has done all that it was given."""

    def describe(self) -> dict[str, Any]:
        """One row of `autoaccum devices`."""
        return {
            "device": str(self.torch_device),
            "type": self.type,
            "name": self.name,
            "total": self.total(),
            "free": self.free(),
            "processes": [],
            "driver": None,
            "note": "",
        }


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

    def budget(self, memory: int | str | None = None, *, headroom: int = 0, held: int = 0) -> Budget:
        """As everywhere, but never more than without `memory`: what does not fit here cannot be tried here."""
        asked, room = super().budget(memory, headroom=headroom, held=held), self._room(headroom, held)
        if memory is None or asked.bytes <= room.bytes:
            return asked
        size, _ = _asked(memory, self.total())
        reason = f"{room.reason}; {_named(memory)} asks for {format_bytes(size)}, which is not there to be used"
        return Budget(room.bytes, reason, False, room.kind, beyond=size)

    def _room(self, headroom: int, held: int) -> Budget:
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
        size = max(0, size - headroom + held)
        reason = f"{format_bytes(size)}: {reason}{plus(held)}{less(headroom)}"
        return Budget(size, reason, False, "data segment" if exact else "host")

    def limit(self, budget: Budget) -> AbstractContextManager[None]:
        """Nothing holds PyTorch to a budget here; where the process itself is limited, malloc stops keeping blocks."""
        if budget.kind == "data segment":
            give_blocks_back()
        return contextlib.nullcontext()

    def describe(self) -> dict[str, Any]:
        """One row of `autoaccum devices`, with where the limit comes from."""
        memory = host_memory()
        return {**super().describe(), "total": memory.total, "free": memory.available, "note": memory.reason}


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
            row = {"device": str(torch_device), "type": torch_device.type, "name": str(torch_device), "total": None}
            rows.append({**row, "free": None, "processes": [], "driver": None, "note": f"does not answer: {error}"})
    return rows


def _open(torch_device: torch.device) -> Device:
    from autoaccum.memory import accelerators  # here, because they build on the class above

    if torch_device.type == "cpu":
        return CpuDevice()
    if torch_device.type == "cuda":
        return accelerators.CudaDevice(torch_device)
    if torch_device.type == "mps":
        return accelerators.MpsDevice()
    return accelerators.AcceleratorDevice(torch_device)


def _there() -> list[torch.device]:
    """Every device that can be trained on here, best first; never empty, for the CPU is always there."""
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if _cuda() else []
    other = _accelerator()
    if other == "mps":
        found.append(torch.device("mps"))
    elif other is not None:
        found.extend(torch.device(other, index) for index in range(getattr(torch, other).device_count()))
    return [*found, torch.device("cpu")]


def _cuda() -> bool:
    return torch.cuda.is_available()


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
    if kind != "cuda" or _cuda():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return ": this PyTorch is built without CUDA"
    return ": no GPU can be seen (check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES)"


def check_memory(memory: int | str | None) -> None:
    """Refuses a `memory` that is no size, before anything is touched for it.

    Raises:
        SetupError: it is no size, or a share outside (0%, 100%].
    """
    if memory is not None:
        _asked(memory, 1)


def _asked(memory: int | str, total: int) -> tuple[int, str]:
    """The bytes that the user's `memory` means on a device of `total` bytes, and how to say where they come from."""
    named = _named(memory)
    percent = _PERCENT.fullmatch(memory) if isinstance(memory, str) else None
    if percent is None:
        return parse_bytes(memory), f"as {named} asks"
    share = min(float(percent.group(1)), 101.0)
    if not 0 < share <= 100:
        raise SetupError(f'{named} is no share of a device: it must be above 0% and at most 100%, such as "80%"')
    return max(1, int(total * share / 100)), f"as {named} asks of {format_bytes(total)}"


def _named(memory: int | str) -> str:
    return f"memory={shown(memory)}".replace("'", '"')


def less(headroom: int) -> str:
    """The end of a budget's reason: what was left free."""
    return f", less {format_bytes(headroom)} of headroom" if headroom else ""


def plus(held: int) -> str:
    """The end of a budget's reason: what is the training's own already."""
    return f", plus {format_bytes(held)} that this process holds already" if held else ""


def _cpu_name() -> str:
    cores = psutil.cpu_count() or 1
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()} ({cores} core{'s' if cores > 1 else ''})"
