"""What an Accumulator is made of, and forward and backward of a window's micro-batches.

What opens and ends a window is in accumulate.py; a loss that compares samples has two passes, in two_passes.py.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoaccum.batch_norm.pooled_statistics import PooledStatistics
from autoaccum.checks import check_kind, check_switches, one_of
from autoaccum.data import tree
from autoaccum.errors import SetupError
from autoaccum.interrupts import check_interrupt, interruptible, uninterrupted
from autoaccum.loss.mean import Mean, Several
from autoaccum.loss.objective import Objective
from autoaccum.memory.device import open_device
from autoaccum.model.optimizer import (
    FirstBackward,
    check_model,
    check_optimizer,
    check_ranks,
    check_schedule,
    optimizer_parameters,
)
from autoaccum.model.precision import Precision, SideBuffers, SparseGradients, prepared_by
from autoaccum.model.shards import is_sharded, refuse_for_shards
from autoaccum.model.step_in_backward import StepInBackward
from autoaccum.planning.plan import Plan
from autoaccum.ranks import Ranks, here
from autoaccum.window.ahead import Ahead
from autoaccum.window.noise_scale import NoiseScale
from autoaccum.window.own_loop import OwnLoop
from autoaccum.window.rank_sum import RankSum
from autoaccum.window.record import StepRecord
from autoaccum.window.sharded import ShardedPasses
from autoaccum.window.window_sums import Parts, WindowSums

__all__ = ["Passes", "backward", "call", "ignore", "run_engine"]


class Passes:
    """An Accumulator's parts, and what it does between a window's opening and its end.

    Attributes:
        plan: how windows are cut; replaced where memory asks for it.
        parameters: all that a window gives gradients to: the model's and the optimizer's, each once.
        side: the open window's gradient of each of them so far, in the format that it is summed in.
        sparse: holds those whose gradients are sparse, as far as their layer says or one was seen.
        sharded: runs the passes of a model whose ranks meet in each of them; None for others.
        beside: the optimizers of other phases, whose state stands in memory too.
        on_phase: told the name of each phase as it begins, for a trace of its memory.
        rehearses: set where only the memory of a step matters: no window is left out for its loss.
        in_backward: steps the optimizer in the backward pass of a window of one micro-batch; None: at windows' ends.
        stepping: a step has begun whose window has not ended: weights may be half updated.
        last: the record of the last window; None before the first.
    """

    beside: Sequence[Optimizer] = ()
    rehearses = False
    in_backward: StepInBackward | None = None
    stepping = False
    last: StepRecord | None = None
    step = epoch = skipped_windows = 0

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        plan: Plan,
        *,
        objective: Objective | None = None,
        scheduler: Any = None,
        precision: str = "auto",
        accumulate: str = "fp32",
        clip_norm: float | None = None,
        log_grad_norm: bool = False,
        batch_norm: str | None = None,
        on_nonfinite: str = "raise",
        device: torch.device | str | None = None,
        ranks: Ranks | None = None,
        steps: bool = True,
        group: Any = None,
        accelerator: Any = None,
    ) -> None:
        """Prepares buffers; nothing is trained, and the model is untouched until the first window.

        Args:
            model: what is trained, on `device` already.
            optimizer: stepped once a window.
            plan: its sizes cut the batches given to `window`.
            objective: where given, denominators come from the batches; else `backward` is told them.
            scheduler: stepped once for each optimizer step.
            precision, accumulate, clip_norm, log_grad_norm, batch_norm, on_nonfinite: as in `fit`.
            device: where micro-batches go; None: where the model's first parameter is.
            ranks: this process among others; None: that of `group`.
            group: the ranks that train together, a process group; None: the default one, where there is one.
            accelerator: Hugging Face's, which prepared model, optimizer and scheduler: its scaler and autocast serve.
            steps: False: a window ends with its gradient in `.grad`, scaled as the scaler says; the step is another's.

        Raises:
            SetupError: the model or the optimizer cannot be trained so, or a setting is unknown.
        """
        check_kind("plan", plan, Plan, "a Plan, as autoaccum.plan(limit, target_batch) makes it")
        check_kind("ranks", ranks, (Ranks, type(None)), "None: the default process group is found by itself")
        check_kind("objective", objective, (Objective, type(None)), "None, and tell backward() its denominators")
        check_switches(log_grad_norm=log_grad_norm, steps=steps)
        if accelerator is not None:  # its own autocast runs the forward: ours would be a second one
            optimizer, precision = prepared_by(accelerator, optimizer), "fp32"
        self._is_told = objective is None  # what losses divide by, by a loop of the user's own
        self.objective = objective if objective is not None else Objective.told(model)
        check_model(model, loss=self.objective.loss, clip_norm=clip_norm, log_grad_norm=log_grad_norm)
        check_optimizer(optimizer, model, self.objective.loss)
        one_of("accumulate", accumulate, ("fp32", "native"))
        one_of("on_nonfinite", on_nonfinite, ("raise", "skip"))
        check_schedule(scheduler)
        self._own_loop = OwnLoop(plan, optimizer, warns=self._is_told)
        self._memory = open_device(device if device is not None else next(model.parameters()).device)
        self.device = self._memory.torch_device
        self.ranks = ranks if ranks is not None else here(self.device, group)
        check_ranks(plan.rank, plan.world_size, self.ranks)
        why = "a loss that compares samples takes a whole model on each rank"
        refuse_for_shards(model, coupled=(self.compares, why))
        self.model, self.optimizer, self.plan, self.scheduler = model, optimizer, plan, scheduler
        self._clip_norm = None if clip_norm is None else float(clip_norm)
        self._log_grad_norm, self._steps, self._on_nonfinite = log_grad_norm, steps, on_nonfinite
        self.precision = Precision(precision, self.device, model, getattr(accelerator, "scaler", None))
        self.parameters = list(dict.fromkeys([*model.parameters(), *optimizer_parameters(optimizer)]))
        self.side = SideBuffers(self.parameters if accumulate == "fp32" else [])
        self.sparse = SparseGradients(model, self.parameters)
        batch_norm = batch_norm or plan.batch_norm
        self._statistics = PooledStatistics(model, batch_norm)
        self.sharded = ShardedPasses(model, self.ranks, self.device) if is_sharded(model) else None
        self.rank_sum = RankSum(self.ranks, self.parameters, self.side, self.sharded)
        self.noise_scale = NoiseScale(model, self.parameters)
        for why, is_so in (
            ("gradients are scaled before they can be compared", self.precision.scaler.is_enabled()),
            ("the loss compares samples, so that micro-batches have no gradients of their own", self.compares),
            ("micro-batches are sorted by length, and thus no random draws", plan.by_length),
        ):
            if is_so:
                self.noise_scale.why_not = why
        self.on_phase: Callable[[str], None] = ignore
        # Broken off inside a pass of a sharded model, a rank would leave the others waiting there.
        self._call: Callable[..., Any] = interruptible if self.sharded is None else call
        self._ahead = Ahead(self.device)
        self._on_host = self.device.type == "cpu"  # where batches lie already: walking them would be all the cost
        self._looked_at_backward = False
        self._sums: WindowSums | None = None  # of the open window
        # What ranks must have alike; compared at the first window, and empty from then on.
        self._settings = {"precision": self.precision.name, "accumulate": accumulate, "clip_norm": clip_norm,
                          "batch_norm": batch_norm, "on_nonfinite": on_nonfinite}  # fmt: skip

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
        if self.sharded is not None:
            self.sharded.run(list(batches), max(self._running().micro_batches), self._one, self._empty_pass)
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
        """Gradients of zeros, by the factor 0, so that the collectives of the backward pass are run all the same."""
        self.precision.forget_casts()
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
            looks = not (self._looked_at_backward or self.sharded is not None or inside is not None)
            first = FirstBackward(self.model, self.optimizer) if looks else None
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

        def begins() -> None:
            self.stepping = True

        if self.rehearses or (correction and math.isfinite(loss)):
            with inside.on(begins):
                self._backward([(tensor, factor * (correction or 1.0)) for tensor, factor in parts])

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
    """Adds the gradient of Σ loss · factor to the parameters', of losses of one element; uses up their graphs.

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
