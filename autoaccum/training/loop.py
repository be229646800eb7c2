"""The configured training loop: windows in, step records out.

Nothing but iteration trains. Leaving the loop and iterating again goes on where it stopped, also after Ctrl-C or an
error in the middle of a window: that window is then as if it had not begun. The loop prints nothing; it tells events.
"""

import inspect
import math
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from autoaccum.checking.verify import VerifyReport
from autoaccum.checks import typed
from autoaccum.data.draws import mix
from autoaccum.data.mapped import dead_worker, is_dead_worker
from autoaccum.data.source import Source, open_source
from autoaccum.data.windows import Window, windows
from autoaccum.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    LossError,
    NothingFitsError,
    SetupError,
    StateNotRestoredError,
)
from autoaccum.interrupts import check_interrupt, interruptible, uninterrupted
from autoaccum.memory.budget import Budget, Device
from autoaccum.memory.oom import poisons, unusable
from autoaccum.model.given_model import TrainingMode
from autoaccum.planning.plan import Plan
from autoaccum.probing.report import ProbeReport
from autoaccum.random_state import RandomState, seed_everything
from autoaccum.ranks import LostRankError
from autoaccum.settings import Settings
from autoaccum.training.checkpoint import Entry
from autoaccum.training.evaluate import Evaluator
from autoaccum.training.events import (
    EpochEnded,
    Events,
    StepTaken,
    TrainingEnded,
    TrainingStarted,
    WindowSkipped,
)
from autoaccum.training.fit_result import FitResult, History, LengthSummary
from autoaccum.training.recover import OptimizerOutOfMemoryError, SafeWindow
from autoaccum.training.run_folder import RunFolder
from autoaccum.training.smaller import plan_for
from autoaccum.training.state import Boundary, TrainingParts, loading
from autoaccum.training.turns import Turns
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.noise_scale import advice
from autoaccum.window.phase import Phase
from autoaccum.window.record import StepRecord

__all__ = ["FitResult", "TrainingLoop"]


