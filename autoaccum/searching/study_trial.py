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
from autoaccum.searching.limits import Limits, forecast_bytes
from autoaccum.searching.recipe import FIT
from autoaccum.searching.terms import TRAIN_LOSS, Terms, check_metric, check_target, steps_for
from autoaccum.session import Session
from autoaccum.settings import SETTINGS, Settings
from autoaccum.training.events import EpochEnded, Event
from autoaccum.training.loop import TrainingLoop
from autoaccum.units import format_bytes
from autoaccum.window.assembly import Assembly

__all__ = ["Diverged", "Finished", "Infeasible", "Pruned", "Refused", "Trainer"]

NINTHS = 9
RUNGS = (1, 2, 5)  # ninths at which a trial may be given up before an epoch's end


class Pruned(BaseException):  # no error, and no handler of errors may stop it on its way out of the loop
    """Other trials did better with as many samples."""


class Diverged(Exception):
    """The loss is no longer a finite number."""


class Infeasible(Exception):
    """This setting cannot be trained on this device at all."""


class Refused(SetupError):
    """What is wrong is the same in every trial: the search ends."""


@dataclass
class Finished:
    """How a training ended.

    Attributes:
        value: the metric.
        samples, seconds: of the training.
        facts: what is known of it, as plain values; see `Trainer.facts`.
        model: trained.
    """

    value: float
    samples: int
    seconds: float
    facts: dict[str, Any]
    model: nn.Module = field(repr=False)


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
        self.samples, self.in_epoch, self.seconds = (
            self.samples + samples,
            self.in_epoch + samples,
            self.seconds + seconds,
        )
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
            raise Diverged(f"{self.terms.metric} is {value} after {self.samples} samples")
        self.reported = self.ninths()
        stop = self.report(value, self.amount)
        if self.ranks.any("a report of the search", stop) and not last:
            raise Pruned


