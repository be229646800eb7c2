"""All that a training step may touch, kept aside and put back bit for bit.

The bytes of every storage are copied, not the tensors: strides, views and tied weights come back by themselves, and
objects keep their identity. The copy never stands in the memory that is being measured: it lies in host memory for a
GPU and in a temporary file for a CPU.
"""

import ctypes
import tempfile
from collections.abc import Iterable
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor, nn

from autoaccum.errors import StateNotRestoredError
from autoaccum.interrupts import uninterrupted
from autoaccum.model.contents import Contents
from autoaccum.model.shards import local
from autoaccum.random_state import RandomState

__all__ = ["Snapshot"]


class Snapshot:
    """The state of some objects, random generators and backend flags at one moment.

    Use as a context manager around trials, or call `restore()` and `close()`.
    """

    def __init__(self, *owners: Any, device: torch.device, parameters: bool = True) -> None:
        """Copies everything.

        Args:
            owners: models, with hooks and caches; optimizers, with state and settings; what else has a state of its
                own: a loss, a step, a scaler.
            device: whose random generator is kept beside the CPU's.
            parameters: with their numbers and gradients; False around a forward pass, which changes neither.
        """
        self._contents = Contents(*owners)
        tensors = [each for each in self._contents.tensors if parameters or not isinstance(each, nn.Parameter)]
        self._gradients = [(tensor, tensor.grad) for tensor in tensors if parameters and tensor.is_leaf]
        self._random = RandomState(device)
        cudnn = torch.backends.cudnn
        self._flags = cudnn.benchmark, cudnn.deterministic, torch.is_grad_enabled(), torch.get_default_dtype()
        gradients = [gradient for _, gradient in self._gradients if gradient is not None]
        self._bytes = _StorageBytes([*tensors, *gradients])

    def __enter__(self) -> "Snapshot":
        return self

    @uninterrupted
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.restore()
        finally:
            self.close()

    def set_gradients_aside(self) -> None:
        """Takes every gradient off its parameter until `restore`: those of a trial must not add to them."""
        for tensor, _ in self._gradients:
            tensor.grad = None

    @uninterrupted
    def restore(self) -> None:
        """Puts everything back, objects and bytes.

        Raises:
            StateNotRestoredError: a storage was resized or freed, so that its bytes have no place any more. Everything
                else is back.
        """
        self.set_gradients_aside()  # one that stands there may have the shape of other numbers
        self._contents.restore()
        for tensor, gradient in self._gradients:
            tensor.grad = gradient
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, grad, default_dtype = self._flags
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(default_dtype)
        self._random.restore()
        self._bytes.restore()

    def close(self) -> None:
        """Frees the copy."""
        self._bytes.close()


class _StorageBytes:
    """The bytes of all storages under some tensors, each storage once."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._file: IO[bytes] | None = None
        self._on_host: list[tuple[torch.UntypedStorage, int]] = []  # in a temporary file, in this order
        self._copied: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        self._whole: list[tuple[Tensor, Tensor]] = []  # tensors without a plain storage: sparse and other kinds
        seen: set[int] = set()
        for tensor in map(local, tensors):
            if tensor.layout != torch.strided or tensor.device.type == "meta":
                self._whole.append((tensor, tensor.detach().clone()))
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() == 0:
                continue
            seen.add(storage.data_ptr())
            if storage.device.type == "cpu":
                self._write(storage)
            else:
                self._copied.append((storage, storage.cpu()))  # type: ignore[no-untyped-call]

    def _write(self, storage: torch.UntypedStorage) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="autoaccum-snapshot-")  # noqa: SIM115 (held open until close)
        self._file.write(_memory(storage, storage.nbytes()))
        self._on_host.append((storage, storage.nbytes()))

    def restore(self) -> None:
        lost: list[str] = []
        place = 0
        for storage, size in self._on_host:
            assert self._file is not None
            self._file.seek(place)
            place += size
            if storage.nbytes() != size:
                lost.append(f"a tensor of {size} bytes was resized to {storage.nbytes()} during a trial")
            elif self._file.readinto(_memory(storage, size)) != size:  # type: ignore[attr-defined]
                lost.append("the snapshot's temporary file was cut short")
        for storage, saved in self._copied:
            if storage.nbytes() == saved.nbytes():
                storage.copy_(saved, non_blocking=False)
            else:
                lost.append(f"a device tensor of {saved.nbytes()} bytes was resized during a trial")
        with torch.no_grad():
            for tensor, clone in self._whole:
                tensor.copy_(clone)
        if lost:
            raise StateNotRestoredError(
                f"{lost[0]} and cannot be put back: make the model and the optimizer anew before training"
            )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._copied.clear()
        self._whole.clear()


def _memory(storage: torch.UntypedStorage, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(storage.data_ptr())).cast("B")
