"""NVIDIA's management library: who else holds a GPU's memory. The only importer of `pynvml`.

CUDA and NVML number GPUs differently (CUDA_VISIBLE_DEVICES, fastest first), so a GPU is looked up by its UUID and
never by an index. The library can be missing (no driver, ROCm, WSL without it) or refuse (a container without the
right, vGPU): then the answer is why, and PyTorch's own figures serve.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil

__all__ = ["GpuInfo", "GpuProcess", "gpu_info", "pids_are_ours"]

# The inode of the first process namespace, the same on every Linux (PROC_PID_INIT_INO in include/linux/proc_ns.h).
_FIRST_NAMESPACE = "pid:[4026531836]"


class GpuProcess(NamedTuple):
    """A process with memory on a GPU.

    `pid` is as the driver sees it: the host's number, also when asked from inside a container. `name` is None where the
    process cannot be seen from here, `bytes` where the driver does not say (Windows; no right to know).
    """

    pid: int
    name: str | None
    bytes: int | None


class GpuInfo(NamedTuple):
    """What the driver says of one GPU; `total` and `free` in bytes."""

    total: int
    free: int
    driver: str
    processes: tuple[GpuProcess, ...]


def gpu_info(uuid: str, nvml: Any = None) -> tuple[GpuInfo | None, str]:
    """The GPU with this UUID (with or without the "GPU-" or "MIG-" before it), or None and the reason why not."""
    if nvml is None:
        try:
            import pynvml

            nvml = pynvml
        except ImportError as error:
            return None, f"nvidia-ml-py cannot be imported ({error})"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return None, f"NVML does not start ({error})"
    try:
        handle = _handle(nvml, uuid)
        memory, driver = nvml.nvmlDeviceGetMemoryInfo(handle), nvml.nvmlSystemGetDriverVersion()
        driver = driver.decode() if isinstance(driver, bytes) else driver
        return GpuInfo(int(memory.total), int(memory.free), driver, tuple(_processes(nvml, handle))), ""
    except nvml.NVMLError as error:
        return None, f"NVML does not answer for GPU {uuid} ({error})"
    finally:
        nvml.nvmlShutdown()


def _handle(nvml: Any, uuid: str) -> Any:
    """PyTorch gives a bare UUID, NVML wants to know whether it is a whole GPU's or a slice's."""
    bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{bare}")
    except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{bare}")


def _processes(nvml: Any, handle: Any) -> Iterator[GpuProcess]:
    """Computing and drawing processes, each once, the largest first."""
    found: dict[int, int | None] = {}
    for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        try:
            running = ask(handle)
        except nvml.NVMLError:
            continue  # a slice has no drawing processes, and a right may be missing for one of the two
        for process in running:
            found[process.pid] = process.usedGpuMemory if found.get(process.pid) is None else found[process.pid]
    visible = pids_are_ours()
    for pid, used in sorted(found.items(), key=lambda item: -(item[1] or 0)):
        name = None
        with contextlib.suppress(psutil.Error):
            name = psutil.Process(pid).name() if visible else None
        yield GpuProcess(pid, name, used)


def pids_are_ours() -> bool:
    """Whether the driver's process numbers mean the same here: not in a container, where they are other processes'."""
    try:
        return os.readlink("/proc/self/ns/pid") == _FIRST_NAMESPACE
    except OSError:
        return True  # no Linux, no namespaces
