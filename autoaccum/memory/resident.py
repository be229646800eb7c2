"""The tensors that live before a trace: parameters, buffers, gradients, optimizer state, the batch.

A trace tells what a window adds; what is there already is counted here, each storage once, however
many tensors, tied weights or views share it, and in full, as that is what the device holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["dense_parts", "lies_on", "resident_bytes", "resident_parts"]


def resident_bytes(*objects: Any) -> int:
    """Bytes of the distinct storages that `objects` hold: modules (with gradients), optimizers, batches, tensors."""
    return _count(_all(objects), None, set())


def resident_parts(
    model: nn.Module, optimizers: Any = (), batch: Any = None, *, device: torch.device | None = None
) -> dict[str, int]:
    """Resident bytes by part, on a device (any index where it has none); a shared storage counts in the first part.

    Parts: "parameters", "buffers", "gradients", "optimizer_state", "batch".
    """
    held: dict[str, Iterable[Tensor]] = {
        "parameters": model.parameters(),
        "buffers": model.buffers(),
        "gradients": [parameter.grad for parameter in model.parameters() if parameter.grad is not None],
        "optimizer_state": _all([optimizers]),
        "batch": _all([batch]),
    }
    seen: set[tuple[torch.device, int]] = set()
    return {part: _count(tensors, device, seen) for part, tensors in held.items()}


def _all(objects: Iterable[Any]) -> Iterator[Tensor]:
    """Every tensor in nested containers; a parameter's gradient follows it."""
    pending = list(objects)
    visited: dict[int, Any] = {}  # by id; the object too, so that no id is used again meanwhile
    while pending:
        thing = pending.pop()
        if id(thing) in visited:
            continue
        visited[id(thing)] = thing
        if isinstance(thing, Tensor):
            yield thing
            if thing.is_leaf and thing.grad is not None:
                yield thing.grad
        elif isinstance(thing, nn.Module):
            pending += [*thing.parameters(), *thing.buffers()]
        elif isinstance(thing, torch.optim.Optimizer):
            pending += [thing.state, *thing.param_groups]
        elif isinstance(thing, Mapping):
            pending += thing.values()
        elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
            pending += [getattr(thing, field.name) for field in dataclasses.fields(thing)]
        elif isinstance(thing, (list, tuple, set, frozenset)):
            pending += thing


def _count(tensors: Iterable[Tensor], device: torch.device | None, seen: set[tuple[torch.device, int]]) -> int:
    total = 0
    for tensor in tensors:
        for dense in dense_parts(tensor):
            if dense.device.type == "meta" or not lies_on(dense.device, device):
                continue
            storage = dense.untyped_storage()
            key = (dense.device, storage.data_ptr())
            if key not in seen:
                seen.add(key)
                total += storage.nbytes()
    return total


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """The strided tensors on this rank that a tensor consists of."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return [getattr(part, name)() for name in _PIECES.get(part.layout, ())] or [part]


_BY_ROWS, _BY_COLUMNS = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
_PIECES = {
    torch.sparse_coo: ("_indices", "_values"), torch.jagged: ("values", "offsets"), torch.sparse_csr: _BY_ROWS,
    torch.sparse_bsr: _BY_ROWS, torch.sparse_csc: _BY_COLUMNS, torch.sparse_bsc: _BY_COLUMNS,
}  # fmt: skip


def lies_on(device: torch.device, wanted: torch.device | None) -> bool:
    """Whether a device is the one wanted: None is any, and so is any index where that has none."""
    if wanted is None:
        return True
    return device.type == wanted.type and (wanted.index is None or device.type == "cpu" or device.index == wanted.index)
