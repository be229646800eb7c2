"""How far a process's own memory rises while something runs.

Limits on the data segment or the address space count what the process maps, which is more than PyTorch has allocated:
libraries keep scratch of their own, and an allocator cannot give back what lies between live blocks. A thread reads the
two figures, every millisecond. The kernel's high-water mark is of the address space alone and never goes down: where a
measured stretch raises it, and maps nothing but data, it tells the data segment's too, to the page.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

__all__ = ["ProcessGrowth", "give_blocks_back", "heap_advice", "small_stacks"]

STACK_BYTES = 256 * 1024
LIBRARY_STACK_BYTES = 1024 * 1024
OTHER_MAPPINGS = 1024 * 1024  # bytes of code or reserved addresses that do not matter beside what is measured
# malloc.h: M_MMAP_THRESHOLD (at most 32 MiB), M_TRIM_THRESHOLD, M_ARENA_MAX
_GIVING_BACK = ((-3, 64 * 1024), (-1, 0), (-8, 1))
_KEEPING = ((-3, 32 * 1024 * 1024), (-1, 1 << 30))
_STATUS = Path("/proc/self/status")


class ProcessGrowth:
    """How far the process rises above where it stood when this was made; each `with` measures once more.

    `bytes` is the most of the last `with`; None where the kind of budget does not count the process, or the system does
    not tell: `counts` is whether there is anything to measure.
    """

    def __init__(self, kind: str) -> None:
        """`kind` is the budget's: "data segment", or another, for which nothing is read."""
        self.counts = kind == "data segment" and _STATUS.exists()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._before: dict[str, int] = {}
        self._start = self._most = _status()["VmData"] if self.counts else 0
        self.bytes: int | None = None

    def now(self) -> int | None:
        """Bytes above the start at this moment; None where there is nothing to measure."""
        return _status()["VmData"] - self._start if self.counts else None

    def __enter__(self) -> "ProcessGrowth":
        if self.counts:
            self._before = _status()
            self._most = self._before["VmData"]
            self._stop.clear()
            # A thread's stack counts too: 8 MiB by default, which would be most of what is measured in small steps.
            before = threading.stack_size(STACK_BYTES)
            self._thread = threading.Thread(target=self._watch, name="autoaccum-process-growth", daemon=True)
            self._thread.start()
            threading.stack_size(before)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self.bytes = max(self._most, self._high_water()) - self._start

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self._most = max(self._most, _status()["VmData"])

    def _high_water(self) -> int:
        """The highest by the kernel's own mark of the address space, where this `with` set a new one; else as now."""
        before, now = self._before, _status()
        data = now["VmData"] - before["VmData"]
        is_new = now["VmPeak"] > before["VmPeak"]
        if not is_new or abs(now["VmSize"] - before["VmSize"] - data) > OTHER_MAPPINGS:
            return now["VmData"]
        return before["VmData"] + now["VmPeak"] - before["VmSize"]


def _status() -> dict[str, int]:
    """VmPeak, VmSize and VmData of this process, in bytes."""
    fields = (line.split() for line in _STATUS.read_text().splitlines() if line.startswith("Vm"))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in fields}


def give_blocks_back(*, but_keep: bool = False) -> None:
    """Has glibc's malloc map large blocks one by one, and unmap them when they are freed, from here on.

    By default it keeps them in a heap, whose holes count under a limit on the process although only what happens to fit
    them can use them: half of the limit was lost so, and after one failed allocation nothing would fit any more. Where
    the environment says how malloc shall do, that stands.

    `but_keep`: keeps them for the next micro-batch, since fresh pages cost up to half of a step's time. On three models
    the heap took 1.5 to 1.8 times what blocks take that are given back.
    """
    if _may_be_told():
        libc = ctypes.CDLL(None)
        for setting, value in _KEEPING if but_keep else _GIVING_BACK:
            libc.mallopt(ctypes.c_int(setting), ctypes.c_int(value))
        libc.malloc_trim(0)


def heap_advice() -> str | None:
    """What `give_blocks_back` changed, and what that means for a training elsewhere; None where it changes nothing."""
    if not _may_be_told():
        return None
    return (
        "this limit counts what the C library keeps of freed memory, so malloc gives large blocks back at once from "
        "here on, which costs speed, unless a step takes less than half of it; a training in another process has as "
        "much room with MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=0 MALLOC_ARENA_MAX=1 in its environment"
    )


def _may_be_told() -> bool:
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    return sys.platform == "linux" and not chosen and hasattr(ctypes.CDLL(None), "mallopt")


@contextmanager
def small_stacks() -> Iterator[None]:
    """Threads that a library starts inside get stacks of 1 MiB; by glibc's default each would map 8 MiB, and count.

    Nothing is changed where the C library has no such setting.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "pthread_setattr_default_np"):
        yield
        return
    attributes = ctypes.create_string_buffer(256)  # pthread_attr_t: 56 or 64 bytes
    usual = ctypes.c_size_t()
    libc.pthread_getattr_default_np(attributes)
    libc.pthread_attr_getstacksize(attributes, ctypes.byref(usual))

    def give(size: int) -> None:
        libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(size))
        libc.pthread_setattr_default_np(attributes)

    give(min(usual.value, LIBRARY_STACK_BYTES))
    try:
        yield
    finally:
        give(usual.value)
