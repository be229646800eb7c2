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

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from autoaccum.data import tree
from autoaccum.data.source import Source
from autoaccum.data.trial_samples import LOOKED_AT
from autoaccum.errors import DataError, DeviceError, ProbeError
from autoaccum.memory.device import Budget, Device
from autoaccum.memory.forecast import Forecast, ForecastFailed
from autoaccum.memory.oom import Verdict, out_of_memory, poisons, unusable
from autoaccum.memory.resident import resident_bytes, resident_parts
from autoaccum.memory.trace import Trace, record
from autoaccum.memory.watch import ProcessGrowth, heap_advice
from autoaccum.model.shards import local
from autoaccum.probing.cache import Lines
from autoaccum.probing.journal import Journal
from autoaccum.probing.length_search import OverLengths
from autoaccum.probing.outcome import FITS, KILLED, OUT_OF_MEMORY, OVER_BUDGET, RanOutElsewhere, Trial
from autoaccum.probing.process import ProcessNeeds
from autoaccum.ranks import Ranks
from autoaccum.units import format_bytes
from autoaccum.window.accumulate import Accumulator, ignore
from autoaccum.window.record import StepRecord

__all__ = ["Bench", "Counted"]

Shape = tuple[int, ...]

# Of what is free on a device, where others may take some of it.
SPARE = 0.01

# Of an optimizer in a trial: divided by 1 to 10, and by most of the periods that people write (12, 50, 100, ...).
STEP = 25_200


