"""A window whose loss compares samples: all micro-batches forward, the loss once over all of them, each forward again.

The first pass runs without a graph and keeps the representations, which are small. The loss over them gives their
gradient, and that of whatever it has of its own. The second pass runs each micro-batch again and sends its part of that
gradient through: the gradient is the whole window's, at the memory of a micro-batch, for one more forward each.

Both passes are the same forwards in the same order. Buffers and random generators return to where the first began, so
that dropout, power iterations and BatchNorm's statistics do the second time what they did the first, and count once.

Over ranks all representations are gathered between the passes. A rank that failed in its first pass says so before, and
memory for the others' rows is allocated before the ranks meet: nobody waits for rows that do not come.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from autoaccum.data import tree
from autoaccum.data.structure import plain
from autoaccum.errors import LossError, NothingFitsError
from autoaccum.interrupts import interruptible, uninterrupted
from autoaccum.loss.call import scalar
from autoaccum.loss.coupled import Coupled, Representations
from autoaccum.memory.oom import Verdict, out_of_memory
from autoaccum.random_state import RandomState
from autoaccum.ranks import Flight, Ranks
from autoaccum.window.passes import Passes
from autoaccum.window.window_start import WindowStart

__all__ = ["LossOutOfMemoryError", "TwoPasses"]

# By which a representation may differ the second time: kernels whose sums depend on chance differ by less, and another
# dropout mask by more than all of this.
_SAME = 0.02


class LossOutOfMemoryError(NothingFitsError):
    """Memory ran out in the loss over a whole window, so that no micro-batch is small enough."""


class TwoPasses(Passes):
    """Runs each micro-batch once, or twice where the loss compares samples.

    Attributes:
        rehearsed_samples: how many samples a loss that compares them is computed over where one micro-batch is tried:
            those of its window; 0: those that are there.
        at_once: set where such a loss runs on one graph, as the reference that its two passes are held against; the
            window must be one micro-batch.
    """

    rehearsed_samples = 0
    at_once = False
    _repeated = False  # a second pass was held against its first

    @uninterrupted
    def run(self, batches: Iterable[Any]) -> None:
        """Adds this rank's part of the window's loss and gradient.

        Raises:
            LossError: no scalar, no graph, or representations that are not one row a sample.
            LossOutOfMemoryError: the loss itself ran out of memory, which smaller micro-batches do not help.
        """
        coupled = self.objective.coupled
        if coupled is None or self.at_once:
            super().run(batches)
        else:
            interruptible(self._run_twice, coupled, list(batches))

    def _run_twice(self, coupled: Coupled, batches: Sequence[Any]) -> None:
        """Where another rank failed in the first pass the window cannot go on: the ranks' vote follows."""
        sums, sizes = self._running(), [tree.batch_size(batch) for batch in batches]
        start = WindowStart([self.model], self.device)
        start.mark()
        kept = Representations(coupled, self.objective.shared, max(sum(sizes), self.rehearsed_samples))
        failure: Exception | None = None
        try:
            self._first(kept, batches, sizes)
        except Exception as error:
            if self.ranks.size == 1:
                raise
            failure = error  # told to the others first, who would wait for this rank's representations
        if self.ranks.size > 1 and not _gather(self.ranks, f"step {self.step + 1}", kept, failure):
            return
        if not kept.filled:
            return
        loss = self._loss(kept)
        after = RandomState(self.device)
        start.restore()
        self.side.collect()  # what the loss has of its own has its gradient now
        self._statistics.discard()
        self._statistics.begin(len(batches))
        row = kept.first_row
        for index, (batch, size) in enumerate(zip(batches, sizes)):
            owns = kept.leads and not index  # what all samples share has its gradient once
            self._second(batch, kept, slice(row, row + size), owns)
            row += size
            self.sparse.merge()
            self.side.collect()
            sums.done += 1
        after.restore()
        self._repeated = True
        if kept.leads:
            sums.add(loss)

    def _encoded(self, batch: Any, kept: Representations) -> Any:
        """One micro-batch's representations; it waits on the host."""
        self.on_phase("batch")
        placed = plain(tree.move(batch, self.device))
        self.on_phase("forward")
        with self.precision.autocast():
            return kept.coupled.encode(self.model, placed)

    @torch.no_grad()
    def _first(self, kept: Representations, batches: Sequence[Any], sizes: Sequence[int]) -> None:
        """All forwards without a graph; and the window's batch on the device, where the loss takes it."""
        for batch, size in zip(batches, sizes):
            kept.enter(self._encoded(batch, kept), size)
        kept.repeat()
        if kept.coupled.takes_batch and batches:
            whole = tree.join([kept.coupled.for_loss(batch) for batch in batches])
            if kept.samples > kept.filled:
                whole = tree.repeat(whole, kept.samples)
            kept.batch = plain(tree.move(whole, self.device))

    def _loss(self, kept: Representations) -> Tensor:
        """The loss over the window, whose gradient is then at the leaves and at what the loss has of its own."""
        try:
            leaves = [leaf for leaf in kept.leaves().values() if leaf.requires_grad]
            with self.precision.autocast():
                loss = scalar(kept.loss(), "the coupled loss")
            self.on_phase("backward")
            self.precision.forget_casts()
            with self.precision.outside():
                # Every rank computes the same loss: what it has of its own gets its gradient on one of them.
                scaled = self.precision.scaler.scale(loss)
                scaled.backward(inputs=None if kept.leads else leaves)  # type: ignore[no-untyped-call]
            return loss.detach()
        except Exception as error:
            if out_of_memory(error) is not Verdict.SURELY:
                raise
        raise LossOutOfMemoryError(
            f"the loss itself ran out of memory over the {kept.samples} samples of a window, which smaller "
            "micro-batches do not help: it compares all of them at once. Use a smaller target_batch, or compute the "
            "loss in pieces that are checkpointed (torch.utils.checkpoint)"
        )

    def _second(self, batch: Any, kept: Representations, rows: slice, owns: bool) -> None:
        """One micro-batch's forward again, and its part of the gradient through it; `owns`: and what all share."""
        outputs, leaves = self._encoded(batch, kept), kept.leaves()
        tensors, gradients = [], []
        for path, tensor in tree.tensors(outputs):
            leaf, shared = leaves[path], path in kept.shared
            if not self._repeated:
                _compare(path, tensor.detach(), leaf.detach() if shared else leaf.detach()[rows])
            if leaf.grad is None or not tensor.requires_grad or (shared and not owns):
                continue
            tensors.append(tensor)
            gradients.append(leaf.grad if shared else leaf.grad[rows])
        if owns and not tensors:
            raise LossError(
                "the coupled loss depends on nothing that encode computed with a graph, so nothing can be learned: "
                "take away .detach() and no_grad on its way, and see that some parameter requires a gradient"
            )
        if tensors:
            self.on_phase("backward")
            self.precision.forget_casts()
            with self.precision.outside():
                torch.autograd.backward(tensors, gradients)