class Trainer:
    """Trains one trial after another, and remembers what fits."""

    def __init__(self, terms: Terms, limits: Limits, *, share: str | None = None) -> None:
        """`share`: where a budget comes from that nobody asked for, since it is a worker's part of what is free."""
        self._terms, self._limits, self._share = terms, limits, share
        self._checked: set[str] = set()  # memory keys whose gradient was checked: the same model need not be again

    def train(
        self, arguments: Mapping[str, Any], *, began: Callable[[dict[str, Any]], None],
        report: Callable[[float, int], bool],
    ) -> Finished:  # fmt: skip
        """One training.

        Args:
            arguments: fit's, as the setup gave them with the trial's parameters.
            began: told the facts before the first window.
            report: told a value and the amount it took; says whether to give up.

        Raises:
            Pruned, Diverged, Infeasible: it ended early.
            Refused: no trial of this search can be trained.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        check_metric_now(given, self._terms)
        _check_target(given)
        given.setdefault("seed", self._terms.seed)
        if self._terms.lr_batch is not None:
            given.setdefault("lr_batch", self._terms.lr_batch)
        session = _session(given)
        key = self._limits.key(session)
        made, memory = self._planned(session, key)
        asked, parts = session.settings, session.parts
        if self._terms.given and self._terms.unit == "samples":
            asked["max_steps"] = steps_for(made, self._terms.amount, parts.source.length)
        elif self._terms.unit == "ms":
            asked["epochs"], asked["max_steps"] = 10**9, None
        facts = self.facts(made, asked, memory)
        began(facts)
        if key in self._checked:
            asked["check"] = False
        watch = _Watch(self._terms, report, parts.ranks)
        session.events.add(self._at_epochs(watch))
        loop = _loop(session)
        self._checked.add(key)
        started = time.perf_counter()
        evaluation = self._run(loop, parts, watch)
        value = watch.value(evaluation)
        watch.tell(value, last=True)
        facts |= {"seconds": time.perf_counter() - started, "samples": watch.samples, "steps": loop.step}
        return Finished(value, watch.samples, facts["seconds"], facts, loop.model)

    def facts(self, made: Plan, asked: Settings, memory: int | None) -> dict[str, Any]:
        """What is known of a training before it begins, as plain values: enough to train so again."""
        again = {name: asked[name] for name in FIT if asked[name] != SETTINGS[name].default}
        if "max_steps" in again:
            again.pop("epochs", None)
        if "lr" not in again and not isinstance(asked.optimizer, Optimizer):
            again["lr"] = DEFAULT_LR  # not by way of the plan's scaled one, whose last digit may differ
        return {"plan": made.to_dict(), "fit": again, "memory_bytes": memory, "threads": torch.get_num_threads()}

    def _planned(self, session: Session, key: str) -> tuple[Plan, int | None]:
        """The plan by what fits, and the bytes that its micro-batches take."""
        asked, report, failure = session.settings, None, None
        if asked.micro_batch is None:
            try:
                report = self._limits.report(key, session)
            except NothingFitsError as error:
                failure = str(error)
            if session.parts.ranks.any("a study trial", failure is not None):  # all ranks leave together
                raise Infeasible(failure or "another rank's device has no room for a single sample")
        if report is not None:
            if self._share is not None and report.budget_reason.endswith(f"as memory={asked.memory} asks"):
                report = replace(report, budget_reason=f"{format_bytes(report.budget_bytes)}: {self._share}")
            session.found(report, "the probe of this search")
        try:
            made = session.plan()
        except PlanError as error:
            raise Infeasible(str(error)) from error
        if report is None:
            return made, None
        return made, forecast_bytes(report, self._limits.curve(key), made.micro_batch)

    def _at_epochs(self, watch: _Watch) -> Callable[[Event], None]:
        """A listener that reports where an epoch ends and a ninth of the budget has passed since the last report."""

        def listen(event: Event) -> None:
            if not isinstance(event, EpochEnded):
                return
            watch.in_epoch = 0
            if watch.reported < watch.ninths() < NINTHS:
                watch.tell(watch.value(event.evaluation), last=False)

        return listen

    def _run(self, loop: Any, parts: Assembly, watch: _Watch) -> Mapping[str, float] | None:
        """Trains, and gives the last evaluation."""
        terms = self._terms
        length = parts.source.length
        sizes = None if length is None else sum(size * count for size, count in loop.plan.window_runs(length))
        short = terms.unit == "samples" and sizes is not None and sizes * NINTHS <= terms.amount
        windows = iter(loop)
        with closing(windows):
            while True:
                try:
                    record = next(windows, None)
                except LossError as error:
                    raise Diverged(str(error)) from error
                if record is None:
                    break
                watch.take(record.samples, record.loss, record.seconds)
                if terms.unit == "ms" and parts.ranks.any("the budget of a study trial", watch.amount >= terms.amount):
                    return loop.evaluate() if terms.metric != TRAIN_LOSS else None
                at_end = sizes is not None and watch.in_epoch >= sizes
                if not short and not at_end and _rung(watch):
                    self._mid_epoch(loop, parts, watch)
        return loop.evaluations[-1] if loop.evaluations else None

    def _mid_epoch(self, loop: Any, parts: Assembly, watch: _Watch) -> None:
        random = RandomState(parts.device.torch_device)
        try:
            evaluation = loop.evaluate() if self._terms.metric != TRAIN_LOSS else None
        finally:
            random.restore()
        watch.tell(watch.value(evaluation), last=False)


def _rung(watch: _Watch) -> bool:
    """Whether a rung was passed since the last report."""
    now = watch.ninths()
    return any(watch.reported < rung <= now for rung in RUNGS) and now < NINTHS


def check_metric_now(given: Mapping[str, Any], terms: Terms) -> None:
    """Checks the gradient as before the search, on this trial's own arguments."""
    try:
        check_metric(given, terms.metric)
    except SetupError as error:
        raise Refused(str(error)) from error


def _check_target(given: Mapping[str, Any]) -> None:
    try:
        check_target(given.get("target_batch"))
    except SetupError as error:
        raise Refused(str(error)) from error


def _session(given: Mapping[str, Any]) -> Session:
    """One trial's, which shows nothing."""
    settings = {name: value for name, value in given.items() if name not in ("model", "data")}
    with ends_all():
        return Session(given["model"], given["data"], {**settings, "progress": False})


@uninterrupted
def _loop(session: Session) -> TrainingLoop:
    with ends_all():
        return session.loop()
