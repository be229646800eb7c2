"""A window whose loss compares samples: all micro-batches forward, the loss once over all of them, each forward again.

The first pass runs without a graph and keeps the representations, which are small. The loss over them gives their
gradient, and that of whatever it has of its own. The second pass runs each micro-batch again and sends its part of that
gradient through: the gradient is the whole window's, at the memory of a micro-batch, for one more forward each.

Both passes are the same forwards in the same order. Buffers and random generators return to where the first began, so
that dropout, power iterations and BatchNorm's statistics do the second time what they did the first, and count once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoaccum.data import tree
from autoaccum.data.structure import plain
from autoaccum.errors import LossError, NothingFitsError
from autoaccum.loss.call import scalar
from autoaccum.loss.coupled import Representations
from autoaccum.loss.objective import Objective
from autoaccum.memory.oom import Verdict, out_of_memory
from autoaccum.model.precision import Precision
from autoaccum.random_state import RandomState
from autoaccum.ranks import Ranks
from autoaccum.window.gathered import Everyone, gathered
from autoaccum.window.window_start import WindowStart

__all__ = ["LossOutOfMemoryError", "TwoPasses"]

# By which a representation may differ the second time: kernels whose sums depend on chance differ by less, and another
# dropout mask by more than all of this.
_SAME = 0.02


class LossOutOfMemoryError(NothingFitsError):
    """Memory ran out in the loss over a whole window, so that no micro-batch is small enough."""


class TwoPasses:
    """Runs the micro-batches of one window after another.

    `rehearsed`: samples of the window that a trial stands for, which runs one of its micro-batches alone; 0: none.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, precision: Precision, device: torch.device, ranks: Ranks
    ) -> None:
        """Keeps references only; the objective's loss is one that compares samples."""
        assert objective.coupled is not None
        self._model, self._coupled, self._shared = model, objective.coupled, objective.shared
        self._precision, self._device, self._ranks = precision, device, ranks
        self._compared = False  # whether a second pass was held against its first
        self.rehearsed = 0

    def run(
        self,
        batches: Sequence[Any],
        *,
        what: str,
        again: Callable[[], None],
        on_phase: Callable[[str], None],
        entered: Callable[[], None],
    ) -> Tensor | None:
        """Adds this rank's part of the window's gradient to the parameters'.

        Args:
            batches: this rank's micro-batches, on the host; none where it idles.
            what: which window it is, for the ranks' exchanges: "step 4".
            again: called between the passes, when the buffers are as they were before the first.
            on_phase: told of "batch", "forward" and "backward".
            entered: called after each micro-batch's backward.

        Returns:
            The window's loss, shape (), detached, on the first rank that has samples; None on the others, and where
                another rank failed in the first pass, so that the window cannot go on: the ranks' vote follows.

        Raises:
            LossError: no scalar, no graph, or representations that are not one row a sample.
            NothingFitsError: the loss itself ran out of memory, which smaller micro-batches do not help.
        """
        sizes = [tree.batch_size(batch) for batch in batches]
        start = WindowStart([self._model], self._device)
        start.mark()
        own = Representations(self._shared, max(sum(sizes), self.rehearsed))
        whole: Any = None
        failure: Exception | None = None
        try:
            self._first(own, batches, sizes, on_phase)
            whole = self._batch(batches, sum(sizes))
        except Exception as error:
            if self._ranks.size == 1:
                raise
            failure = error  # told to the others first, who would wait for this rank's representations
        everyone = gathered(self._ranks, what, own, whole, sum(sizes), failure)
        if everyone is None or not sizes:
            return None
        loss = self._loss(everyone, on_phase)
        after = RandomState(self._device)
        start.restore()
        again()
        row = everyone.first_row
        for index, (batch, size) in enumerate(zip(batches, sizes)):
            owns = everyone.leads and not index  # what all samples share has its gradient once
            self._second(batch, own, slice(row, row + size), owns, on_phase)
            row += size
            entered()
        after.restore()
        self._compared = True
        return loss if everyone.leads else None

    def _first(
        self, own: Representations, batches: Sequence[Any], sizes: Sequence[int], on_phase: Callable[[str], None]
    ) -> None:
        """All forwards without a graph."""
        for batch, size in zip(batches, sizes):
            on_phase("batch")
            placed = plain(tree.move(batch, self._device))
            on_phase("forward")
            with torch.no_grad(), self._precision.autocast():
                own.enter(self._coupled.encode(self._model, placed), size)
        own.repeat()

    def _batch(self, batches: Sequence[Any], samples: int) -> Any:
        """The window's batch on the device, where the loss takes it."""
        if not self._coupled.takes_batch or not batches:
            return None
        whole = tree.join([self._coupled.for_loss(batch) for batch in batches])
        if self.rehearsed > samples:
            whole = tree.repeat(whole, self.rehearsed)
        return plain(tree.move(whole, self._device))

    def _loss(self, everyone: Everyone, on_phase: Callable[[str], None]) -> Tensor:
        """The loss over the window, whose gradient is then at the leaves and at what the loss has of its own."""
        kept = everyone.representations
        try:
            leaves = [leaf for leaf in kept.leaves().values() if leaf.requires_grad]
            with self._precision.autocast():
                loss = scalar(self._coupled.over(kept.whole(), everyone.batch), "the coupled loss")
            on_phase("backward")
            self._precision.forget_casts()
            with self._precision.outside():
                # Every rank computes the same loss: what it has of its own gets its gradient on one of them.
                inputs = None if everyone.leads else leaves
                scaled = self._precision.scaler.scale(loss)
                scaled.backward(inputs=inputs)  # type: ignore[no-untyped-call]
            return loss.detach()
        except Exception as error:
            if out_of_memory(error) is not Verdict.SURELY:
                raise
        raise LossOutOfMemoryError(
            f"the loss itself ran out of memory over the {max(everyone.samples, self.rehearsed)} samples of a window, "
            "which smaller micro-batches do not help: it compares all of them at once. Use a smaller target_batch, or "
            "compute the loss in pieces that are checkpointed (torch.utils.checkpoint)"
        )

    def _second(
        self, batch: Any, kept: Representations, rows: slice, owns: bool, on_phase: Callable[[str], None]
    ) -> None:
        """One micro-batch's forward again, and its part of the gradient through it; `owns`: and what all share."""
        on_phase("batch")
        placed = plain(tree.move(batch, self._device))
        on_phase("forward")
        with self._precision.autocast():
            outputs = self._coupled.encode(self._model, placed)
        leaves = kept.leaves()
        tensors, gradients = [], []
        for path, tensor in tree.tensors(outputs):
            leaf, shared = leaves[path], kept.is_shared(path)
            if not self._compared:
                _compare(path, tensor.detach(), leaf.detach() if shared else leaf.detach()[rows])
            if leaf.grad is None or not tensor.requires_grad or (shared and not owns):
                continue
            tensors.append(tensor)
            gradients.append(leaf.grad if shared else leaf.grad[rows])
        if not tensors:
            if not owns:
                return
            raise LossError(
                "the coupled loss depends on nothing that encode computed with a graph, so nothing can be learned: "
                "take away .detach() and no_grad on its way, and see that some parameter requires a gradient"
            )
        on_phase("backward")
        self._precision.forget_casts()
        with self._precision.outside():
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
