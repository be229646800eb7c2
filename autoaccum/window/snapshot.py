"""All that a training step may touch, kept aside and put back bit for bit.

The bytes of every storage are copied, not the tensors: strides, views and tied weights come back by themselves, and
objects keep their identity. The copy never stands in the memory that is being measured: it lies in host memory for a
GPU and in a temporary file for a CPU.
"""

import copy
import ctypes
import tempfile
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoaccum.errors import StateNotRestoredError
from autoaccum.random_state import RandomState

__all__ = ["Attributes", "Snapshot"]


class Snapshot:
    """The state of model, optimizer, scaler, random generators and backend flags at one moment.

    Use as a context manager around trials, or call `restore()` and `close()`.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *others: Any, device: torch.device) -> None:
        """Copies everything.

        Args:
            model: its parameters, gradients, buffers, plain attributes and flags are kept.
            optimizer: its state and its groups' settings are kept.
            others: modules (a loss with state of its own) and objects with a `state_dict` (a scaler).
            device: whose random generator is kept beside the CPU's.
        """
        self._modules = [model, *(other for other in others if isinstance(other, nn.Module))]
        self._stateful = [(o, copy.deepcopy(o.state_dict())) for o in others if not isinstance(o, nn.Module)]
        self._optimizer = optimizer
        self._attributes = [Attributes(module) for root in self._modules for module in root.modules()]
        self._parameters = [(p, p.requires_grad, p.grad) for root in self._modules for p in root.parameters()]
        self._groups = [
            {k: v if isinstance(v, Tensor) else copy.copy(v) for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ]
        self._state = {key: dict(value) for key, value in optimizer.state.items()}
        self._random = RandomState(device)
        self._flags = _backend_flags()
        self._bytes = _StorageBytes(self._tensors())

    def __enter__(self) -> "Snapshot":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.restore()
        finally:
            self.close()

    def _tensors(self) -> Iterator[Tensor]:
        for parameter, _, gradient in self._parameters:
            yield parameter
            if gradient is not None:
                yield gradient
        for held in self._attributes:
            yield from (value for value, _ in held.plain.values() if isinstance(value, Tensor))
            yield from (value for value in held.buffers.values() if value is not None)
        for state in self._state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
        for group in self._groups:
            yield from (value for value in group.values() if isinstance(value, Tensor))

    def restore(self) -> None:
        """Puts everything back, objects and bytes.

        Raises:
            StateNotRestoredError: a storage was resized or freed, so that its bytes have no place any more.
        """
        for parameter, requires_grad, gradient in self._parameters:
            parameter.grad = gradient
            parameter.requires_grad_(requires_grad)
        for held in self._attributes:
            held.restore()
        self._restore_optimizer()
        for other, state in self._stateful:
            other.load_state_dict(state)
        self._bytes.restore()
        _set_backend_flags(self._flags)
        self._random.restore()

    def _restore_optimizer(self) -> None:
        self._optimizer.state.clear()
        for key, state in self._state.items():
            self._optimizer.state[key] = dict(state)
        for group, saved in zip(self._optimizer.param_groups, self._groups, strict=True):
            parameters = group["params"]
            group.clear()
            group.update(params=parameters, **saved)

    def close(self) -> None:
        """Frees the copy."""
        self._bytes.close()


# Held apart from a module's plain attributes: parameters and buffers by their bytes, the rest never changes in a step.
_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})


class Attributes:
    """What one module holds beside parameters and submodules; what its tensors hold is the owner's to keep.

    Attributes:
        plain: its plain attributes. A list, dict or set is changed in place: with its contents, one level deep.
        buffers: the tensors that are its buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.plain: dict[str, tuple[Any, Any]] = {
            name: (value, copy.copy(value) if type(value) in (list, dict, set) else None)
            for name, value in vars(module).items()
            if name not in _REGISTRIES
        }
        self.buffers: dict[str, Tensor | None] = dict(module._buffers)

    def restore(self) -> None:
        """Puts the same objects back, and containers' contents."""
        held, buffers = vars(self._module), self._module._buffers
        for name in [name for name in held if name not in self.plain and name not in _REGISTRIES]:
            del held[name]
        for name, (value, contents) in self.plain.items():
            _refill(value, contents)
            held[name] = value
        # One at a time: TorchScript's registry is a view of the module in C++, which can be neither cleared nor added
        # to, and is no iterable but for keys().
        for name in [name for name in buffers.keys() if name not in self.buffers]:  # noqa: SIM118
            del buffers[name]
        for name, buffer in self.buffers.items():
            buffers[name] = buffer


def _refill(container: Any, contents: Any) -> None:
    """Puts the contents of a list, dict or set back, leaving the object itself in place."""
    if contents is None:
        return
    container.clear()
    if isinstance(container, list):
        container.extend(contents)
    else:
        container.update(contents)


def _backend_flags() -> dict[str, Any]:
    return {
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.backends.cudnn.deterministic,
        "grad": torch.is_grad_enabled(),
        "default_dtype": torch.get_default_dtype(),
    }


def _set_backend_flags(flags: dict[str, Any]) -> None:
    torch.backends.cudnn.benchmark = flags["benchmark"]
    torch.backends.cudnn.deterministic = flags["deterministic"]
    torch.set_grad_enabled(flags["grad"])
    torch.set_default_dtype(flags["default_dtype"])


class _StorageBytes:
    """The bytes of all storages under some tensors, each storage once."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._file: IO[bytes] | None = None
        self._on_host: list[tuple[torch.UntypedStorage, int]] = []  # in a temporary file, in this order
        self._copied: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        self._whole: list[tuple[Tensor, Tensor]] = []  # tensors without a plain storage: sparse and other kinds
        seen: set[int] = set()
        for tensor in tensors:
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
        if self._file is not None:
            self._file.seek(0)
        for storage, size in self._on_host:
            assert self._file is not None
            if storage.nbytes() != size:
                raise StateNotRestoredError(
                    f"a tensor of {size} bytes was resized to {storage.nbytes()} during a trial and cannot be put "
                    "back: make the model and the optimizer anew before training"
                )
            if self._file.readinto(_memory(storage, size)) != size:  # type: ignore[attr-defined]
                raise StateNotRestoredError("the snapshot's temporary file was cut short: make the model anew")
        for storage, saved in self._copied:
            if storage.nbytes() != saved.nbytes():
                raise StateNotRestoredError(f"a device tensor of {saved.nbytes()} bytes was resized during a trial")
            storage.copy_(saved, non_blocking=False)
        with torch.no_grad():
            for tensor, clone in self._whole:
                tensor.copy_(clone)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._copied.clear()
        self._whole.clear()


def _memory(storage: torch.UntypedStorage, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(storage.data_ptr())).cast("B")