class Bench:
    """Where trials run: the model, its optimizer and the device, with what they showed so far.

    Attributes:
        trials: in order.
        traces: the recorded allocations by shape, (size,) or (size, length), the optimizer's state present.
        resident: bytes by part that live before the traced step begins, by shape.
        elsewhere: the last trial was left because memory ran out on another rank.
        ranks: those of a sharded model, which meet in each trial; None where nobody does.
        late: a sharded model's gradients are summed in the last pass of a step.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        source: Source,
        device: Device,
        budget: Budget,
        journal: Journal,
        listener: Callable[[Trial], None] | None = None,
        growth: ProcessGrowth | None = None,
        share: int | None = None,
    ) -> None:
        """Sets learning rates to 0; the caller's snapshot puts them back.

        `growth` was made when the budget was read, so that what happened since counts; None: that was just now. `share`
        is how many samples a window has; None: twice those of a trial.
        """
        self._accumulator, self._source, self._device, self._budget = accumulator, source, device, budget
        self._journal, self._listener = journal, listener
        self._least_killed = cache(journal.least_killed)
        self._share = share
        self._dense: list[torch.nn.Parameter] | None = None  # those that get a gradient: known after one step
        self._rows: dict[torch.nn.Parameter, float] = {}  # of sparse gradients, for each sample
        self._unused: list[torch.nn.Parameter] = []  # without a gradient in that step
        self._process = ProcessNeeds(
            growth or ProcessGrowth(budget.kind), partial(resident_bytes, accumulator.model, accumulator.optimizers)
        )
        self._copies: list[torch.Tensor] = []
        self._stateless = not any(accumulator.optimizer.state.values())
        self._reserved: dict[Shape, int] = {}  # by the traced steps
        self._first: Trace | None = None  # a training's first window, where an allocator caches
        self.elsewhere = self.late = False
        self.ranks: Ranks | None = None if accumulator.sharded is None else accumulator.ranks
        self.trials: list[Trial] = []
        self.traces: dict[Shape, Trace] = {}
        self.resident: dict[Shape, dict[str, int]] = {}
        accumulator.rehearses = True  # a step that is left out would take no memory: nor would its optimizer's state
        if accumulator.precision.scaler.is_enabled():  # at its usual start, 65536, the first steps overflow
            accumulator.precision.scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
        for group in accumulator.optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0

    @property
    def budget(self) -> int:
        """Bytes that PyTorch may have in use, by what the trials showed of the process's own needs."""
        return self._process.budget(self._budget.bytes)

    @property
    def suffers(self) -> bool:
        """On the CPU a budget in PyTorch's bytes is counted; everything else runs out of memory."""
        return self._device.type != "cpu" or self._budget.kind != "torch"

    @property
    def traces_all(self) -> bool:
        """On the CPU every step is traced; elsewhere only the small ones, and the allocator tells the others' peaks."""
        return self._device.type == "cpu"

    @property
    def spare(self) -> float:
        """The share of the budget that a forecast leaves free: an allocator that retries at every window is slow.

        None of a hard budget: what was run there without a retry runs in training without one.
        """
        return SPARE if self.caches and not self._budget.hard else 0.0

    @property
    def shared(self) -> bool:
        """Whether others may take of the budget: what is free, of a device or of a host."""
        return not self._budget.hard and self._budget.kind != "data segment"

    def lower(self, budget: Budget) -> Budget:
        """From here on trials have this budget; gives back the one before."""
        before, self._budget = self._budget, budget
        return before

    def held(self) -> int:
        """Bytes that the training holds between two steps."""
        return resident_bytes(self._accumulator.model, self._accumulator.optimizers)

    @property
    def fixed(self) -> int:
        """Bytes that a step has in use whatever its size: what the training holds, and the gradients."""
        return self.held() + self._gradients()

    def _gradients(self) -> int:
        return sum(local(p).numel() * self._accumulator.gradient_dtype(p).itemsize for p in self._dense or ())

    def other(self) -> int:
        """Bytes of this process on an accelerator that are no part of the training."""
        return max(0, (self._device.allocated() or 0) - self.held())

    def measured(self, size: int) -> int:
        """The most that a step at `size` was measured to take, as the budget counts."""
        return max((t.reserved_bytes or t.peak_bytes or 0 for t in self.trials if t.batch == size), default=0)

    @property
    def caches(self) -> bool:
        """Whether an allocator keeps what is freed, so that what it reserves is counted."""
        return self._device.reserved() is not None

    @property
    def budget_reason(self) -> str:
        """Where the budget comes from, in one line."""
        if self.budget == self._budget.bytes:
            return self._budget.reason
        return f"{self._budget.reason}; {format_bytes(self.budget)} of it for PyTorch, since {self._process.reason}"

    @property
    def notes(self) -> list[str]:
        """What there is to know beside the trials: what the budget does to the process, what was counted on top."""
        advice = heap_advice() if self._process.counted else None
        notes = [] if advice is None else [advice]
        if self._unused:
            names = {id(parameter): name for name, parameter in self._accumulator.model.named_parameters()}
            first = names.get(id(self._unused[0]), "one of the optimizer's")
            more = f" and {len(self._unused) - 1} more" if len(self._unused) > 1 else ""
            size = sum(p.numel() * self._accumulator.gradient_dtype(p).itemsize for p in self._unused)
            notes.append(
                f"{first}{more} got no gradient from the samples tried: {format_bytes(size)} are counted for one all "
                "the same, and what the optimizer keeps for it, since other samples may give it one; freeze what is "
                "never used (requires_grad_(False))"
            )
        return notes

    def _within(self, peak: int) -> bool:
        """Whether a step that ran, with this peak in bytes, leaves the budget whole."""
        limit = self._budget.bytes
        return self._process.within(limit) if self._process.counted else peak <= limit

    def forecast(self) -> "Counted | None":
        """From all traces so far of the largest samples looked at; None where they do not line up."""
        return self._forecast(1)

    def forecast_over_lengths(self) -> "Counted | None":
        """From all traces so far of chosen lengths; None where they do not line up."""
        return self._forecast(2)

    def _forecast(self, dimensions: int) -> "Counted | None":
        shapes = sorted(shape for shape in self.traces if len(shape) == dimensions)
        try:
            fitted = Forecast.fit(
                [self.traces[shape] for shape in shapes],
                shapes,
                [self.resident[shape] for shape in shapes],
                [self._reserved[shape] for shape in shapes] if self.caches else (),
            )
        except ForecastFailed:
            return None
        self._process.step_begins()  # what the fit itself leaves in libraries is there in the next step as well
        return Counted(fitted, reserves=self.caches)

    def parts(self, size: int, forecast: Forecast | Lines | OverLengths | None) -> dict[str, int]:
        """Bytes of parameters, buffers, gradients and optimizer state, and what one more sample costs at `size`."""
        held = self.resident[max(self.resident)]
        parts = {name: held.get(name, 0) for name in ("parameters", "buffers", "gradients", "optimizer_state")}
        parts["gradients"] += self._gradients()
        if held.get("other"):
            parts["other"] = held["other"]
        peaks = sorted((trial.batch, trial.peak_bytes) for trial in self.trials if trial.peak_bytes is not None)
        if forecast is not None:
            parts["per_sample"] = forecast.peak(size + 1) - forecast.peak(size)
        elif len(peaks) > 1:
            (a, at_a), (b, at_b) = peaks[-2:]
            parts["per_sample"] = (at_b - at_a) // max(b - a, 1)
        return parts

    def run(self, size: int, kind: str, length: int | None = None) -> Trial:
        """Runs `size` samples, of a `length` where one is given, and says how it went.

        Raises:
            Exception: whatever the step raises that is not for want of memory, as it is.
        """
        if size >= self._least_killed(length):
            return self._note(Trial(size, kind, None, None, 0.0, KILLED, length))
        self._process.step_begins()
        self.elsewhere = False
        batch = self._source.trial(size, length)
        self._journal.start(size, kind, length)
        started = time.perf_counter()
        retries = self._device.retries()
        try:
            batch = self._counting(batch, size, length)  # in here: how a loss counts is found out by running it
            peak = self._step((size,) if length is None else (size, length), batch, kind)
        except Exception as error:
            if not self._for_want_of_memory(error, size):
                raise
            peak, self.elsewhere = None, isinstance(error, RanOutElsewhere)
        # From here on nothing holds what the failed step held: the traceback went with the except block.
        seconds = time.perf_counter() - started
        reserved = self._device.reserved_peak()
        if peak is None:
            self.recover()
            outcome = OUT_OF_MEMORY
        else:
            strained = self._device.retries() > retries
            outcome = OVER_BUDGET if strained or not self._within(reserved or peak) else FITS
        del batch
        self._process.step_ends(ran=peak is not None)
        self._journal.end(size, outcome)
        return self._note(Trial(size, kind, peak, reserved if peak is not None else None, seconds, outcome, length))

    def time(self, size: int, micro_batches: int = 1) -> tuple[float, float]:
        """Seconds of micro-batches at `size`, which has fitted before, and of the window's end; nothing recorded."""
        batch = self._counting(self._source.trial(size), size)
        self._journal.start(size, "throughput")
        self._device.synchronize()
        started = ended = time.perf_counter()

        def reached(phase: str) -> None:
            nonlocal ended
            if phase == "optimizer":
                self._device.synchronize()
                ended = time.perf_counter()

        self._accumulator.on_phase = reached
        self._window(batch, micro_batches)
        self._accumulator.on_phase = ignore
        self._device.synchronize()
        done = time.perf_counter()
        self._journal.end(size, FITS)
        self._note(Trial(size, "throughput", None, None, done - started, FITS))
        return ended - started, done - ended

    def _step(self, shape: Shape, batch: Any, kind: str) -> int:
        """The peak in bytes of one window, recorded; where an allocator caches, of a training's second, traces apart.

        It is the second that shows what a training reserves: it runs in the cache that the first has left, with the
        optimizer's state where the first has put it.
        """
        if self._dense is None:
            self._warm_up(batch)
        if self.caches and kind != "trace":
            self._begin()
            self._window(batch, 2)
        elif self.caches:
            self._device.drop_cache()  # of other sizes, which a training at this one would not have in its way
        age(self._accumulator.optimizer)
        trace, held = self._record(batch)
        if self._first is not None:
            trace = replace(trace, segments=self._first.segments, kept=self._first.left())
        self.traces[shape], self.resident[shape] = trace, held
        self._reserved[shape] = self._device.reserved_peak() or 0
        counted = self._device.peak()
        peak = sum(held.values()) + trace.peak if counted is None else counted
        self._process.step_peaked(peak)
        return peak

    def _warm_up(self, batch: Any) -> None:
        """Optimizer state, handles and workspaces exist from here on."""
        before = None if self._budget.hard else self._device.beside()
        self._window(batch)
        if self._unused:
            self._window(batch)  # theirs as well
        if self.suffers:  # a training keeps a copy of the buffers, to take a window again from where it began
            self._copies = [buffer.detach().clone() for buffer in self._accumulator.model.buffers()]
        if self.caches:
            self._begin()
            self._first, _ = self._record(batch)
        if before is not None:
            self._less_what_kernels_took((self._device.beside() or 0) - before)

    def _less_what_kernels_took(self, size: int) -> None:
        """Kernels take memory of the device as they are loaded, which was free when the budget was read."""
        if size > 0:
            reason = f"{self._budget.reason}; {format_bytes(size)} less, which kernels took as they were loaded"
            self._budget = replace(self._budget, bytes=max(0, self._budget.bytes - size), reason=reason)

    def _begin(self) -> None:
        """To where a training begins: no optimizer state of the trials' making, no cache, no workspaces."""
        if self._stateless:
            self._accumulator.optimizer.state.clear()
        self._device.release(young=True)

    def _record(self, batch: Any) -> tuple[Trace, dict[str, int]]:
        """The allocations of one window, and what was in use before it by part.

        Where an allocator caches, two micro-batches: gradients are born in the first among what its backward pass
        frees, and the second runs in the cache that this leaves. Elsewhere one, with the gradients there already: it
        peaks as high.
        """
        accumulator = self._accumulator
        # Gradients that are reduced in a pass lie together, as no zeros put there beforehand would.
        pieces = [batch, batch] if self.caches or accumulator.sharded is not None else [batch]
        accumulator.open(pieces)
        held = self._held(batch)
        with self._process.growth, record(self._device) as recording:
            # Inside, so that their end is seen too: torch warns of blocks that are freed but were not seen to begin.
            recording.mark("backward")
            self._allocate_gradients(tree.batch_size(batch), len(pieces))
            accumulator.on_phase = recording.mark
            self._pass(pieces)
            self._stepped(accumulator.finish())
        accumulator.on_phase = ignore
        return recording.trace, held

    def _window(self, batch: Any, micro_batches: int = 1) -> None:
        accumulator = self._accumulator
        size = tree.batch_size(batch)
        pieces = [batch] * micro_batches
        accumulator.open(pieces)
        self._allocate_gradients(size, micro_batches)
        self._pass(pieces)
        if self._dense is None:
            self._look_at_gradients(size)
        self._stepped(accumulator.finish())

    def _pass(self, pieces: list[Any]) -> None:
        """Runs the micro-batches. Of a sharded model all ranks raise where memory ran out on one of them."""
        ran_out = None
        if self._accumulator.sharded is not None:
            self._accumulator.sharded.late = self.late
        try:
            self._accumulator.run(pieces)
        except Exception as error:
            if self.ranks is None or not self._for_want_of_memory(error, tree.batch_size(pieces[0])):
                raise
            ran_out = error
        if self.ranks is not None and self.ranks.any("a trial", ran_out is not None):
            raise ran_out or RanOutElsewhere("memory ran out on another rank")

    def _look_at_gradients(self, size: int) -> None:
        """What kind of gradient each parameter gets, by a step of `size` samples."""
        accumulator = self._accumulator
        found = [(parameter, accumulator.gradient(parameter)) for parameter in accumulator.parameters]
        self._rows = {parameter: g._nnz() / size for parameter, g in found if g is not None and g.is_sparse}
        self._unused = [p for p, g in found if g is None and p.requires_grad and not accumulator.is_sparse(p)]
        self._dense = [p for p, g in found if g is not None and not g.is_sparse] + self._unused

    def _counts(self, batch: Any) -> bool:
        """Whether a target in the batch counts, as far as that is known before its step."""
        objective = self._accumulator.objective
        return objective is None or objective.may_count(batch)

    def _counting(self, batch: Any, size: int, length: int | None = None) -> Any:
        """The batch, or another of samples of which some have a target that counts: it would have no gradient.

        Raises:
            DataError: there are none among those looked at.
        """
        if self._counts(batch):
            return batch
        sizes = [size] * max(LOOKED_AT // size, 2)
        for piece in tree.split(self._source.trial(sum(sizes), length), sizes):
            if self._counts(piece):
                return tree.map_tensors(torch.clone, piece)  # a view would hold all of them
        raise DataError(
            f"every target of the {sum(sizes)} samples looked at is ignored, so that a trial step has no gradient: "
            "look at the labels, or give worst_case= a batch whose targets count"
        )

    def _stepped(self, record: StepRecord) -> None:
        if record.skipped is not None:
            raise ProbeError(
                f"a trial step was left out, and its memory cannot be known: {record.skipped}; give micro_batch= a "
                "size, or another precision="
            )

    def _allocate_gradients(self, size: int, micro_batches: int) -> None:
        """What the other micro-batches of a window leave to `micro_batches` of `size`, beside what these will make."""
        for parameter in (self._dense or ()) if micro_batches == 1 else self._unused:
            self._accumulator.allocate_gradient(parameter)
        ran = size * micro_batches
        others = size if self._share is None else max(self._share - ran, 0)
        for parameter, rows in self._rows.items():
            self._accumulator.allocate_gradient(parameter, 1, min(math.ceil(rows * others), parameter.shape[0]))

    def _held(self, batch: Any) -> dict[str, int]:
        """Bytes in use before a step, by part; on an accelerator also what else of this process lies there."""
        accumulator = self._accumulator
        on_device = batch if self._device.type == "cpu" else None  # elsewhere the batch moves inside the step
        parts = resident_parts(accumulator.model, accumulator.optimizers, on_device, device=self._device.torch_device)
        allocated = self._device.allocated()
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
            fitted = max(
                (t for t in self.trials if t.fits and t.peak_bytes is not None), key=lambda t: t.batch, default=None
            )
            near = fitted is not None and (fitted.peak_bytes or 0) * size / fitted.batch >= 0.5 * self.budget
            tight = self._process.near(self._budget.bytes)
            return tight or (near and fitted is not None and fitted.batch < size)
        return verdict in (Verdict.SURELY, Verdict.GRID)

    def recover(self) -> None:
        """Lets go of what a step that failed has left."""
        self._accumulator.discard()
        self._device.release()

    def _note(self, trial: Trial) -> Trial:
        self.trials.append(trial)
        if self._listener is not None:
            self._listener(trial)
        return trial


def age(optimizer: torch.optim.Optimizer) -> None:
    """The next step is number `STEP`, where the optimizer counts: RAdam allocates more from its sixth step on."""
    for state in (*optimizer.state.values(), *optimizer.param_groups):
        step = state.get("step")
        if isinstance(step, torch.Tensor):
            step.fill_(STEP - 1)
        elif isinstance(step, (int, float)) and not isinstance(step, bool):
            state["step"] = STEP - 1


@dataclass(frozen=True)
class Counted:
    """A forecast in the bytes that the budget counts: those reserved where an allocator reserves, else those in use."""

    whole: Forecast
    reserves: bool

    @property
    def residual(self) -> float | None:
        """Relative error at a trace that the fit did not use."""
        return self.whole.residual

    def peak(self, batch: int, length: int | None = None) -> int:
        """The peak at `batch` samples in bytes in use."""
        return self.whole.peak(batch, length)

    def reserved(self, batch: int, length: int | None = None) -> int:
        """The peak at `batch` samples."""
        return self.whole.reserved(batch, length) if self.reserves else self.whole.peak(batch, length)
