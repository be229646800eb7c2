"""A window whose loss compares samples: all micro-batches forward, the loss once over all of them, each forward again.

The first pass runs without a graph and keeps the representations, which are small. The loss over them gives their
gradient, and that of whatever it has of its own. The second pass runs each micro-batch again and sends its part of that
gradient through: the gradient is the whole window's, at the memory of a micro-batch, for one more forward each.

Both passes are the same forwards in the same order. Buffers and random generators return to where the first began, so
that dropout, power iterations and BatchNorm's statistics do the second time what they did the first, and count once.
"""

from collections.abc import Iterable, Sequence
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
from autoaccum.window.gathered import gathered
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
        if not gathered(self.ranks, f"step {self.step + 1}", kept, failure):
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
    same = again.shape == first.shape
    if same and first.is_floating_point():
        norm = torch.linalg.vector_norm(first.float())
        same = not bool(torch.linalg.vector_norm(again.float() - first.float()) > _SAME * norm)
    elif same:
        same = torch.equal(again, first)
    if not same:
        raise LossError(
            f"encode gave another {path or 'output'} when it ran a second time on the same micro-batch with the same "
            "random numbers, so the loss's gradient does not belong to it: encode must depend on nothing that it "
            "changes itself (counters, queues, generators of its own); update such things in a callback, or in the loss"
        )
