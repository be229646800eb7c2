"""How far a process's own memory rises while something runs.

Limits on the data segment or the address space count what the process maps, which is more than PyTorch has allocated:
libraries keep scratch of their own, and an allocator cannot give back what lies between live blocks. The kernel keeps
no high-water mark of these two figures, so a thread reads them, every millisecond.
"""

import threading
from pathlib import Path
from types import TracebackType

__all__ = ["ProcessGrowth"]

_FIELDS = {"data segment": "VmData", "address space": "VmSize"}
_STATUS = Path("/proc/self/status")


class ProcessGrowth:
    """Context manager: `bytes` is the most that the process rose above where it stood on entering.

    None where the kind of budget does not count the process, or the system does not tell.
    """

    def __init__(self, kind: str) -> None:
        """`kind` is the budget's: "data segment", "address space", or another, for which nothing is read."""
        self._field = _FIELDS.get(kind) if _STATUS.exists() else None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._start = self._most = 0
        self.bytes: int | None = None

    def __enter__(self) -> "ProcessGrowth":
        if self._field is not None:
            self._start = self._most = self._read()
            self._thread = threading.Thread(target=self._watch, name="autoaccum-process-growth", daemon=True)
            self._thread.start()
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
