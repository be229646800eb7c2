"""Forward and backward of a window's micro-batches, each with its part of the window's loss."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autoaccum.batch_norm.pooled_statistics import PooledStatistics
from autoaccum.data import tree
from autoaccum.errors import SetupError
from autoaccum.interrupts import check_interrupt, interruptible, uninterrupted
from autoaccum.loss.mean import Mean, Several
from autoaccum.loss.objective import Objective
from autoaccum.model.optimizer import FirstBackward
from autoaccum.model.precision import Precision, SideBuffers
from autoaccum.model.sparse_gradients import SparseGradients
from autoaccum.window.engine import backward
from autoaccum.window.noise_scale import NoiseScale
from autoaccum.window.sharded import ShardedPasses
from autoaccum.window.two_passes import TwoPasses
from autoaccum.window.window_sums import Ledger, Parts

__all__ = ["Passes", "call", "ignore"]


class Passes:
    """What an Accumulator does between a window's opening and its end.

    Attributes:
        sharded: runs the passes of a model whose ranks meet in each of them; None for others.
        on_phase: told the name of each phase as it begins.
    """

    model: nn.Module
    optimizer: Optimizer
    objective: Objective | None
    device: torch.device
    precision: Precision
    noise_scale: NoiseScale
    sharded: ShardedPasses | None
    on_phase: Callable[[str], None]
    step: int
    rehearses = False
    rehearsed_samples = 0
    at_once = False
    _ledger: Ledger | None
    _side: SideBuffers
    _sparse: SparseGradients
    _statistics: PooledStatistics
    _resting: list[nn.Module]
    _two_passes: TwoPasses | None
    _looked_at_backward: bool
    _on_host: bool
    _call: Callable[..., Any]

    @uninterrupted
    def run(self, batches: Iterable[Any]) -> None:
        """Forward and backward of each micro-batch in turn, as the objective says."""
        ledger = self._running()
        if self._two_passes is not None and not self.at_once:
            self._run_twice(self._two_passes, list(batches))
            return
        if self.sharded is not None:
            passes = max(ledger.micro_batches)
            self.sharded.run(list(batches), passes, self._one, self._empty_pass, self._resting)
            return
        for batch in batches:
            check_interrupt()
            self._one(batch)

    def _one(self, batch: Any) -> None:
        """Forward and backward of one micro-batch."""
        ledger, objective = self._running(), self.objective
        assert objective is not None
        self.on_phase("batch")
        placed = batch if self._on_host else tree.move(batch, self.device)
        self.on_phase("forward")
        # Where nothing counts the forward still runs: statistics and random generators move as they would.
        graph = ledger.counts or self.sharded is not None
        with self.precision.autocast(), nullcontext() if graph else torch.no_grad():
            terms = self._call(objective.terms, placed, ledger.own, batch)
        self._add(terms)

    def _empty_pass(self, sample: Any) -> None:
        """Forward and backward of a sample that enters no sum."""
        assert self.objective is not None
        with self.precision.autocast():
            terms = self.objective.terms(tree.move(sample, self.device))
        self._backward_of_nothing(terms)

    def _backward_of_nothing(self, terms: Mapping[str, Mean]) -> None:
        self.precision.forget_casts()
        losses = [terms.loss] if isinstance(terms, Several) else [term.part(1.0)[0] for term in terms.values()]
        with self.precision.outside():
            backward(losses, [0.0] * len(losses))
        self._side.collect()

    @property
    def compares(self) -> bool:
        """Whether the loss compares the samples of a window, and each micro-batch runs forward twice."""
        return self._two_passes is not None

    def _run_twice(self, two_passes: TwoPasses, batches: Sequence[Any]) -> None:
        ledger = self._running()
        two_passes.rehearsed = self.rehearsed_samples

        def again() -> None:
            self._side.collect()  # what the loss has of its own has its gradient now
            self._statistics.discard()
            self._statistics.begin(len(batches))

        def entered() -> None:
            self._sparse.merge()
            self._side.collect()
            ledger.enter()

        what = f"step {self.step + 1}"
        loss = interruptible(two_passes.run, batches, what=what, again=again, on_phase=self.on_phase, entered=entered)
        if loss is not None:
            ledger.add(loss)

    def _add(self, terms: Mapping[str, Mean]) -> None:
        ledger = self._running()
        parts, value = ledger.parts(terms)
        ledger.note(parts if value is None else [(value, 1.0)])
        if parts:
            self.on_phase("backward")
            self.precision.forget_casts()
            looked = self._looked_at_backward or self.sharded is not None
            first = None if looked else FirstBackward(self.model, self.optimizer)
            with self.precision.outside():
                self._call(self._backward, parts)
            if first is not None:
                first.check()
                self._looked_at_backward = True
            self._sparse.merge()
            self._side.collect()
        elif self.sharded is not None:  # the other ranks are in the same pass, and wait for this one's gradients
            self._backward_of_nothing(terms)
        if self.noise_scale.watches:
            self.noise_scale.micro(ledger.samples[ledger.done] / ledger.total_samples)
        ledger.enter()

    def _backward(self, parts: Parts) -> None:
        """Each term's factor is where its backward pass begins: a multiplication less in the graph."""
        scaler = self.precision.scaler
        if scaler.is_enabled():
            share = torch.stack([tensor * factor for tensor, factor in parts]).sum()
            scaler.scale(share).backward()  # type: ignore[no-untyped-call]
            return
        backward([tensor for tensor, _ in parts], [factor for _, factor in parts])

    def _running(self) -> Ledger:
        if self._ledger is None:
            raise SetupError("no window is open: call backward inside `for micro in accumulator.window(batch):`")
        return self._ledger


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function`, which Ctrl-C does not break off."""
    return function(*arguments)


def ignore(phase: str) -> None:
    """Takes no notice of a window's phases; a trace puts something that does in `on_phase`."""
