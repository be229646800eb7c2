"""DeepSpeed: windows in a person's own loop around an engine, under ZeRO 0 to 3.

Choices made here:

- The engine leaves accumulation to its caller (`"managed_gradient_accumulation": false` in its configuration), so that
  each `engine.step()` ends a window, of however many micro-batches.
- It averages gradients over the ranks and reduces them while micro-batches run. So what a micro-batch weighs is known
  before its backward: its denominator follows from the batch, and is summed over the window and the ranks first.
- Under ZeRO 2 and 3 the ranks meet in every pass. One that has fewer micro-batches runs its last again, of weight 0.
- What an engine has reduced it cannot give back: no window is replayed when memory runs out, and one that was left
  early ends the training.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from autoaccum.data import tree
from autoaccum.data.per_sample import ListReader
from autoaccum.data.structure import plain
from autoaccum.errors import LossError, SetupError, shown
from autoaccum.loss.call import scalar
from autoaccum.loss.graph import read
from autoaccum.model.optimizer import check_ranks
from autoaccum.planning.plan import Plan
from autoaccum.ranks import here
from autoaccum.window.own_loop import Divisors, micro_batches
from autoaccum.window.record import StepRecord

__all__ = ["EngineAccumulator"]


class EngineAccumulator:
    """Turns the micro-batches of a window into one step of a DeepSpeed engine.

    ```python
    engine, *_ = deepspeed.initialize(model=model, config={**config, "managed_gradient_accumulation": False})
    accumulator = autoaccum.integrations.deepspeed.EngineAccumulator(engine, plan)
    for batch in loader:                          # this rank's share of the target batch, on the host
        for micro in accumulator.window(batch):   # micro-batches, on the device
            accumulator.backward(engine(**micro).loss)
    ```

    Attributes:
        last: what the last step did; None before the first.
    """

    def __init__(self, engine: Any, plan: Plan, *, reduction: str | Callable[[Any], Any] = "sample_mean") -> None:
        """Checks the engine; nothing runs.

        Args:
            engine: what `deepspeed.initialize` gave.
            plan: its sizes cut the batches given to `window`; made with the ranks' `world_size` and `rank`.
            reduction: what a micro-batch's mean loss divides by: its samples, or f(micro-batch on the host) -> a
                number, such as its labels that are not ignored.

        Raises:
            SetupError: an engine that accumulates by itself, another number of ranks, or an unknown reduction.
        """
        if getattr(engine, "managed_gradient_accumulation", lambda: True)():
            raise SetupError(
                'this engine accumulates by itself: put "managed_gradient_accumulation": false into its configuration '
                "(DeepSpeed 0.19 or newer), so that each engine.step() ends a window"
            )
        if reduction != "sample_mean" and not callable(reduction):
            raise SetupError(f"reduction={shown(reduction)}: give 'sample_mean' or f(micro-batch) -> float")
        self.engine, self.plan = engine, plan
        self.last: StepRecord | None = None
        self._count: Callable[[Any], Any] = tree.batch_size if reduction == "sample_mean" else reduction  # type: ignore[assignment]
        self._ranks, self._lists = here(engine.device), ListReader()
        check_ranks(plan.rank, plan.world_size, self._ranks)
        self._divisors = Divisors(
            self._ranks.size,
            "count",
            "it is no mean over what counts: give reduction=f(micro-batch on the host), what its mean divides by",
        )
        self._step, self._resting = 0, None
        self._weight: float | None = None  # of the micro-batch that runs; None once its backward was called
        self._counted = 0.0  # in it
        self._loss: Tensor | float = 0.0
        self._left_early = False

    def window(self, batch: Any) -> Iterator[Any]:
        """Yields the micro-batches of one window, on the device; the engine's step follows the last one.

        All ranks call this, also one that has no samples in a short last window.

        Args:
            batch: this rank's samples on the host, cut by the plan; or a list of micro-batches that are cut already.

        Raises:
            LossError: `backward` was not called once for a micro-batch, or nothing in the window counts.
            SetupError: the window before was left early.
        """
        if self._left_early:
            raise SetupError(
                "the window before was left early, and an engine cannot give its part of the gradient back: load a "
                "checkpoint into a new engine and go on from there"
            )
        started, what = time.perf_counter(), f"step {self._step + 1}"
        pieces = micro_batches(batch, self.plan, self._lists)
        counts = [float(self._count(piece)) for piece in pieces]
        own = [float(sum(map(tree.batch_size, pieces))), sum(counts)]
        (samples, total), passes = self._ranks.meet(what, own, own=len(pieces))
        if total == 0:
            raise LossError(f"nothing counts in the window of {what}: its {samples:.0f} samples sum to a denominator "
                            "of 0 (every target is ignored); leave such a window out")  # fmt: skip
        self._resting = pieces[-1] if pieces else self._resting
        if self._resting is None:
            self._ranks.fail()
            raise SetupError("a rank without samples in the first window cannot take part in it: raise target_batch")
        missing = int(max(passes)) - len(pieces)
        self._loss, self._left_early = 0.0, True
        self._divisors.open()
        for piece, count in zip([*pieces, *[self._resting] * missing], [*counts, *[0.0] * missing], strict=True):
            self._weight, self._counted = count / total, count
            yield plain(tree.move(piece, self.engine.device))
            if self._weight is not None:
                raise LossError("call accumulator.backward(loss) exactly once for each micro-batch")
        lr = float(self.engine.get_lr()[0])
        self.engine.step()
        self._left_early = False
        self._step += 1
        (loss,) = self._ranks.tally(f"the end of {what}", [float(self._loss)])
        norm, seconds = self.engine.get_global_grad_norm(), time.perf_counter() - started
        self.last = StepRecord(
            step=self._step, epoch=0, loss=loss, lr=lr, grad_norm=None if norm is None else float(norm),
            samples=int(samples), micro_batches=len(pieces), seconds=seconds, samples_per_second=samples / seconds,
        )  # fmt: skip

    def backward(self, loss: Tensor) -> None:
        """Adds one micro-batch's gradient.

        Args:
            loss: its mean loss, a scalar with a graph.

        Raises:
            LossError: not a scalar, without a graph, or called twice for a micro-batch; or its graph divides by
                something else than `reduction` says.
        """
        if self._weight is None:
            raise LossError("backward was called twice for a micro-batch, or outside a window")
        scalar(loss, "the micro-batch")
        self._divisors.check(read(loss), self._counted)
        weight, self._weight = self._weight, None
        self.engine.backward(loss * (weight * self._ranks.size), scale_wrt_gas=False)
        if weight:
            self._loss = self._loss + loss.detach() * weight
