"""All that a training step may touch, kept aside and put back bit for bit.

The bytes of every storage are copied, not the tensors: strides, views and tied weights come back by themselves, and
objects keep their identity. The copy never stands in the memory that is being measured: it lies in host memory for a
GPU and in a temporary file for a CPU.
"""

import ctypes
import tempfile
from collections.abc import Iterable
from types import TracebackType
from typing import Any

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
        self._file = tempfile.TemporaryFile(prefix="autoaccum-snapshot-")  # noqa: SIM115 (held open until close)
        # Each storage with its size, and its copy on the host; None: the bytes are in the file, in this order.
        self._kept: list[tuple[torch.UntypedStorage, int, torch.UntypedStorage | None]] = []
        self._whole: list[tuple[Tensor, Tensor]] = []  # tensors without a plain storage: sparse and other kinds
        self._copy([*tensors, *gradients])

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
        self._restore_bytes()

    def close(self) -> None:
        """Frees the copy."""
        self._file.close()
        self._kept.clear()
        self._whole.clear()

    def _copy(self, tensors: Iterable[Tensor]) -> None:
        """Copies the bytes of all storages under some tensors, each storage once."""
        seen: set[int] = set()
        for tensor in map(local, tensors):
            if tensor.layout != torch.strided or tensor.device.type == "meta":
                self._whole.append((tensor, tensor.detach().clone()))
                continue
            storage = tensor.untyped_storage()
            size = storage.nbytes()
            if storage.data_ptr() in seen or size == 0:
                continue
            seen.add(storage.data_ptr())
            if storage.device.type == "cpu":
                self._file.write(_memory(storage, size))
                self._kept.append((storage, size, None))
            else:
                self._kept.append((storage, size, storage.cpu()))  # type: ignore[no-untyped-call]

    def _restore_bytes(self) -> None:
        resized, place = None, 0
        for storage, size, copy in self._kept:
            if storage.nbytes() != size:
                resized = resized or f"a tensor of {size} bytes was resized to {storage.nbytes()} during a trial"
            elif copy is not None:
                storage.copy_(copy, non_blocking=False)
            else:
                self._file.seek(place)
                self._file.readinto(_memory(storage, size))
            place += size if copy is None else 0
        with torch.no_grad():
            for tensor, clone in self._whole:
                tensor.copy_(clone)
        if resized is not None:
            raise StateNotRestoredError(
                f"{resized} and cannot be put back: make the model and the optimizer anew before training"
            )


def _memory(storage: torch.UntypedStorage, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(storage.data_ptr())).cast("B")
