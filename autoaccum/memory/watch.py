"""How far a process's own memory rises while something runs.

Limits on the data segment or the address space count what the process maps, which is more than PyTorch has allocated:
libraries keep scratch of their own, and an allocator cannot give back what lies between live blocks. The kernel keeps
no high-water mark of these two figures, so a thread reads them, every millisecond.
"""

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

__all__ = ["ProcessGrowth", "small_stacks"]

STACK_BYTES = 256 * 1024
LIBRARY_STACK_BYTES = 1024 * 1024
_FIELDS = {"data segment": "VmData", "address space": "VmSize"}
_STATUS = Path("/proc/self/status")


class ProcessGrowth:
    """How far the process rises above where it stood when this was made; each `with` measures once more.

    `bytes` is the most of the last `with`; None where the kind of budget does not count the process, or the system does
    not tell.
    """

    def __init__(self, kind: str) -> None:
        """`kind` is the budget's: "data segment", "address space", or another, for which nothing is read."""
        self._field = _FIELDS.get(kind) if _STATUS.exists() else None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._start = self._most = self._read() if self._field is not None else 0
        self.bytes: int | None = None

    def __enter__(self) -> "ProcessGrowth":
        if self._field is not None:
            self._most = self._read()
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
            self.bytes = max(self._most, self._read()) - self._start

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self._most = max(self._most, self._read())

    def _read(self) -> int:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{self._field}:"):
                return int(line.split()[1]) * 1024
        return 0


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
    _set_default_stack(libc, attributes, min(usual.value, LIBRARY_STACK_BYTES))
    try:
        yield
    finally:
        _set_default_stack(libc, attributes, usual.value)


def _set_default_stack(libc: ctypes.CDLL, attributes: ctypes.Array[ctypes.c_char], size: int) -> None:
    libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(size))
    libc.pthread_setattr_default_np(attributes)
