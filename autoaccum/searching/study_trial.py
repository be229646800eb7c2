"""One trial's training: built, planned by arithmetic, run to its budget, and reported against the samples it has seen.

Choices:
- Reports come at ninths of the budget, which the pruners' rungs (one; two and five) are among. Where an epoch is no
  longer than a ninth they wait for its end, where the loop evaluates anyway; else the held-out data is run at the
  rungs in mid-epoch as well, with the random generators put back: the training is the same as without.
- A loss that is not finite is a bad value and no failure: the trial counts as pruned, and the sampler learns from it.
- Whether to stop is asked of one rank and told to all.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autoaccum.errors import LossError, NothingFitsError, PlanError, SetupError
from autoaccum.interrupts import uninterrupted
from autoaccum.model.optimizer import DEFAULT_LR
from autoaccum.planning.plan import Plan
from autoaccum.random_state import RandomState
from autoaccum.ranks import Ranks, ends_all
from autoaccum.searching.limits import Limits
from autoaccum.searching.terms import TRAIN_LOSS, Terms, check_metric, check_target, steps_for
from autoaccum.session import Session
from autoaccum.settings import SETTINGS, Settings
from autoaccum.training.events import EpochEnded, Event
from autoaccum.training.loop import TrainingLoop
from autoaccum.units import format_bytes

__all__ = ["FIT", "GivenUp", "Refused", "Trainer"]

FIT = ("lr", "lr_batch", "max_steps", "epochs", "seed")  # of fit's arguments, those that a search saves
NINTHS = 9
RUNGS = (1, 2, 5)  # ninths at which a trial may be given up before an epoch's end


class GivenUp(BaseException):  # no error, and no handler of errors may stop it on its way out of the loop
    """A trial ended early; its text says why: "pruned", "diverged: ...", "does not fit: ..."."""


class Refused(SetupError):
    """What is wrong is the same in every trial: the search ends."""


@dataclass
class _Watch:
    """Counts what a training has taken, and reports when it is time."""

    terms: Terms
    report: Callable[[float, int], bool]
    ranks: Ranks
    samples: int = 0
    seconds: float = 0.0
    in_epoch: int = 0
    reported: int = 0  # ninths
    losses: deque[tuple[int, float]] = field(default_factory=deque)

    @property
    def amount(self) -> int:
        return self.samples if self.terms.unit == "samples" else round(1000 * self.seconds)

    def ninths(self) -> int:
        """Of the budget, so far."""
        return self.amount * NINTHS // self.terms.amount

    def take(self, samples: int, loss: float, seconds: float) -> None:
        """Counts a window, and keeps the losses of the last ninth of the training."""
        self.samples += samples
        self.in_epoch += samples
        self.seconds += seconds
        self.losses.append((samples, loss))
        kept = sum(count for count, _ in self.losses)
        while len(self.losses) > 1 and (kept - self.losses[0][0]) * NINTHS >= self.samples:
            kept -= self.losses.popleft()[0]

    def value(self, evaluation: Mapping[str, float] | None) -> float:
        """The metric, from an evaluation or from the last ninth of the training's losses."""
        if self.terms.metric == TRAIN_LOSS:
            total = sum(count for count, _ in self.losses)
            return sum(count * loss for count, loss in self.losses) / total if total else math.nan
        if evaluation is None or self.terms.metric not in evaluation:
            there = ", ".join(evaluation) if evaluation else "nothing"
            raise Refused(
                f"the metric {self.terms.metric!r} was not reported: the evaluation has {there}; give val_data and a "
                "metric of that name"
            )
        return float(evaluation[self.terms.metric])

    def tell(self, value: float, *, last: bool) -> None:
        """Reports, and ends the training where the pruner says so, on all ranks alike."""
        if not math.isfinite(value):
            raise GivenUp(f"diverged: {self.terms.metric} is {value} after {self.samples} samples")
        self.reported = self.ninths()
        stop = self.report(value, self.amount)
        if self.ranks.any("a report of the search", stop) and not last:
            raise GivenUp("pruned")

    def at_rung(self) -> bool:
        """Whether a rung was passed since the last report."""
        now = self.ninths()
        return any(self.reported < rung <= now for rung in RUNGS) and now < NINTHS

    def __call__(self, event: Event) -> None:
        """Reports where an epoch ends and a ninth of the budget has passed since the last report."""
        if isinstance(event, EpochEnded):
            self.in_epoch = 0
            if self.reported < self.ninths() < NINTHS:
                self.tell(self.value(event.evaluation), last=False)


