"""The representations of all ranks, where a loss compares samples: gathered between the window's two passes.

A rank that failed in its first pass says so before anything is gathered, and memory for the others' rows is allocated
before the ranks meet: nobody waits for rows that do not come.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoaccum.data import tree
from autoaccum.errors import LossError
from autoaccum.loss.coupled import Representations
from autoaccum.ranks import Flight, Ranks

__all__ = ["gathered"]


def gathered(ranks: Ranks, what: str, own: Representations, failure: Exception | None) -> bool:
    """Gathers every rank's representations and batch; all ranks call it, those without samples too.

    Args:
        ranks, what: this process among others, and which window it is.
        own: this rank's, which are those of all ranks afterwards, in the ranks' order.
        failure: what this rank's first pass raised, which is raised here.

    Returns:
        Whether the window goes on here: no other rank failed, and this one has samples.

    Raises:
        LossError: the batch has parts that are no tensors.
    """
    samples = own.filled
    if ranks.size == 1:
        return samples > 0
    parts = [*own.rows().items(), *(("batch " + path, tensor) for path, tensor in tree.tensors(own.batch))]
    said = {"samples": samples, "failed": failure is not None, "parts": [_described(*part) for part in parts]}
    everyone = [json.loads(each) for each in ranks.collect(f"{what}: representations", json.dumps(said).encode())]
    if any(each["failed"] for each in everyone):
        if failure is not None:
            raise failure
        return False
    counts = [each["samples"] for each in everyone]
    first = next(rank for rank, count in enumerate(counts) if count)
    flight, rooms = Flight(), []
    refused: Exception | None = None
    try:
        mine = [tensor for _, tensor in parts] if samples else [_none(*each) for each in everyone[first]["parts"]]
        for tensor in mine:
            part, room = ranks.ready_rows(tensor.detach().contiguous(), counts)
            flight.starts += part.starts
            flight.lands += part.lands
            rooms.append(room)
    except Exception as error:
        refused = error
    if ranks.any(f"{what}: room for representations", refused is not None):
        if refused is not None:
            raise refused
        return False
    ranks.run(flight)
    if samples:
        whole = {path: torch.cat(room) for (path, _), room in zip(parts, rooms)}
        own.replace({path: whole[path] for path in own.rows()})
        own.batch = _joined(own.batch, whole, samples)
        own.samples, own.first_row, own.leads = sum(counts), sum(counts[: ranks.rank]), ranks.rank == first
    return samples > 0


def _joined(batch: Any, whole: dict[str, Tensor], samples: int) -> Any:
    """The batch with everybody's rows in the tensors' places."""
    if batch is None:
        return None
    paths = iter([path for path, _ in tree.tensors(batch)])
    joined = tree.map_tensors(lambda _: whole["batch " + next(paths)], batch)
    found = {tensor.size(0) for _, tensor in tree.tensors(joined) if tensor.dim()}
    if not found or tree.batch_size(joined) not in found:
        raise LossError(
            f"the batch of {samples} samples has parts that are no tensors, and a loss over several ranks is given all "
            "of it: have encode return what the loss needs, and let the loss take the representations alone"
        )
    return joined


def _described(path: str, tensor: Tensor) -> Sequence[Any]:
    return path, str(tensor.dtype).removeprefix("torch."), list(tensor.shape[1:]), str(tensor.device.type)


def _none(path: str, dtype: str, shape: Sequence[int], device: str) -> Tensor:
    """No rows of a part that another rank has."""
    return torch.empty((0, *shape), dtype=getattr(torch, dtype), device=device)
