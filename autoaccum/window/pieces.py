"""What a person's own loop gives to a window, as micro-batches: cut by the plan, unless they are cut already.

And a model that is wrapped there to meet the other ranks in each backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from autoaccum.data import tree
from autoaccum.data.per_sample import ListReader
from autoaccum.data.structure import alike, children
from autoaccum.errors import SetupError
from autoaccum.planning.plan import Plan
from autoaccum.planning.split import even_split

__all__ = ["micro_batches", "without_synchronisation"]


def micro_batches(batches: Any, plan: Plan, lists: ListReader) -> list[Any]:
    """The micro-batches of one window on this rank.

    Args:
        batches: one batch, or a list of micro-batches of one structure; an empty list where this rank has no samples.
        plan: its limit cuts the batch; a SetupError where a micro-batch is larger.
        lists: reads what lists in them hold, alike for all windows.
    """
    if isinstance(batches, list) and not batches:
        return []  # this rank has no samples of the window
    limit = plan.limits[plan.rank]
    # A DataLoader gives lists as well, of the parts of one batch: these differ, as micro-batches do not.
    if isinstance(batches, list) and batches and children(batches[0]) is not None and alike(batches):
        pieces = [lists.read(batch) for batch in batches]
        largest = max(map(tree.batch_size, pieces))
        if largest > limit:
            raise SetupError(
                f"window() was given a list of {len(batches)} micro-batches, the largest of {largest} samples, and "
                f"the plan's limit is {limit}: pass smaller ones; or, if the list is one batch, pass it as a tuple"
            )
        return pieces
    batch = lists.read(batches)
    return tree.split(batch, even_split(tree.batch_size(batch), limit, minimum=plan.minimum))


@contextmanager
def without_synchronisation(model: nn.Module) -> Iterator[None]:
    """A forward and a backward pass of a DistributedDataParallel model in which it meets no other rank."""
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    # Its first forward shares the buffers even inside no_sync(), and a rank without samples runs no forward.
    model.require_forward_param_sync = False
    with model.no_sync():
        yield
