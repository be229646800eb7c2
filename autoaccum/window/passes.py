"""Forward and backward of a window's micro-batches, each with its part of the window's loss.

What an Accumulator does while its window is open; what opens and ends a window is in accumulate.py.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoaccum.batch_norm.pooled_statistics import PooledStatistics
from autoaccum.data import tree
from autoaccum.errors import SetupError
from autoaccum.interrupts import check_interrupt, interruptible, uninterrupted
from autoaccum.loss.mean import Mean, Several
from autoaccum.loss.objective import Objective
from autoaccum.model.optimizer import FirstBackward, optimizer_parameters
from autoaccum.model.precision import Precision, SideBuffers, SparseGradients
from autoaccum.model.shards import is_sharded, refuse_for_shards
from autoaccum.model.step_in_backward import StepInBackward
from autoaccum.ranks import Ranks
from autoaccum.window.ahead import Ahead
from autoaccum.window.noise_scale import NoiseScale
from autoaccum.window.sharded import ShardedPasses
from autoaccum.window.window_sums import Parts, WindowSums

__all__ = ["Passes", "backward", "call", "ignore", "run_engine"]


class Passes:
    """What an Accumulator does between a window's opening and its end.

    Attributes:
        parameters: all that a window gives gradients to: the model's and the optimizer's, each once.
        side: the open window's gradient of each of them so far, in the format that it is summed in.
        sparse: holds those whose gradients are sparse, as far as their layer says or one was seen.
        sharded: runs the passes of a model whose ranks meet in each of them; None for others.
        on_phase: told the name of each phase as it begins, for a trace of its memory.
        rehearses: set where only the memory of a step matters: no window is left out for its loss.
        in_backward: steps the optimizer in the backward pass of a window of one micro-batch; None: at windows' ends.
        stepping: a step has begun whose window has not ended: weights may be half updated.
    """

    rehearses = False
    in_backward: StepInBackward | None = None
    stepping = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        objective: Objective,
        precision: Precision,
        device: torch.device,
        ranks: Ranks,
        *,
        sums_wide: bool,
        statistics: PooledStatistics,
        clip_norm: float | None,
        log_grad_norm: bool,
    ) -> None:
        """Puts the parts together; `sums_wide`: 16-bit gradients are summed in fp32."""
        self.model, self.optimizer, self.objective, self.precision = model, optimizer, objective, precision
        self.device, self.ranks = device, ranks
        self._clip_norm, self._log_grad_norm = clip_norm, log_grad_norm
        self.step = 0
        self.on_phase: Callable[[str], None] = ignore
        self.sharded = ShardedPasses(model, ranks, device) if is_sharded(model) else None
        # Broken off inside a pass of a sharded model, a rank would leave the others waiting there.
        self._call: Callable[..., Any] = interruptible if self.sharded is None else call
        self.parameters = list(dict.fromkeys([*model.parameters(), *optimizer_parameters(optimizer)]))
        self.side = SideBuffers(self.parameters if sums_wide else [])
        self.sparse = SparseGradients(model, self.parameters)
        self._statistics = statistics
        self._resting = [layer for _, layer in statistics.layers]
        self._ahead = Ahead(device)
        self._on_host = device.type == "cpu"  # where batches lie already: walking them would be all the cost
        self._looked_at_backward = False
        self._sums: WindowSums | None = None  # of the open window
        self.noise_scale = NoiseScale(model, self.parameters)
        if precision.scaler.is_enabled():
            self.noise_scale.why_not = "gradients are scaled before they can be compared"
        why = "a loss that compares samples takes a whole model on each rank"
        refuse_for_shards(model, coupled=(self.compares, why))
        if self.compares:
            self.noise_scale.why_not = "the loss compares samples, so that micro-batches have no gradients of their own"

    def step_inside(self, inside: StepInBackward | None) -> None:
        """From here on `inside`, where there is one, steps windows of one micro-batch in their backward pass.

        Raises:
            SetupError: a norm is asked for, which takes all gradients.
        """
        if inside is not None and (self._clip_norm is not None or self._log_grad_norm):
            asked = "log_grad_norm=True" if self._clip_norm is None else f"clip_norm={self._clip_norm}"
            raise SetupError(
                f'{asked} takes the norm of all gradients, and ladder="step_in_backward" steps with each and frees it '
                "before the next is there: leave one of them out"
            )
        self.in_backward = inside

    @uninterrupted
    def run(self, batches: Iterable[Any]) -> None:
        """Forward and backward of each micro-batch in turn, as the objective says."""
        sums = self._running()
        if self.sharded is not None:
            passes = max(sums.micro_batches)
            self.sharded.run(list(batches), passes, self._one, self._empty_pass, self._resting)
            return
        for batch in batches:
            check_interrupt()
            self._one(batch)

    def _one(self, batch: Any) -> None:
        """Forward and backward of one micro-batch, which waits on the host."""
        sums = self._running()
        self.on_phase("batch")
        placed = batch if self._on_host else self._ahead.take(batch)
        self.on_phase("forward")
        # Where nothing counts the forward still runs: statistics and random generators move as they would.
        graph = sums.counts or self.sharded is not None
        with self.precision.autocast(), nullcontext() if graph else torch.no_grad():
            terms = self._call(self.objective.terms, placed, sums.own, batch)
        self._add(terms)

    def _empty_pass(self, sample: Any) -> None:
        """Forward and backward of a sample that enters no sum."""
        with self.precision.autocast():
            terms = self.objective.terms(tree.move(sample, self.device))
        self._backward_of_nothing(terms)

    def _backward_of_nothing(self, terms: Mapping[str, Mean]) -> None:
        self.precision.forget_casts()
        # The factor 0 makes gradients of zeros, so that the collectives of the backward pass are run all the same.
        losses = [terms.loss] if isinstance(terms, Several) else [term.part(1.0)[0] for term in terms.values()]
        with self.precision.outside():
            backward(losses, [0.0] * len(losses))
        self.side.collect()
        self.noise_scale.micro(0.0)

    @property
    def compares(self) -> bool:
        """Whether the loss compares the samples of a window."""
        return self.objective.coupled is not None

    def _add(self, terms: Mapping[str, Mean]) -> None:
        """Adds one micro-batch's terms to the loss, and their gradients to the window's."""
        sums = self._running()
        self._ahead.send()
        parts = sums.enter(terms)
        if parts:
            self.on_phase("backward")
            self.precision.forget_casts()
            inside = self.in_backward if sums.micro_batches == (1,) else None
            looked = self._looked_at_backward or self.sharded is not None or inside is not None
            first = None if looked else FirstBackward(self.model, self.optimizer)
            with self.precision.outside():
                if inside is None:
                    self._call(self._backward, parts)
                else:
                    self._backward_and_step(inside, parts)
            if first is not None:
                first.check()
                self._looked_at_backward = True
            self.sparse.merge()
            self.side.collect()  # into fp32 buffers, where the parameters have 16 bits
        elif self.sharded is not None:  # the other ranks are in the same pass, and wait for this one's gradients
            self._backward_of_nothing(terms)
        if self.noise_scale.watches:
            self.noise_scale.micro(sums.samples[sums.done] / sums.total_samples)
        sums.done += 1

    def _backward_and_step(self, inside: StepInBackward, parts: Parts) -> None:
        """Where the window takes a step, it is taken here; Ctrl-C waits. Else `finish` says what becomes of it."""
        sums = self._running()
        loss, correction = sums.close(*sums.so_far)
        if self.rehearses or (correction and math.isfinite(loss)):
            with inside.on(self._begin_step):
                self._backward([(tensor, factor * (correction or 1.0)) for tensor, factor in parts])

    def _begin_step(self) -> None:
        self.stepping = True

    def _backward(self, parts: Parts) -> None:
        """Each term's factor is where its backward pass begins: a multiplication less in the graph."""
        scaler = self.precision.scaler
        if scaler.is_enabled():
            share = torch.stack([tensor * factor for tensor, factor in parts]).sum()
            scaler.scale(share).backward()  # type: ignore[no-untyped-call]
            return
        backward([tensor for tensor, _ in parts], [factor for _, factor in parts])

    def _running(self) -> WindowSums:
        if self._sums is None:
            raise SetupError("no window is open: call backward inside `for micro in accumulator.window(batch):`")
        return self._sums


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function`, which Ctrl-C does not break off."""
    return function(*arguments)


def ignore(phase: str) -> None:
    """Takes no notice of a window's phases; a trace puts something that does in `on_phase`."""


def backward(losses: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Adds the gradient of Σ loss · factor to the parameters', and uses up the graphs of the losses, of one element
    each.

    The factors are where each backward pass begins, which needs no operation in the graph.
    """
    begins = [torch.full_like(loss, factor) for loss, factor in zip(losses, factors, strict=True)]
    # On another device the engine's own thread runs it, and torch hands that thread what a compiled backward looks up.
    if all(type(loss) is Tensor and loss.device.type == "cpu" for loss in losses):
        run_engine(losses, begins)
    else:
        torch.autograd.backward(losses, begins)


def run_engine(losses: Sequence[Tensor], begins: Sequence[Tensor]) -> None:
    """What `torch.autograd.backward(losses, begins)` comes to; `begins` are shaped as the losses.

    That asks a lot before (symbolic shapes, nested tensors, function modes), in Python, at every call: for a small
    micro-batch as long as the backward pass takes. None of it can matter for a plain scalar.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(tuple(losses), tuple(begins), False, False, (), allow_unreachable=True, accumulate_grad=True)
