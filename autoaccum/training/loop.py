"""The configured training loop: windows in, step records out.

Nothing but iteration trains. Leaving the loop and iterating again goes on where it stopped. The loop prints nothing;
it tells events.
"""

import random
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autoaccum.data import tree
from autoaccum.data.source import Source, open_source
from autoaccum.data.windows import Window, windows
from autoaccum.errors import DataError, LossError, NothingFitsError
from autoaccum.memory.device import Budget, Device
from autoaccum.memory.oom import Verdict, out_of_memory
from autoaccum.planning.plan import Plan
from autoaccum.probing.report import ProbeReport
from autoaccum.training.evaluate import Evaluator
from autoaccum.training.events import (
    EpochEnded,
    Events,
    Noted,
    StepTaken,
    TrainingEnded,
    TrainingStarted,
    WindowReplayed,
    WindowSkipped,
)
from autoaccum.training.recover import WindowStart, cut_smaller
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.record import StepRecord
from autoaccum.window.verify import VerifyReport

__all__ = ["FitResult", "TrainingLoop"]


@dataclass(frozen=True)
class FitResult:
    """What `fit` gives back.

    Attributes:
        model: the trained model, the same object.
        plan: as it was at the end; k may have grown after an out-of-memory error.
        probe: None where the micro-batch or the plan was given.
        verify: None where the check was switched off.
        history: one record a window.
        evaluations: one dict an epoch, with "epoch" and "step"; empty without validation data.
    """

    model: nn.Module = field(repr=False)
    plan: Plan
    probe: ProbeReport | None = field(repr=False)
    verify: VerifyReport | None
    history: list[StepRecord] = field(repr=False)
    evaluations: list[dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: everything but the model."""
        return {
            "plan": self.plan.to_dict(),
            "probe": self.probe.to_dict() if self.probe is not None else None,
            "verify": self.verify.to_dict() if self.verify is not None else None,
            "history": [record.to_dict() for record in self.history],
            "evaluations": self.evaluations,
        }


class TrainingLoop:
    """Trains one window at each step of iteration.

    ```python
    loop = autoaccum.prepare(model, data, target_batch=256)
    for record in loop:
        print(record.step, record.loss)
    ```

    Attributes:
        model, optimizer, scheduler: what is trained; the scheduler is None where the rate never changes.
        plan: as it is now.
        probe, verify: the reports; None where nothing was probed or checked.
        history: the records so far.
        evaluations: validation results so far, one an epoch.
        step: optimizer steps taken.
        epoch: epochs completed.
        total_steps: optimizer steps in the whole training; None for a stream without a length.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        source: Source,
        device: Device,
        *,
        epochs: int = 1,
        max_steps: int | None = None,
        total_steps: int | None = None,
        budget: Budget | None = None,
        events: Events | None = None,
        evaluator: Evaluator | None = None,
        probe: ProbeReport | None = None,
        verify: VerifyReport | None = None,
        regrow_after: int | None = None,
        seed: int | None = None,
    ) -> None:
        """Wires the parts; trains nothing."""
        self.model, self.optimizer = accumulator.model, accumulator.optimizer
        self.scheduler = accumulator.scheduler
        self.plan, self.probe, self.verify = accumulator.plan, probe, verify
        self.history: list[StepRecord] = []
        self.evaluations: list[dict[str, float]] = []
        self.epoch, self.total_steps = 0, total_steps
        self._accumulator, self._source, self._device, self._budget = accumulator, source, device, budget
        self._epochs, self._max_steps = epochs, max_steps
        self._events = events if events is not None else Events()
        self._evaluator = evaluator
        self._window_index = 0
        self._start = WindowStart(self.model, device)
        self._regrow_after, self._undisturbed = regrow_after, 0
        self._before_replays: Plan | None = None  # what to go back to when memory has come back
        self._seed = seed

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self._accumulator.step

    @property
    def events(self) -> Events:
        """Where listeners are added."""
        return self._events

    def __iter__(self) -> Iterator[StepRecord]:
        """Trains, yielding a record after each window.

        Raises:
            NothingFitsError: out of memory at the smallest micro-batch.
            LossError: a loss that is not finite, unless such windows are skipped.
            DataError: an epoch gave no window.
        """
        began = time.perf_counter()
        if self._seed is not None and not self.history:
            seed_everything(self._seed)
        self._tell_start()
        was_training = self.model.training
        self.model.train()
        try:
            with self._device.limit(self._budget) if self._budget is not None else nullcontext():
                while not self._done():
                    yield from self._rest_of_epoch()
            self._events.tell(TrainingEnded(self.step, time.perf_counter() - began))
        except Exception:
            self._accumulator.ranks.fail()  # the other ranks stop as well, instead of waiting for this one
            raise
        finally:
            self.model.train(was_training)
            self._events.close()

    def run(self) -> FitResult:
        """Trains to the end."""
        for _ in self:
            pass
        return FitResult(self.model, self.plan, self.probe, self.verify, self.history, self.evaluations)

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """The loss and the metrics over `data`, or over the validation data; the model is not trained.

        Raises:
            DataError: there is neither.
        """
        evaluator = self._evaluator
        if evaluator is None:
            raise DataError("evaluate() has no data: pass some, or give val_data to prepare() or fit()")
        return evaluator.evaluate(open_source(data, shuffle=False) if data is not None else None)

    def _done(self) -> bool:
        if self._max_steps is not None:
            return self.step >= self._max_steps
        return self.epoch >= self._epochs

    def _rest_of_epoch(self) -> Iterator[StepRecord]:
        stepped = False
        for window in windows(self._source, lambda: self.plan, self.epoch, start=self._window_index):
            record = self._train(window)
            self._window_index += 1
            stepped = stepped or record.skipped is None
            self.history.append(record)
            self._tell_record(record)
            yield record
            if self._max_steps is not None and self.step >= self._max_steps:
                self._evaluate_now()
                return
        if self._window_index == 0:
            raise DataError(
                f"epoch {self.epoch} gave no window of {self.plan.target_batch} samples: the data ended before one was full "
                'and tail="drop" leaves short ones out; lower target_batch or use tail="step"'
            )
        if not stepped and self._max_steps is not None:
            raise LossError(
                f"no window of epoch {self.epoch} took a step, so max_steps={self._max_steps} is never reached"
            )
        self.epoch += 1
        self._window_index = 0
        self._evaluate_now()

    def _train(self, window: Window) -> StepRecord:
        """One window, replayed in smaller pieces until it fits."""
        accumulator = self._accumulator
        accumulator.epoch = window.epoch
        self._start.mark()
        pieces, limit = window.batches, max(window.sizes, default=0)
        while True:
            ran_out = self._attempt(pieces)
            if not accumulator.ranks.any(ran_out):
                break
            accumulator.discard()
            self._start.restore()
            self._device.release()
            limit = self._smaller(limit)
            pieces = cut_smaller(window.batches, limit, self.plan.minimum)
        record = accumulator.finish()
        self._regrow()
        return record

    def _attempt(self, pieces: list[Any]) -> bool:
        """Runs the window's micro-batches; whether memory ran out. What it held is free once this has returned."""
        accumulator = self._accumulator
        try:
            accumulator.open(pieces)
            accumulator.run(pieces)
        except Exception as error:
            # What may be for want of memory is tried smaller too; if that was not it, it fails again and is raised.
            smallest = max(map(tree.batch_size, pieces), default=0) <= self.plan.minimum
            verdict = out_of_memory(error)
            if verdict is Verdict.SURELY or (verdict is Verdict.PERHAPS and not smallest):
                return True
            accumulator.discard()
            raise
        return False

    def _smaller(self, limit: int) -> int:
        """Halves the micro-batch, for this window and those to come."""
        limit = max(limit, 1)
        smaller = max((limit + 1) // 2, self.plan.minimum)
        if smaller >= limit:
            raise NothingFitsError(
                f"step {self.step + 1} ran out of memory at a micro-batch of {limit}, the smallest there is: something else "
                "has taken the memory, or a sample is larger than those probed; free memory, or train a smaller model"
            )
        text = (
            f"out of memory in step {self.step + 1} at a micro-batch of {limit}: the same samples run again in micro-batches "
            f"of at most {smaller}, and so do later windows; the batch stays {self.plan.target_batch}"
        )
        self._before_replays = self._before_replays or self.plan
        self._undisturbed = 0
        self._use(self.plan.with_limit(smaller, text))
        self._events.tell(WindowReplayed(self.step + 1, smaller, self.plan.accumulation_steps, text))
        return smaller

    def _regrow(self) -> None:
        """After enough undisturbed windows, back to the micro-batch from before; it is halved again if that was too soon."""
        self._undisturbed += 1
        if self._regrow_after is None or self._before_replays is None or self._undisturbed < self._regrow_after:
            return
        self._use(self._before_replays)
        self._before_replays = None
        text = f"{self._undisturbed} windows ran undisturbed: micro-batches of {self.plan.micro_batch} are tried again"
        self._events.tell(Noted(text))

    def _use(self, plan: Plan) -> None:
        self.plan = self._accumulator.plan = plan

    def _evaluate_now(self) -> None:
        results = None
        if self._evaluator is not None and self._evaluator.has_data:
            results = self._evaluator.evaluate()
            self.evaluations.append({"epoch": self.epoch, "step": self.step, **results})
        self._events.tell(EpochEnded(self.epoch, self.step, results))

    def _tell_start(self) -> None:
        budget = self._budget.bytes if self._budget is not None else None
        self._events.tell(TrainingStarted(self.plan.to_dict(), self.total_steps, self.step, budget))

    def _tell_record(self, record: StepRecord) -> None:
        if record.skipped is None:
            self._events.tell(StepTaken(record))
        else:
            self._events.tell(WindowSkipped(record.step, record.skipped))


def seed_everything(seed: int) -> None:
    """Seeds torch on every device, Python, and numpy where it is loaded."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        numpy.random.seed(seed % 2**32)