class Trainer:
    """Trains one trial after another, and remembers what fits."""

    def __init__(self, terms: Terms, limits: Limits, *, share: str | None = None) -> None:
        """`share`: where a budget comes from that nobody asked for, since it is a worker's part of what is free."""
        self._terms, self._limits, self._share = terms, limits, share
        self._checked: set[str] = set()  # memory keys whose gradient was checked: the same model need not be again

    def train(
        self, arguments: Mapping[str, Any], *, began: Callable[[dict[str, Any]], None],
        report: Callable[[float, int], bool],
    ) -> tuple[float, dict[str, Any], nn.Module]:  # fmt: skip
        """One training: (the metric, what else is known of it, the trained model).

        Args:
            arguments: fit's, as the setup gave them with the trial's parameters.
            began: told the facts before the first window.
            report: told a value and the amount it took; says whether to give up.

        Raises:
            GivenUp: it ended early.
            Refused: no trial of this search can be trained.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            check_metric(given, self._terms.metric)
            check_target(given.get("target_batch"))
        except SetupError as error:
            raise Refused(str(error)) from error
        given.setdefault("seed", self._terms.seed)
        given.setdefault("lr_batch", self._terms.lr_batch)
        with ends_all():
            session = Session(given.pop("model"), given.pop("data"), {**given, "progress": False})
        asked, key = session.settings, self._limits.key(session)
        made, memory = self._planned(session, key)
        if self._terms.unit == "ms":
            asked["epochs"], asked["max_steps"] = 10**9, None
        elif self._terms.given:
            asked["max_steps"] = steps_for(made, self._terms.amount, session.parts.source.length)
        facts = _facts(made, asked, memory)
        began(facts)
        if key in self._checked:
            asked["check"] = False
        watch = _Watch(self._terms, report, session.parts.ranks)
        session.events.add(watch)
        loop = _loop(session)
        self._checked.add(key)
        started = time.perf_counter()
        value = watch.value(self._run(loop, session, watch))
        watch.tell(value, last=True)
        facts |= {"seconds": time.perf_counter() - started, "samples": watch.samples, "steps": loop.step}
        return value, facts, loop.model

    def _planned(self, session: Session, key: str) -> tuple[Plan, int | None]:
        """The plan by what fits, and the bytes that its micro-batches take."""
        found, failure, asked = None, None, session.settings
        if asked.micro_batch is None:
            try:
                found = self._limits.report(key, session)
            except NothingFitsError as error:
                failure = str(error)
            if session.parts.ranks.any("a study trial", failure is not None):  # all ranks leave together
                raise GivenUp(f"does not fit: {failure or 'another rank has no room for a single sample'}")
        if found is not None:
            report = found
            if self._share is not None and report.budget_reason.endswith(f"as memory={asked.memory} asks"):
                report = replace(report, budget_reason=f"{format_bytes(report.budget_bytes)}: {self._share}")
            session.found(report, "the probe of this search")
        try:
            made = session.plan()
        except PlanError as error:
            raise GivenUp(f"does not fit: {error}") from error
        return made, None if found is None else self._limits.memory(key, made.micro_batch)

    def _run(self, loop: Any, session: Session, watch: _Watch) -> Mapping[str, float] | None:
        """Trains, and gives the last evaluation."""
        parts, terms = session.parts, self._terms
        length = parts.source.length
        epoch = None if length is None else sum(size * count for size, count in loop.plan.window_runs(length))
        # Whether epochs' ends, where the loop evaluates anyway, come often enough.
        short = terms.unit == "samples" and epoch is not None and epoch * NINTHS <= terms.amount
        with closing(iter(loop)) as windows:
            while True:
                try:
                    record = next(windows, None)
                except LossError as error:
                    raise GivenUp(f"diverged: {error}") from error
                if record is None:
                    return loop.evaluations[-1] if loop.evaluations else None
                watch.take(record.samples, record.loss, record.seconds)
                if terms.unit == "ms" and parts.ranks.any("the budget of a study trial", watch.amount >= terms.amount):
                    return self._evaluated(loop)
                at_end = epoch is not None and watch.in_epoch >= epoch
                if not short and not at_end and watch.at_rung():
                    random = RandomState(parts.device.torch_device)
                    try:
                        evaluation = self._evaluated(loop)
                    finally:
                        random.restore()
                    watch.tell(watch.value(evaluation), last=False)

    def _evaluated(self, loop: Any) -> Mapping[str, float] | None:
        return loop.evaluate() if self._terms.metric != TRAIN_LOSS else None


def _facts(made: Plan, asked: Settings, memory: int | None) -> dict[str, Any]:
    """What is known of a training before it begins, as plain values: enough to train so again."""
    again = {name: asked[name] for name in FIT if asked[name] != SETTINGS[name].default}
    if "max_steps" in again:
        again.pop("epochs", None)
    if "lr" not in again and not isinstance(asked.optimizer, Optimizer):
        again["lr"] = DEFAULT_LR  # not by way of the plan's scaled one, whose last digit may differ
    return {"plan": made.to_dict(), "fit": again, "memory_bytes": memory, "threads": torch.get_num_threads()}


@uninterrupted
def _loop(session: Session) -> TrainingLoop:
    with ends_all():
        return session.loop()
