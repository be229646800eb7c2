"""A trial that is itself a group of ranks, as torchrun starts them: rank 0 searches, the others train along.

Only rank 0 knows the study. It tells the others each trial's parameters and, at the end, the result.
"""

from typing import Any

import torch.distributed as dist

from autoaccum import ranks

__all__ = ["join", "rank", "size", "tell"]


def join() -> None:
    """Joins the group where torchrun started this process and nothing has joined yet."""
    ranks.join()


def size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def tell(message: Any = None) -> Any:
    """Rank 0's message, on every rank; plain values."""
    if size() == 1:
        return message
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]