class TrainingLoop:
    """Trains one window at each step of iteration.

    ```python
    loop = autoaccum.prepare(model, data, target_batch=256)
    for record in loop:
        print(record.step, record.loss)
    ```

    Attributes:
        model, optimizer, scheduler: what is trained; the scheduler is None where the rate never changes.
        plan: as it is now; k grows when memory runs out.
        probe, verify: the reports; None where nothing was probed or checked.
        history: the records so far.
        evaluations: validation results so far, one an epoch.
        epoch: epochs completed.
        total_steps: optimizer steps in the whole training; None for a stream without a length.
        folder: where it is saved; None where it is not.
        events: where listeners are added.
    """

    def __init__(
        self,
        turns: Sequence[tuple[Phase | None, Accumulator]],
        source: Source,
        device: Device,
        evaluator: Evaluator,
        asked: Settings,
        *,
        total_steps: int | None,
        budget: Budget,
        events: Events,
        probe: ProbeReport | None,
        verify: VerifyReport | None,
        folder: RunFolder | None,
        running: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Wires the parts; trains nothing. The model is trained inside `running()`, compiled for instance.

        Of several phases the first one's plan, optimizer and loss stand for the training's.
        """
        _, accumulator = turns[0]
        self.model, self.optimizer = accumulator.model, accumulator.optimizer
        self.scheduler = accumulator.scheduler
        self.probe, self.verify, self.folder, self.events = probe, verify, folder, events
        self.history = History()
        self.evaluations: list[dict[str, float]] = []
        self.epoch, self.total_steps = 0, total_steps
        self._accumulator, self._source, self._device, self._budget = accumulator, source, device, budget
        self._evaluator, self._asked, self._running = evaluator, asked, running
        self._mode = TrainingMode(accumulator.model)
        self._waited = 0.0  # seconds, for the samples of the window that runs
        self._parts = TrainingParts(accumulator, source, device, evaluator, asked.some("seed", "shuffle"))
        modules = list(self._parts.modules.values())
        verified = None if probe is None or device.reserved() is None else probe.micro_batch
        self._turns = Turns([
            SafeWindow(each, modules, device, events, asked.regrow_after, verified, phase=phase)
            for phase, each in turns
        ])  # fmt: skip
        self._window_index = self._epoch_began_at = 0
        self._evaluation_due = False
        self._stopped: str | None = None  # why a rank asked for the end, or that another one did
        self._boundary: Boundary | None = None  # the moment before what is being fetched, trained or evaluated
        self._left: Window | None = None  # fetched, and not trained yet
        self._random: RandomState | None = None  # before it, where that is known
        self._iteration: Callable[[], _Iteration | None] = lambda: None  # weak: who breaks off lets it go, and it ends
        self._at_work = False  # a record is being made: what iterates is not merely left

    @property
    def plan(self) -> Plan:
        """How windows are cut now."""
        return self._accumulator.plan

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self._turns.step

    def __iter__(self) -> Iterator[StepRecord]:
        """Trains, yielding a record after each window.

        Raises:
            NothingFitsError: out of memory at the smallest micro-batch.
            LossError: a loss that is not finite, unless such windows are skipped.
            DataError: an epoch gave no window.
            StateNotRestoredError: an earlier error left the weights half updated.
            SetupError: a window is being trained already, or another iteration has gone on from where this one stood.
        """
        return _Iteration(self)

    def _records(self) -> Generator[StepRecord, None, None]:
        began, usable, graph = time.perf_counter(), True, torch.is_grad_enabled()
        self._mode = TrainingMode(self.model)
        try:
            self._begin()
            self._mode.on()
            with self._running(), self._device.limit(self._budget):
                if self.probe is not None:
                    self._device.expect(self._budget, self.probe.expected(self.plan))
                yield from self._rest()
            self._save()
            # Whoever failed since the last window is heard by all.
            self._accumulator.ranks.tally("the end of the training")
            lengths = self._lengths()
            for line in [] if lengths is None else lengths.lines():
                self.events.note(line)
            scale = self._accumulator.noise_scale.value
            if scale is not None:
                self.events.note(advice(scale, self.plan, self.optimizer))
            self.events.tell(TrainingEnded(self.step, time.perf_counter() - began))
        except Exception as error:
            self._accumulator.ranks.fail()  # the other ranks stop as well, instead of waiting for this one
            if poisons(error):
                usable = False
                raise DeviceError(unusable(error, self._where_to_go_on())) from error
            self._rescue()
            if isinstance(error, (NothingFitsError, OptimizerOutOfMemoryError, LostRankError)):
                raise type(error)(f"{error}. {self._where_to_go_on()}") from error.__cause__
            if is_dead_worker(error):
                raise dead_worker(error) from error
            raise
        except KeyboardInterrupt:
            torch.set_grad_enabled(graph)  # a no_grad() that was broken off at its end leaves it off
            self._rescue()
            raise
        finally:
            self._mode.back()
            for turn in self._turns.all if usable else ():
                turn.accumulator.close()  # no hook of ours stays on the model
            if self.folder is not None:
                self.folder.close()
            self.events.close()

    @uninterrupted
    def run(self) -> FitResult:
        """Trains to the end."""
        for _ in self:
            pass
        return FitResult(
            self.model, self.plan, self.probe, self.verify, self.history, self.evaluations,
            None if self.folder is None else self.folder.unsaved, self._stopped, self._lengths(),
        )  # fmt: skip

    def _lengths(self) -> LengthSummary | None:
        return LengthSummary.of(self.history) if self.plan.by_length else None

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """The loss and the metrics over `data`, or over the validation data; the model is not trained.

        Raises:
            DataError: there is neither.
        """
        ranks = self._accumulator.ranks
        return self._evaluator.evaluate(None if data is None else open_source(data, shuffle=False, ranks=ranks))

    # --- windows ---

    def _begin(self) -> None:
        self._check_whole()
        self._stopped = self.events.stop = None
        if self._boundary is not None and self._left is None:
            self._parts.restore(self._boundary)
        elif self._asked.seed is not None and not self.history and self._left is None:
            rank, seed = self._accumulator.ranks.rank, self._asked.seed
            seed_everything(mix(seed, rank) if rank else seed)  # no two ranks drop out alike
        if self.folder is not None:
            self.state_dict()  # what cannot be saved is refused now, and not when an hour's work is to be saved
            self.folder.begin(self.plan, self.probe, self._device)
        self.events.tell(TrainingStarted(self.plan.to_dict(), self.total_steps, self.step, self._budget.bytes))

    def _rest(self) -> Iterator[StepRecord]:
        while self._stopped is None:
            if self._evaluation_due:
                self._evaluate_now()
            most = self._asked.max_steps
            if self.step >= most if most is not None else self.epoch >= self._asked.epochs:
                return
            self._hear_wishes()
            if self._stopped is None:
                yield from self._rest_of_epoch()

    def _hear_wishes(self) -> bool:
        """Stops where a listener on any rank has asked for the end, at the same window on all of them.

        Whether it is time for a checkpoint is returned: by the first rank's clock, for all.
        """
        overdue = self.folder is not None and self.folder.writes and self.folder.overdue()
        stops, overdue_there = self._accumulator.ranks.tally("a wish to stop", [self.events.stop is not None, overdue])
        if stops:
            self._stopped = self.events.stop or "another rank was asked to stop"
        return bool(overdue_there)

    def _rest_of_epoch(self) -> Iterator[StepRecord]:
        most = self._asked.max_steps
        for window in self._windows():
            self._left = window
            self._mode.keep()  # between two windows a person may have looked at the model's answers
            for done in self._turns.train(window, self._random):
                record, self._waited = done.after(self._waited, window.padding), 0.0
                self.history.append(record)
                last = not self._turns.inside  # else a further phase trains on the same samples
                if last:
                    self._left = self._boundary = None
                    window.batches.clear()  # the next window is read while its reader still holds this one
                    self._window_index += 1
                skipped = None if record.skipped is None else WindowSkipped(record.step, record.skipped)
                self.events.tell(skipped or StepTaken(record))
                if last:
                    overdue = self._hear_wishes()
                    if self.folder is not None:
                        self.folder.poll()
                        if overdue or self.folder.due(self.step):
                            self._save()
                    check_interrupt()  # one that came in the step: the step is whole, and in the history
                yield record
            if self._stopped is not None:
                return
            if most is not None and self.step >= most:
                self._evaluation_due = True
                return
        if self._window_index == 0:
            raise DataError(
                f"epoch {self.epoch} gave no window of {self.plan.target_batch} samples: the data ended before one was "
                'full and tail="drop" leaves short ones out; lower target_batch or use tail="step"'
            )
        if self.step == self._epoch_began_at and most is not None:
            raise LossError(f"no window of epoch {self.epoch} took a step, so max_steps={most} is never reached")
        self.epoch += 1
        self._window_index, self._epoch_began_at, self._evaluation_due = 0, self.step, True

    def _windows(self) -> Iterator[Window]:
        self._random = None
        if self._left is not None:
            yield self._left
        rest, first = windows(self._source, lambda: self.plan, self.epoch, start=self._window_index), True
        while True:
            # What is broken off from here is drawn anew, and a checkpoint of this moment can be saved.
            boundary = self._boundary = self._parts.boundary(quick=True)
            began = time.perf_counter()
            check_interrupt()
            window = interruptible(next, rest, None)
            self._waited = time.perf_counter() - began
            if window is None:
                self._boundary = None
                return
            self._random = None if first or self._source.draws else boundary.random
            first = False
            yield window

    def _evaluate_now(self) -> None:
        results = None
        if self._evaluator.source is not None:
            self._boundary = self._parts.boundary(quick=True)
            results = self._evaluator.evaluate()
            self.evaluations.append({"epoch": self.epoch, "step": self.step, **results})
        self._boundary, self._evaluation_due = None, False
        self.events.tell(EpochEnded(self.epoch, self.step, results))
        loss = None if results is None else results["loss"]
        finite = [each["loss"] for each in self.evaluations if math.isfinite(each["loss"])]
        best = loss is not None and bool(finite) and loss <= min(finite)  # NaN is the best of nothing
        if self.folder is not None and (best or self.folder.every is None):
            self._save(loss)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """All that a training is between two windows: plain values, and tensors, some of them the model's own.

        `torch.load(weights_only=True)` reads what `torch.save` makes of it. On several ranks all must call this.

        Raises:
            CheckpointError: in the middle of a window; or something in it cannot be held without code.
            StateNotRestoredError: the weights are half updated.
        """
        self._check_whole()
        if self._turns.inside:
            raise CheckpointError("half a window is no state to go on from: take it between two windows")
        return {
            **self._parts.state_dict(self._boundary),
            "progress": {
                "epoch": self.epoch,
                "window": self._window_index,
                "epoch_began_at": self._epoch_began_at,
                "evaluation_due": self._evaluation_due,
            },
            "plan": self.plan.to_dict(),
            "turns": self._turns.state_dict(),
            "probe": None if self.probe is None else self.probe.to_dict(),
            "verify": None if self.verify is None else self.verify.to_dict(),
            "history": self.history.state_dict(),
            "evaluations": [dict(results) for results in self.evaluations],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on as the loop that gave `state` would have. Generators and data follow when iteration begins.

        Raises:
            CheckpointError: it is of another target batch, data, model, optimizer or seed.
        """
        with loading("progress"):
            progress = dict(state["progress"])
            due = typed(progress.pop("evaluation_due"), bool)
            counts = typed(progress, dict[str, int])
            kept = plan_for(self.plan.rank, state["plan"])
        state = self._parts.checked(state)
        self._turns.checked(state["turns"])
        self._boundary = self._parts.load_state_dict(state, self.events)
        # Of another number of ranks the plan is this loop's own, which was made for as many as there are.
        self._turns.load_state_dict(state["turns"], kept if kept.world_size == self.plan.world_size else None)
        self.epoch, self._window_index = counts["epoch"], counts["window"]
        self._epoch_began_at, self._evaluation_due = counts["epoch_began_at"], due
        with loading("history"):
            self.history.load_state_dict(state["history"])
            self.evaluations[:] = [{**results, "loss": float(results["loss"])} for results in state["evaluations"]]
        self._left = self._stopped = None

    def _save(self, loss: float | None = None) -> None:
        """A checkpoint of this moment, unless there is one; `loss` is what validation has just found."""
        if self.folder is not None and self.step:
            self.folder.save(Entry(self.step, self.epoch, self._window_index), self.state_dict, self.plan, loss)

    def _rescue(self) -> None:
        """After an error: a checkpoint of what was before the window, where that is still there."""
        # On several ranks saving needs all of them, and nobody knows what the others are doing now.
        if self._turns.broken is None and not self._turns.inside and self._accumulator.ranks.size == 1:
            self._save()
            if self.folder is not None:
                self.folder.poll(wait=True)

    def _check_whole(self) -> None:
        if self._turns.broken is not None:
            raise StateNotRestoredError(
                f"the weights may be half updated, since there was {self._turns.broken}. {self._where_to_go_on()}"
            )

    def _where_to_go_on(self) -> str:
        if self.folder is None:
            return "There is no checkpoint to go on from: checkpoint=FOLDER keeps them"
        return self.folder.where()


class _Iteration:
    """One iteration over a loop. Of several, the one that was begun last trains: windows belong to the loop."""

    def __init__(self, loop: TrainingLoop) -> None:
        self._loop, self._records = loop, loop._records()
        self._replaced = False

    def __iter__(self) -> "_Iteration":
        return self

    @uninterrupted
    def __next__(self) -> StepRecord:
        loop = self._loop
        if loop._at_work:
            raise SetupError(
                f"the loop is iterated while it trains step {loop.step + 1}, from a callback or another thread, and "
                "would train its windows twice: iterate it in one place, and look at loop.history from there"
            )
        if self._replaced:
            raise SetupError(
                f"another iteration over the loop has gone on from where this one stood, and is at step {loop.step}: "
                "a loop trains each window once, so keep to one iterator, or prepare() a loop for each"
            )
        current = loop._iteration()
        if current is not self:
            loop._iteration = weakref.ref(self)
            if current is not None:  # ended later, it would take the model out of training mode under this one
                current._replaced = inspect.getgeneratorstate(current._records) != inspect.GEN_CLOSED
                current.close()
        loop._at_work = True
        try:
            return next(self._records)
        finally:
            loop._at_work = False

    @uninterrupted
    def close(self) -> None:
        """Ends the iteration, as leaving a for loop does."""
        self._records.close()

    __del__ = close