def _compare(path: str, again: Tensor, first: Tensor) -> None:
    """Refuses, with a LossError, an `encode` that gives something else the second time."""
    same = again.shape == first.shape and not again.is_floating_point() and torch.equal(again, first)
    if again.shape == first.shape and first.is_floating_point():
        norm = torch.linalg.vector_norm
        same = not bool(norm(again.float() - first.float()) > _SAME * norm(first.float()))
    if not same:
        raise LossError(
            f"encode gave another {path or 'output'} when it ran a second time on the same micro-batch with the same "
            "random numbers, so the loss's gradient does not belong to it: encode must depend on nothing that it "
            "changes itself (counters, queues, generators of its own); update such things in a callback, or in the loss"
        )


def _gather(ranks: Ranks, what: str, own: Representations, failure: Exception | None) -> bool:
    """Gathers every rank's representations and batch; all ranks call it, those without samples too.

    Args:
        ranks, what: this process among others, and which window it is.
        own: this rank's, which are those of all ranks afterwards, in the ranks' order.
        failure: what this rank's first pass raised, which is raised here.

    Returns:
        Whether the window goes on: no other rank failed.

    Raises:
        LossError: the batch has parts that are no tensors.
    """
    parts = own.rows() | {f"batch {path}": tensor for path, tensor in tree.tensors(own.batch)}
    said = {"samples": own.filled, "failed": failure is not None,
            "parts": [[str(part.dtype).removeprefix("torch."), part.shape[1:], part.device.type]
                      for part in parts.values()]}  # fmt: skip
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
        mine = list(parts.values())
        if not own.filled:  # no rows of each part that another rank has
            mine = [
                torch.empty((0, *shape), dtype=getattr(torch, dtype), device=device)
                for dtype, shape, device in everyone[first]["parts"]
            ]
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
    if own.filled:
        whole = dict(zip(parts, map(torch.cat, rooms), strict=True))
        own.replace({path: whole.pop(path) for path in own.rows()})
        own.batch = _joined(own.batch, iter(whole.values()), own.filled)
        own.samples, own.first_row, own.leads = sum(counts), sum(counts[: ranks.rank]), ranks.rank == first
    return True


def _joined(batch: Any, whole: Iterator[Tensor], samples: int) -> Any:
    """The batch, of so many samples here, with everybody's rows in the tensors' places."""
    if batch is None:
        return None
    joined = tree.map_tensors(lambda _: next(whole), batch)
    found = {tensor.size(0) for _, tensor in tree.tensors(joined) if tensor.dim()}
    if not found or tree.batch_size(joined) not in found:
        raise LossError(
            f"the batch of {samples} samples has parts that are no tensors, and a loss over several ranks is given all "
            "of it: have encode return what the loss needs, and let the loss take the representations alone"
        )
    return joined
