"""One trial's training: built, planned by arithmetic, run to its budget, and reported against the samples it has seen.

Reports come at ninths of the budget, which the pruners' rungs (one; two and five) are among. Where an epoch is no
longer than a ninth they wait for its end, where the loop evaluates anyway; else the held-out data is run at the rungs
in mid-epoch as well, with the random generators put back: the training is the same as without.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autoaccum.errors import LossError, NothingFitsError, PlanError, SetupError
from autoaccum.files import read_json, write_json
from autoaccum.interrupts import uninterrupted
from autoaccum.model.optimizer import DEFAULT_LR
from autoaccum.planning.plan import Plan
from autoaccum.probing.answered import restored, stored
from autoaccum.probing.cache import training_key
from autoaccum.probing.report import ProbeReport
from autoaccum.random_state import RandomState
from autoaccum.ranks import ends_all
from autoaccum.searching.job import TRAIN_LOSS, Job, steps_for
from autoaccum.session import Session
from autoaccum.settings import SETTINGS, deciding
from autoaccum.training.events import EpochEnded, Event
from autoaccum.training.locks import FolderLock
from autoaccum.training.loop import TrainingLoop
from autoaccum.units import format_bytes
from autoaccum.window.record import StepRecord

__all__ = ["FIT", "GivenUp", "Limits", "Refused", "Trainer"]

FIT = ("lr", "lr_batch", "max_steps", "epochs", "seed")  # of fit's arguments, those that a search saves
NINTHS = 9
_SCHEMA = 2  # of a kept answer of the probe
RUNGS = (1, 2, 5)  # ninths at which a trial may be given up before an epoch's end


class GivenUp(BaseException):  # no error, and no handler of errors may stop it on its way out of the loop
    """A trial ended early; its text says why: "pruned", "diverged: ...", "does not fit: ..."."""


class Refused(SetupError):
    """What is wrong is the same in every trial: the search ends."""


class Trainer:
    """Trains one trial after another, and remembers what fits."""

    def __init__(self, job: Job, folder: Path) -> None:
        """What was found to fit lies in `folder`."""
        self._job, self._limits = job, Limits(folder, job.ceiling)
        self._checked: set[str] = set()  # memory keys whose gradient was checked: the same model need not be again

    def train(
        self, params: Mapping[str, Any], *, began: Callable[[dict[str, Any]], None],
        report: Callable[[float, int], bool],
    ) -> tuple[float, dict[str, Any], nn.Module]:  # fmt: skip
        """One training with a trial's parameters: (the metric, what else is known of it, the trained model).

        `began` is told the facts before the first window; `report` a value and the amount it took, and says whether to
        give up. On the ranks of a group alike.

        Raises:
            GivenUp: it ended early.
            Refused: no trial of this search can be trained.
        """
        session = self._session(params)
        asked, key = session.settings, self._limits.key(session)
        made, memory = self._planned(session, key)
        if self._job.unit == "ms":
            asked["epochs"], asked["max_steps"] = 10**9, None
        elif self._job.given:
            asked["max_steps"] = steps_for(made, self._job.amount, session.parts.source.length)
        again = {name: asked[name] for name in FIT if asked[name] != SETTINGS[name].default}
        if "max_steps" in again:
            again.pop("epochs", None)
        if "lr" not in again and not isinstance(asked.optimizer, Optimizer):
            again["lr"] = DEFAULT_LR  # not by way of the plan's scaled one, whose last digit may differ
        # Plain values, and enough to train so again.
        facts: dict[str, Any] = {
            "plan": made.to_dict(),
            "fit": again,
            "memory_bytes": memory,
            "threads": torch.get_num_threads(),
        }
        began(facts)
        if key in self._checked:
            asked["check"] = False
        watch = _Watch(self._job, session, report)
        session.events.add(watch)
        with ends_all():
            loop = uninterrupted(session.loop)()
        self._checked.add(key)
        started = time.perf_counter()
        watch.tell(value := watch.value(watch.run(loop)), last=True)
        facts |= {"seconds": time.perf_counter() - started, "samples": watch.samples, "steps": loop.step}
        return value, facts, loop.model

    def _session(self, params: Mapping[str, Any]) -> Session:
        job = self._job
        job.recipe.check_names(params)
        given = {name: value for name, value in job.recipe.build(params).items() if value is not None}
        own = {"device": job.device, "memory": job.memory, "seed": job.recipe.seed, "lr_batch": job.lr_batch}
        with ends_all():
            return Session(given.pop("model"), given.pop("data"), {**own, **given, "progress": False})

    def _planned(self, session: Session, key: str) -> tuple[Plan, int | None]:
        """The plan by what fits, and the bytes that its micro-batches take."""
        found, asked = None, session.settings
        if asked.micro_batch is None:
            failure = None
            try:
                found = self._limits.report(key, session)
            except NothingFitsError as error:
                failure = str(error)
            if session.parts.ranks.any("a study trial", failure is not None):  # all ranks leave together
                raise GivenUp(f"does not fit: {failure or 'another rank has no room for a single sample'}")
            assert found is not None
            if self._job.memory is not None and asked.memory == self._job.memory:  # which nobody asked for
                share = f"what is free, shared out over {self._job.workers} workers"
                found = replace(found, budget_reason=f"{format_bytes(found.budget_bytes)}: {share}")
            session.found(found, "the probe of this search")
        try:
            made = session.plan()
        except PlanError as error:
            raise GivenUp(f"does not fit: {error}") from error
        return made, None if found is None else found.expected(made)


class Limits:
    """How many samples fit at once, probed once for all trials that need the same memory.

    What decides the memory is the key of the probe's cache; learning rates, schedules and target batches are not in it,
    so most searches probe a single time. The answers lie in the run's folder, where all workers find them.
    """

    def __init__(self, folder: Path, ceiling: int) -> None:
        # The ceiling is the largest target batch, up to which the probe looks.
        self._folder, self._ceiling = folder / "probes", ceiling

    def key(self, session: Session) -> str:
        """A name for all that decides how many samples fit."""
        asked = session.settings
        settings = {name: asked[name] for name in deciding("memory") if asked[name] != SETTINGS[name].default}
        settings.pop("precision", None)  # the one that was decided on counts
        return training_key(session.parts, {**settings, "ranks": session.parts.ranks.size})

    def report(self, key: str, session: Session) -> ProbeReport:
        """The probe's report, whose `micro_batch` is the most samples that trials may run at once.

        A NothingFitsError where not even one sample fits, now or when it was probed.
        """
        share = max(self._ceiling, session.settings.target_batch)
        values = self._read(key, share)
        if values is None:
            with FolderLock(self._folder, "probe"):
                # Another worker may have found out meanwhile.
                values = self._read(key, share) or self._probe(key, session, share)
        if values["nothing"] is not None:
            raise NothingFitsError(values["nothing"])
        return restored(values)

    @uninterrupted
    def _probe(self, key: str, session: Session, share: int) -> dict[str, Any]:
        """The report as plain values, or why nothing fits; kept for all other trials."""
        values: dict[str, Any] = {"schema": _SCHEMA, "share": share, "nothing": None}
        try:
            with ends_all():
                found = session.probe(share)
            if not found.throughput:  # else the size is the fastest, and larger ones would only be slower
                found = replace(found, micro_batch=max(found.micro_batch, found.limit or 0))
            values |= stored(found)
        except NothingFitsError as error:
            values["nothing"] = str(error)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / f"{key}.json", values, checksum=True, private=True)
        return values

    def _read(self, key: str, share: int) -> dict[str, Any] | None:
        """What is known and reaches as far as `share`; a file that is no answer is as good as none."""
        try:
            values: dict[str, Any] = read_json(self._folder / f"{key}.json")
            if values["schema"] != _SCHEMA:
                return None
            sure = values["nothing"] or restored(values).limit_proof in ("forecast", "out of memory")
            return values if sure or values["share"] >= share else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None


class _Watch:
    """Runs a training, counts what it has taken, and reports when it is time."""

    def __init__(self, job: Job, session: Session, report: Callable[[float, int], bool]) -> None:
        self._job, self._parts, self._report = job, session.parts, report
        self.samples = self._in_epoch = self._reported = 0  # the last in ninths
        self._seconds = 0.0
        self._history: Sequence[StepRecord] = ()

    @property
    def _amount(self) -> int:
        return self.samples if self._job.unit == "samples" else round(1000 * self._seconds)

    def _ninths(self) -> int:
        """Of the budget, so far."""
        return self._amount * NINTHS // self._job.amount

    def value(self, evaluation: Mapping[str, float] | None) -> float:
        """The metric, from an evaluation or from the last ninth of the training's losses."""
        metric = self._job.metric
        if metric == TRAIN_LOSS:
            total, weighed = 0, 0.0
            for record in reversed(self._history):
                total, weighed = total + record.samples, weighed + record.samples * record.loss
                if total * NINTHS >= self.samples:
                    break
            return weighed / total if total else math.nan
        if evaluation is None or metric not in evaluation:
            raise Refused(
                f"the metric {metric!r} was not reported: the evaluation has {', '.join(evaluation or ['nothing'])}; "
                "give val_data and a metric of that name"
            )
        return float(evaluation[metric])

    def tell(self, value: float, *, last: bool = False) -> None:
        """Reports, and ends the training where the pruner says so: one rank is asked, and all are told."""
        if not math.isfinite(value):  # a bad value and no failure: the sampler learns from it
            raise GivenUp(f"diverged: {self._job.metric} is {value} after {self.samples} samples")
        self._reported = self._ninths()
        stop = self._report(value, self._amount)
        if self._parts.ranks.any("a report of the search", stop) and not last:
            raise GivenUp("pruned")

    def __call__(self, event: Event) -> None:
        """Reports where an epoch ends and a ninth of the budget has passed since the last report."""
        if isinstance(event, EpochEnded):
            self._in_epoch = 0
            if self._reported < self._ninths() < NINTHS:
                self.tell(self.value(event.evaluation))

    def run(self, loop: TrainingLoop) -> Mapping[str, float] | None:
        """Trains, and gives the last evaluation."""
        parts, job, length = self._parts, self._job, self._parts.source.length
        epoch = None if length is None else sum(size * count for size, count in loop.plan.windows.runs(length))
        self._history = loop.history
        # Whether epochs' ends, where the loop evaluates anyway, come often enough.
        short = job.unit == "samples" and epoch is not None and epoch * NINTHS <= job.amount
        try:
            with closing(iter(loop)) as windows:  # type: ignore[type-var]
                for record in windows:
                    self.samples += record.samples
                    self._in_epoch += record.samples
                    self._seconds += record.seconds
                    if job.unit == "ms" and parts.ranks.any("the budget of a study trial", self._amount >= job.amount):
                        return self._evaluated(loop)
                    at_end, now = epoch is not None and self._in_epoch >= epoch, self._ninths()
                    if not short and not at_end and now < NINTHS and any(self._reported < at <= now for at in RUNGS):
                        random = RandomState(parts.device.torch_device)
                        try:
                            evaluation = self._evaluated(loop)
                        finally:
                            random.restore()
                        self.tell(self.value(evaluation))
        except LossError as error:
            raise GivenUp(f"diverged: {error}") from error
        return loop.evaluations[-1] if loop.evaluations else None

    def _evaluated(self, loop: TrainingLoop) -> Mapping[str, float] | None:
        return loop.evaluate() if self._job.metric != TRAIN_LOSS else None
