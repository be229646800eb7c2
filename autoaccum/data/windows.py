"""A source and a plan, read as windows of micro-batches: what one optimizer step is trained on.

Each rank reads the same windows and gets its part of each. The plan is asked at every window, since it changes when
memory runs out; a window that was handed out stays as it is, and can be trained on again in smaller pieces.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from autoaccum.data import tree
from autoaccum.data.base import Source
from autoaccum.data.cuts import Cutter
from autoaccum.data.sample_lengths import Padding
from autoaccum.data.structure import children
from autoaccum.errors import DataError
from autoaccum.planning.plan import Plan

__all__ = ["Window", "windows"]


@dataclass(frozen=True)
class Window:
    """One optimizer step's samples, this rank's part of them.

    Attributes:
        batches, sizes: the micro-batches, on the host, and samples in each; none where this rank idles.
        samples, total: in all of them, and over all ranks.
        epoch, index: the epoch it belongs to, and its number in that.
        padding: what its micro-batches are padded to, where it was cut by length.
        indices: of its samples in the dataset, in the order of the micro-batches; None where they have none.
    """

    batches: list[Any]
    sizes: tuple[int, ...]
    samples: int
    total: int
    epoch: int
    index: int
    padding: Padding | None = None
    indices: Any = None


def windows(
    source: Source, plan: Callable[[], Plan], epoch: int, *, start: int = 0, validates: bool = False
) -> Iterator[Window]:
    """The windows of one epoch.

    Each has the plan's target over all ranks, but the last, which is short, or takes in a tail that is too small to be
    cut, or is dropped, as the plan's `tail` and the loader's `drop_last` say. Of data that `validates` all is read that
    the loader itself would show: its `drop_last` leaves out what is short of its own batch, not of a window.

    The first `start` windows are passed over, for going on in the middle of an epoch; where samples have indices,
    nothing is fetched for them.

    Raises:
        DataError: the data is empty, cannot be read, or could be read only once; or the plan is for other ranks.
        PlanError: the plan cannot cut a window.
    """
    batch = source.loader_batch if validates and source.drop_last else None
    cutter = Cutter(plan, source.drop_last and not validates, batch or 1)
    planned, here = (cutter.plan.rank, cutter.plan.world_size), (source.ranks.rank, source.ranks.size)
    if planned != here:  # samples would be lost or seen twice
        raise DataError(
            f"the plan is for rank {planned[0]} of {planned[1]}, and rank {here[0]} of {here[1]} reads the data: make "
            f"the plan with rank={here[0]} and world_size={here[1]}"
        )
    for index, (total, batches, padding, indices) in enumerate(source.read(epoch, cutter, start), start):
        kept, sizes = _with_samples(source, batches)
        batches.clear()  # the window alone holds them: whoever has trained on it lets them go
        samples = sum(sizes)
        # Where a collate function has dropped some, nobody knows which are left.
        named = indices if indices is not None and len(indices) == samples else None
        yield Window(kept, tuple(sizes), samples, total, epoch, index, padding, named)


def _with_samples(source: Source, batches: list[Any]) -> tuple[list[Any], list[int]]:
    """The micro-batches that hold samples, marked, and how many: a collate function may have dropped some, or all."""
    kept, sizes = [], []
    for batch in batches:
        size = tree.flat_size(batch)
        if size is None and not _holds_none(batch):
            kept.append(source.marked(batch))
            sizes.append(tree.batch_size(kept[-1]))
        elif size:
            kept.append(batch)
            sizes.append(size)
    return kept, sizes


def _holds_none(batch: Any) -> bool:
    """Whether a micro-batch that is not flat has no samples left: None, no rows, or nothing inside."""
    if batch is None:
        return True
    tensors = [tensor for _, tensor in tree.tensors(batch)]
    return all(tensor.dim() and not tensor.size(0) for tensor in tensors) if tensors else children(batch) == []
