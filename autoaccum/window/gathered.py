"""The representations of all ranks, where a loss compares samples: gathered between the window's two passes.

A rank that failed in its first pass says so before anything is gathered, and memory for the others' rows is allocated
before the ranks meet: nobody waits for rows that do not come.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoaccum.data import tree
from autoaccum.errors import LossError
from autoaccum.loss.coupled import Representations
from autoaccum.ranks import Flight, Ranks

__all__ = ["Everyone", "gathered"]


@dataclass
class Everyone:
    """What the loss is computed over.

    Attributes:
        representations: of the samples of all ranks, in the ranks' order.
        batch: theirs too, on the device; None where the loss does not take it.
        first_row: where this rank's samples begin.
        samples: of all ranks.
        leads: whether this rank gives what all samples share its gradient: the first that has samples.
    """

    representations: Representations
    batch: Any
    first_row: int
    samples: int
    leads: bool


def gathered(
    ranks: Ranks, what: str, own: Representations, batch: Any, samples: int, failure: Exception | None
) -> Everyone | None:
    """Gathers every rank's representations and batch; all ranks call it, those without samples too.

    Args:
        ranks, what: this process among others, and which window it is.
        own: this rank's representations, whose leaves are replaced by those of all.
        batch: this rank's, on the device; None where the loss does not take it, or there is none.
        samples: on this rank.
        failure: what this rank's first pass raised, which is raised here; None is returned where another rank failed.

    Raises:
        LossError: the batch has parts that are no tensors.
    """
    if ranks.size == 1:
        return Everyone(own, batch, 0, samples, True)
    parts = [*own.rows().items(), *(("batch " + path, tensor) for path, tensor in tree.tensors(batch))]
    said = {"samples": samples, "failed": failure is not None, "parts": [_described(*part) for part in parts]}
    everyone = [json.loads(each) for each in ranks.collect(f"{what}: representations", json.dumps(said).encode())]
    if any(each["failed"] for each in everyone):
        if failure is not None:
            raise failure
        return None
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
        return None
    ranks.run(flight)
    if not samples:
        return Everyone(own, None, 0, sum(counts), False)
    whole = {path: torch.cat(room) for (path, _), room in zip(parts, rooms)}
    own.replace({path: whole[path] for path in own.rows()})
    return Everyone(own, _joined(batch, whole, samples), sum(counts[: ranks.rank]), sum(counts), ranks.rank == first)


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
