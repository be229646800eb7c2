"""One real step at a chosen size: what the window's code does, no rehearsal of it.

On the CPU a trial runs one micro-batch with the gradients already there, as every micro-batch but a window's first
finds them, then the optimizer step: it shows a window's peak at half of its cost. Where an allocator caches, what it
reserves depends on what came before, and a trial is what a training does: from an emptied cache, without optimizer
state, two windows of two micro-batches. Learning rates are 0 meanwhile, so that many steps on the same samples cannot
diverge; what moves all the same is put back by the snapshot around the probe.

A trial is meant to be no easier than any step of the training:
- The optimizer is long past its warm-up, at a step at which whatever it does every so often is due.
- Parameters that the few samples of a trial leave without a gradient have one, since other samples may give it to them.
- Sparse gradients hold the rows that the rest of the window has left.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from autoaccum.data import tree
from autoaccum.data.source import Source
from autoaccum.data.trial_samples import LOOKED_AT
from autoaccum.errors import DataError, DeviceError, ProbeError
from autoaccum.memory.budget import Device
from autoaccum.memory.forecast import Forecast, ForecastFailed
from autoaccum.memory.oom import Verdict, out_of_memory, poisons, unusable
from autoaccum.memory.resident import resident_parts
from autoaccum.memory.trace import Trace, record
from autoaccum.memory.watch import heap_advice
from autoaccum.probing.allowance import Allowance
from autoaccum.probing.gradients import WindowGradients
from autoaccum.probing.journal import Journal
from autoaccum.probing.outcome import FITS, KILLED, OUT_OF_MEMORY, OVER_BUDGET, RanOutElsewhere, Trial
from autoaccum.ranks import Ranks
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.passes import ignore

__all__ = ["Bench", "hold_still"]

Shape = tuple[int, ...]

# Of an optimizer in a trial: divided by 1 to 10, and by most of the periods that people write (12, 50, 100, ...).
STEP = 25_200


class Bench:
    """Where trials run: the model, its optimizer and the device, with what they showed so far.

    Attributes:
        source, device, journal: where samples come from, where trials run, and where they are written down.
        floor: the smallest micro-batch that the model takes.
        allowance: what a step may take.
        trials: in order.
        traces: the recorded allocations by shape, (size,) or (size, length), the optimizer's state present.
        resident: bytes by part that live before the traced step begins, by shape.
        elsewhere: the last trial was left because memory ran out on another rank.
        ranks: those of a sharded model, which meet in each trial; None where nobody does.
        late: a sharded model's gradients are summed in the last pass of a step.
        traces_all: on the CPU every step is; elsewhere only small ones, and the allocator tells the others' peaks.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        source: Source,
        device: Device,
        allowance: Allowance,
        *,
        floor: int,
        share: int | None,
        journal: Journal,
        listener: Callable[[Trial], None],
    ) -> None:
        """Sets learning rates to 0; the caller's snapshot puts them back.

        A window has `share` samples, or twice those of a trial; `listener` is told of each trial as it ends.
        """
        self.accumulator, self.source, self.device, self.allowance = accumulator, source, device, allowance
        self.floor, self.journal, self._listener, self._share = floor, journal, listener, share
        self._least_killed = cache(journal.least_killed)
        self.gradients = WindowGradients(accumulator, share)
        self._copies: list[torch.Tensor] = []
        self._stateless = not any(accumulator.optimizer.state.values())
        self._reserved: dict[Shape, int] = {}  # by the traced steps
        self._first: Trace | None = None  # a training's first window, where an allocator caches
        self.traces_all = device.type == "cpu"
        # As many as show what a window of several takes; one where a training has no windows of several.
        self._micro_batches = 2 if accumulator.in_backward is None else 1
        self.elsewhere = self.late = False
        self.ranks: Ranks | None = None if accumulator.sharded is None else accumulator.ranks
        self.trials: list[Trial] = []
        self.traces: dict[Shape, Trace] = {}
        self.resident: dict[Shape, dict[str, int]] = {}
        accumulator.rehearses = True  # a step that is left out would take no memory: nor would its optimizer's state
        if accumulator.precision.scaler.is_enabled():  # at its usual start, 65536, the first steps overflow
            accumulator.precision.scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
        hold_still(accumulator.optimizer)

    def alike(self, *, late: bool = False) -> "Bench":
        """One for the same training run in another way, with traces of its own."""
        made = copy.copy(self)
        made.trials, made.traces, made.resident, made.late = [], {}, {}, late
        made._reserved, made._first = {}, None
        made.gradients = WindowGradients(self.accumulator, self._share)
        return made

    @property
    def fixed(self) -> int:
        """Bytes that a step has in use whatever its size: what the training holds, and the gradients."""
        return self.allowance.held() + self.gradients.bytes

    @property
    def notes(self) -> list[str | None]:
        """What there is to know beside the trials: what the budget does to the process, what was counted on top."""
        return [heap_advice() if self.allowance.growth.counts else None, self.gradients.note]

    def forecast(self, *, over_lengths: bool = False) -> Forecast | None:
        """From all traces so far, of the largest samples looked at or of chosen lengths; None where they do not fit."""
        dimensions = 2 if over_lengths else 1
        shapes = sorted(shape for shape in self.traces if len(shape) == dimensions)
        try:
            fitted = Forecast.fit(
                [self.traces[shape] for shape in shapes],
                shapes,
                [self.resident[shape] for shape in shapes],
                [self._reserved[shape] for shape in shapes] if self.allowance.caches else (),
            )
        except ForecastFailed:
            return None
        self.allowance.step_begins()  # what the fit itself leaves in libraries is there in the next step as well
        return fitted

    def run(self, size: int, kind: str, length: int | None = None) -> Trial:
        """Runs `size` samples, of a `length` where one is given, and says how it went.

        What the step raises that is not for want of memory is raised as it is.
        """
        if size >= self._least_killed(length):
            return self._note(Trial(size, kind, None, None, 0.0, KILLED, length))
        self.allowance.step_begins()
        self.elsewhere = False
        batch = self.source.trial(size, length)
        self.journal.start(size, kind, length)
        started = time.perf_counter()
        retries = self.device.retries()
        try:
            batch = self._counting(batch, size, length)  # in here: how a loss counts is found out by running it
            peak = self._step((size,) if length is None else (size, length), batch, kind)
        except Exception as error:
            if not self._for_want_of_memory(error, size):
                raise
            peak, self.elsewhere = None, isinstance(error, RanOutElsewhere)
        # From here on nothing holds what the failed step held: the traceback went with the except block.
        seconds = time.perf_counter() - started
        reserved = self.device.reserved_peak()
        if peak is None:
            self.recover()
            outcome = OUT_OF_MEMORY
        else:
            # An allocator that had to empty its cache got through, and would have to at every window.
            strained = self.device.retries() > retries
            outcome = OVER_BUDGET if strained or not self.allowance.kept(reserved or peak) else FITS
        del batch
        self.allowance.step_ends(ran=peak is not None)
        self.journal.end(size, outcome, length)
        return self._note(Trial(size, kind, peak, reserved if peak is not None else None, seconds, outcome, length))

    def time(self, size: int, micro_batches: int = 1, peak: int | None = None) -> tuple[float, float]:
        """Seconds of micro-batches at `size`, which has fitted before, and of the window's end; nothing recorded.

        `peak` is the forecast: as in training, malloc keeps freed blocks where there is room, and after this too.
        """
        batch = self._counting(self.source.trial(size), size)
        kept = self.device.keeps
        self.device.expect(replace(self.allowance.given, bytes=self.allowance.bytes), peak)
        if self.device.keeps and not kept:  # a training's later windows find the blocks there
            self._window(batch, micro_batches)
        self.journal.start(size, "throughput")
        self.device.synchronize()
        started = ended = time.perf_counter()

        def reached(phase: str) -> None:
            nonlocal ended
            if phase == "optimizer":
                self.device.synchronize()
                ended = time.perf_counter()

        self._window(batch, micro_batches, reached)
        self.device.synchronize()
        done = time.perf_counter()
        self.journal.end(size, FITS)
        self._note(Trial(size, "throughput", None, None, done - started, FITS))
        return ended - started, done - ended

    def _step(self, shape: Shape, batch: Any, kind: str) -> int:
        """The peak in bytes of one window, recorded; where an allocator caches, of a training's second, traces apart.

        It is the second that shows what a training reserves: it runs in the cache that the first has left, with the
        optimizer's state where the first has put it.
        """
        if not self.gradients.known:
            self._warm_up(batch)
        if self.allowance.caches and kind != "trace":
            self._begin()
            self._window(batch, self._micro_batches)
        elif self.allowance.caches:
            self.device.drop_cache()  # of other sizes, which a training at this one would not have in its way
        age(self.accumulator.optimizer)
        trace, held = self._record(batch)
        if self._first is not None:
            trace = replace(trace, segments=self._first.segments, kept=self._first.left())
        self.traces[shape], self.resident[shape] = trace, held
        self._reserved[shape] = self.device.reserved_peak() or 0
        counted = self.device.peak()
        # Where nobody counts, on the CPU, it is what lay there before and what the trace saw on top.
        peak = sum(held.values()) + trace.peak if counted is None else counted
        self.allowance.step_peaked(peak)
        return peak

    def _warm_up(self, batch: Any) -> None:
        """Optimizer state, handles and workspaces exist from here on."""
        before = None if self.allowance.given.hard else self.device.beside()
        self._window(batch)
        if self.gradients.unused:
            self._window(batch)  # theirs as well
        if self.allowance.suffers:  # a training keeps a copy of the buffers, to take a window again from where it began
            self._copies = [buffer.detach().clone() for buffer in self.accumulator.model.buffers()]
        if self.allowance.caches:
            self._begin()
            self._first, _ = self._record(batch)
        took = 0 if before is None else (self.device.beside() or 0) - before
        if took > 0:
            self.allowance.given = self.allowance.given.without(took, ", which kernels took as they were loaded")

    def _begin(self) -> None:
        """To where a training begins: no optimizer state of the trials' making, no cache, no workspaces."""
        if self._stateless:
            self.accumulator.optimizer.state.clear()
        self.device.release(young=True)

    def _record(self, batch: Any) -> tuple[Trace, dict[str, int]]:
        """The allocations of one window, and what was in use before it by part.

        Where an allocator caches, two micro-batches: gradients are born in the first among what its backward pass
        frees, and the second runs in the cache that this leaves. Elsewhere one, with the gradients there already: it
        peaks as high.
        """
        # Gradients that are reduced in a pass lie together, as no zeros put there beforehand would.
        several = self.allowance.caches or self.accumulator.sharded is not None
        pieces = self._opened(batch, self._micro_batches if several else 1)
        held = self._held(batch)
        with self.allowance.growth, record(self.device) as recording:
            # Inside, so that their end is seen too: torch warns of blocks that are freed but were not seen to begin.
            recording.mark("backward")
            self._run(pieces, recording.mark)
        return recording.trace, held

    def _window(self, batch: Any, micro_batches: int = 1, phase: Callable[[str], None] = ignore) -> None:
        self._run(self._opened(batch, micro_batches), phase)

    def _opened(self, batch: Any, micro_batches: int) -> list[Any]:
        pieces = [batch] * micro_batches
        self.accumulator.open(pieces)
        return pieces

    def _run(self, pieces: list[Any], phase: Callable[[str], None]) -> None:
        """An opened window to its end, with the gradients that the rest of it would leave; `phase` is told of each."""
        size = tree.batch_size(pieces[0])
        self.gradients.allocate(size, len(pieces))
        self.accumulator.on_phase = phase
        self._pass(pieces)
        if not self.gradients.known:
            self.gradients.look(size)
        left_out = self.accumulator.finish().skipped
        self.accumulator.on_phase = ignore
        if left_out is not None:
            raise ProbeError(
                f"a trial step was left out, and its memory cannot be known: {left_out}; give micro_batch= a size, or "
                "another precision="
            )

    def _pass(self, pieces: list[Any]) -> None:
        """Runs the micro-batches. Of a sharded model all ranks raise where memory ran out on one of them."""
        ran_out = None
        if self.accumulator.sharded is not None:
            self.accumulator.sharded.late = self.late
        try:
            self.accumulator.run(pieces)
        except Exception as error:
            if self.ranks is None or not self._for_want_of_memory(error, tree.batch_size(pieces[0])):
                raise
            ran_out = error
        if self.ranks is not None and self.ranks.any("a trial", ran_out is not None):
            raise ran_out or RanOutElsewhere("memory ran out on another rank")

    def _counting(self, batch: Any, size: int, length: int | None = None) -> Any:
        """The batch, or another of samples of which some have a target that counts: it would have no gradient."""
        objective = self.accumulator.objective
        if objective.may_count(batch):
            return batch
        sizes = [size] * max(LOOKED_AT // size, 2)
        for piece in tree.split(self.source.trial(sum(sizes), length), sizes):
            if objective.may_count(piece):
                return tree.map_tensors(torch.clone, piece)  # a view would hold all of them
        raise DataError(
            f"every target of the {sum(sizes)} samples looked at is ignored, so that a trial step has no gradient: "
            "look at the labels, or give worst_case= a batch whose targets count"
        )

    def _held(self, batch: Any) -> dict[str, int]:
        """Bytes in use before a step, by part; on an accelerator also what else of this process lies there."""
        accumulator = self.accumulator
        on_device = batch if self.device.type == "cpu" else None  # elsewhere the batch moves inside the step
        parts = resident_parts(accumulator.model, accumulator.optimizers, on_device, device=self.device.torch_device)
        allocated = self.device.allocated()
        if allocated is not None:
            parts["other"] = max(0, allocated - sum(parts.values()))
        return parts

    def _for_want_of_memory(self, error: BaseException, size: int) -> bool:
        verdict = out_of_memory(error)
        if poisons(error):
            raise DeviceError(
                unusable(error, "With isolate=True a child process is lost instead of this one")
            ) from error
        if verdict is Verdict.PERHAPS:
            # Libraries report faults of other kinds in the same words: believe them only near the budget.
            batch, peak = max(((t.batch, t.peak_bytes or 0) for t in self.trials if t.fits), default=(size, 0))
            near = batch < size and peak * size / batch >= 0.5 * self.allowance.bytes
            return near or self.allowance.nearly_spent
        return verdict in (Verdict.SURELY, Verdict.GRID)

    def recover(self) -> None:
        """Lets go of what a step that failed has left."""
        self.accumulator.discard()
        self.device.release()

    def _note(self, trial: Trial) -> Trial:
        self.trials.append(trial)
        self._listener(trial)
        return trial


def hold_still(optimizer: torch.optim.Optimizer) -> None:
    """Sets learning rates to 0: a snapshot puts them back."""
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0


def age(optimizer: torch.optim.Optimizer) -> None:
    """The next step is number `STEP`, where the optimizer counts: RAdam allocates more from its sixth step on."""
    for state in (*optimizer.state.values(), *optimizer.param_groups):
        step = state.get("step")
        if isinstance(step, torch.Tensor):
            step.fill_(STEP - 1)
        elif isinstance(step, (int, float)) and not isinstance(step, bool):
            state["step"] = STEP - 1
