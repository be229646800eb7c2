"""A probe as a session asks for it: here or in a child process, of each phase, up the ladder, over unlike ranks."""

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from autoaccum.errors import NothingFitsError, PlanError, StateNotRestoredError
from autoaccum.interrupts import interruptible
from autoaccum.model.given_model import has_batch_norm
from autoaccum.model.memory_savers import BY_NAME, CHANGES, RUNGS
from autoaccum.model.optimizer import optimizer_name
from autoaccum.model.shards import is_sharded, refuse_beside_shards
from autoaccum.model.snapshot import Snapshot
from autoaccum.planning.plan import plan
from autoaccum.planning.split import counts, even_split, shares
from autoaccum.probing.answered import restored
from autoaccum.probing.cache import training_key
from autoaccum.probing.climb import NOT_BORNE, Tried, cannot_run, told
from autoaccum.probing.isolate import InChild, Isolation, answer_of_children
from autoaccum.probing.journal import Journal, journal_path
from autoaccum.probing.outcome import Trial
from autoaccum.probing.probe import Question, run_probe
from autoaccum.probing.report import ProbeReport
from autoaccum.probing.trial import hold_still
from autoaccum.ranks import Ranks
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.assembly import Assembly

__all__ = ["Prober"]

# A probe puts the process's generators back at its end, and PyTorch's profiler has one session a process.
_PROBING = threading.RLock()


@dataclass(frozen=True)
class Prober:
    """Finds the largest micro-batch of a training.

    Attributes:
        parts: what is trained; it runs under the ladder's rung, once one was taken.
        accumulation: settings of the accumulator, which decide what a window takes.
        ladder, cache: as in `prepare`.
        isolation: how a child process probes, or that this is one; None: here.
        ran, note: told of each trial as it ends, and in words what is going on.
    """

    parts: Assembly
    accumulation: Mapping[str, Any]
    ladder: str | bool | None
    cache: bool
    isolation: Isolation | InChild | None
    ran: Callable[[Trial], None]
    note: Callable[[str], None]

    def report(self, question: Question, target: int | None) -> ProbeReport:
        """The answer, shared over the ranks.

        Args:
            question: of an equal share.
            target: samples of a window over all ranks; None: each rank asks for itself.

        Raises:
            NothingFitsError: not even the smallest micro-batch fits; which rungs of the ladder would is said.
        """
        parts, sharded = self.parts, is_sharded(self.parts.model)
        refuse_beside_shards(parts.model, self.isolation, question.prefer, self.ladder)
        if sharded and target is not None and target < parts.ranks.size:
            raise PlanError(
                f"target_batch={target} is less than the {parts.ranks.size} ranks, and a sharded model runs on every "
                f"rank: give target_batch={parts.ranks.size} or more"
            )
        length = parts.source.length
        samples = None if target is None else min(target, length or target)
        report = self._of_all_phases(replace(question, window=samples))
        if parts.ranks.size == 1 or samples is None or sharded:  # shards have shared out already
            return report
        return self._shared_out(question, report, samples)

    def _shared_out(self, question: Question, report: ProbeReport, samples: int) -> ProbeReport:
        """Once more on ranks that can take more than an equal share, where that makes fewer micro-batches.

        With limits of 140 and 46 samples and a window of 120, equal shares take two micro-batches of 30 on the second
        rank; 90 and 30 take one on each. All ranks call this.
        """
        ranks, floor = self.parts.ranks, report.floor
        limits = ranks.gather("the limits", report.limit or report.micro_batch)
        ran = ranks.gather("the limits", report.micro_batch)
        if ranks.any("the limits", bool(report.by_length or report.throughput)):
            return report
        try:
            fewer = max(counts(samples, limits, minimum=floor)) < max(counts(samples, ran, minimum=floor))
        except PlanError:  # the plan will say which windows can be shared
            return report
        share = shares(samples, limits, minimum=floor)[ranks.rank]
        size = max(even_split(share, limits[ranks.rank], minimum=floor), default=0)
        if not fewer or size <= report.micro_batch:
            return report
        found = self._of_all_phases(replace(question, share=size, max_batch=size))
        note = f"the ranks' limits are {', '.join(map(str, limits))}: this one takes {share} samples of a window"
        return replace(
            found, trials=(*report.trials, *found.trials), notes=(*found.notes, note), limit=report.limit,
            limit_proof=report.limit_proof,
        )  # fmt: skip

    def _of_all_phases(self, question: Question) -> ProbeReport:
        """Of several phases the one that fits least, with the other optimizers' state in memory."""
        turns = self.parts.turns
        if len(turns) == 1:
            return self._up_the_ladder(question)
        reports = []
        with ExitStack() as stack:
            for turn in turns:
                stack.enter_context(Snapshot(turn.model, turn.optimizer, device=turn.device.torch_device))
            for turn in turns:
                _warm(turn)
            for turn in turns:
                assert turn.phase is not None
                self.note(f"probing the phase {turn.phase.name!r}")
                own = {**self.accumulation, "clip_norm": turn.phase.clip_norm}
                reports.append(replace(self, parts=turn, accumulation=own)._up_the_ladder(question))
        taken = next((turn.ladder for turn in turns if turn.ladder is not None), None)
        for turn in turns:
            if turn.ladder != taken:
                turn.take(taken)
        return min(reports, key=lambda report: report.micro_batch)

    def _up_the_ladder(self, question: Question) -> ProbeReport:
        """Probes; where nothing fits, looks at the ladder's rungs.

        With ladder=None the error says which would fit; with "auto" the cheapest that fits on all ranks is taken, for
        all that runs with `parts` from here on.
        """
        parts, takes = self.parts, self.ladder == "auto"
        refusal, report = None, None
        alone = parts.ranks.size == 1 and parts.phase is None  # else all would have to take the same one
        if question.prefer == "fastest" and self.ladder is not False and parts.ladder is None and alone:
            exact = (rung for rung in RUNGS if rung not in CHANGES | BY_NAME and parts.obstacle(rung) is None)
            question = replace(question, savers=tuple(exact), under=parts.under)
        try:
            report = self._once(question)
        except NothingFitsError as error:
            others_climb = isinstance(self.isolation, InChild) and not self.isolation.climbs
            elsewhere = others_climb or is_sharded(parts.model)
            if parts.ladder is not None or self.ladder is False or elsewhere:
                raise
            refusal = str(error)
        # Outside the except block, where nothing holds what the failed step held.
        stuck = parts.ranks.any("the probe", refusal is not None) if takes else refusal is not None
        if report is not None and not stuck:
            parts.take(report.ladder)  # prefer="fastest" may have found one
            return report
        tried: list[Tried] = []
        taken = None
        for rung in RUNGS:
            tried.append(self._under(rung, question))
            enough = takes and rung not in BY_NAME
            if enough and not parts.ranks.any("a rung of the ladder", not tried[-1].fits):
                taken = rung
                break
        if taken is None and refusal is None:
            raise NothingFitsError(
                "not even the smallest micro-batch fits on another rank, under any rung of the ladder: the error that "
                "it raised says what was tried"
            )
        if taken is None:
            nothing = NothingFitsError(f"{refusal}. {told(tried)}")
            nothing.savers = [each.row for each in tried]
            raise nothing
        parts.take(taken)
        self.note(f"the ladder's {taken} is taken, the cheapest that fits: {RUNGS[taken]}")
        report = self._once(question)
        fits = {"limit": report.limit, "micro_batch": report.micro_batch, "obstacle": "taken, the cheapest that fits"}
        if report.forecaster is not None:
            fits["peak_bytes"] = int(report.forecast(report.micro_batch))
        return replace(report, savers=(*(each.row for each in tried[:-1]), {**tried[-1].row, **fits}))

    def _under(self, rung: str, question: Question) -> Tried:
        """The smallest step under a rung; a whole probe of one that fits, where none is taken by itself."""
        parts = self.parts
        why = parts.obstacle(rung)
        if why is not None:
            return Tried(rung, obstacle=why)
        self.note(f"not even the smallest micro-batch fits: looking at it under {rung}")
        # BatchNorm may need two samples; which it does is not tried here, where memory is what lacks.
        most = 2 if has_batch_norm(parts.model) else 1
        trials: list[Trial] = []

        def ran(trial: Trial) -> None:
            trials.append(trial)
            self.ran(trial)

        here = replace(self, parts=replace(parts), ran=ran)
        here.parts.take(rung)
        try:
            here._once(replace(question, share=None, max_batch=most, prefer="fewest"))
            smallest = max(trial.peak_bytes or 0 for trial in trials if trial.fits)
            probed: Mapping[str, Any] = {}
            if self.ladder != "auto":
                whole = here._once(replace(question, prefer="fastest"))
                probed = {"limit": whole.limit or whole.micro_batch, "micro_batch": whole.micro_batch}
                probed = whole.savers[0] if whole.savers else probed  # none where samples of mixed length are not timed
        except NothingFitsError:
            return Tried(rung, max((trial.peak_bytes or 0 for trial in trials), default=0) or None)
        except StateNotRestoredError:
            raise
        except NOT_BORNE as error:
            return Tried(rung, obstacle=cannot_run(error))
        return Tried(rung, smallest, fits=True, probed=probed)

    def _once(self, question: Question) -> ProbeReport:
        """One probe of the model as it runs now."""
        if isinstance(self.isolation, Isolation):
            return interruptible(self._in_child, self.isolation, question)
        parts = self.parts
        how: dict[str, Any] = {"ladder": parts.ladder, "compile": parts.compiled is not None, **self.accumulation}
        if parts.beside:
            how["beside"] = [optimizer_name(optimizer) for optimizer in parts.beside]
        key = training_key(parts, how)
        cache = self.cache and not is_sharded(parts.model)  # whose ranks would go apart by what each has seen before
        # A child's teaches the next one, whatever becomes of the answer.
        journal = Journal(journal_path(key) if cache or self.isolation else None, key)
        if self.isolation is not None:
            self.isolation.keeps(journal)
        accumulator = _accumulator(parts, 1, **self.accumulation)
        accumulator.beside = parts.beside
        with _PROBING, parts.running(alone=True), journal.probing(closes=self.isolation is None):
            report = run_probe(
                accumulator, parts.source, parts.device, question,
                journal=journal, cache=key if cache else None, listener=self.ran,
            )  # fmt: skip
        return replace(report, ladder=parts.ladder or report.ladder)

    def _in_child(self, isolation: Isolation, question: Question) -> ProbeReport:
        """A new child for each that is killed, until the journal has taught them enough."""
        parts = self.parts
        asked = {
            "target_batch": question.share, "memory": question.memory, "max_batch": question.max_batch,
            "multiple_of": question.multiple_of, "prefer": question.prefer, "device": str(parts.device.torch_device),
            "precision": parts.asked_precision, "cache": self.cache, "compile": parts.compiled is not None,
            **self.accumulation,
            # The child looks at this rung only, since it may be killed on any; or times what may be taken beside none.
            "ladder": parts.ladder or (None if question.savers else False),
        }  # fmt: skip

        def heard(kind: str, value: Any) -> None:
            if kind == "trial":
                self.ran(Trial(**value))
            else:
                self.note(value)

        return restored(answer_of_children(isolation.work, (isolation.factory, asked), heard, self.ran))


def _accumulator(parts: Assembly, size: int, **settings: Any) -> Accumulator:
    """One of the probe's own, which waits for nobody: each rank probes its own device, unless they meet in a pass."""
    ranks = parts.ranks if is_sharded(parts.model) else Ranks()
    how = {"world_size": ranks.size, "rank": ranks.rank, "batch_norm": settings["batch_norm"]}
    made = plan(size, size * ranks.size, optimizer=parts.optimizer, **how)
    accumulator = Accumulator(
        parts.model, parts.optimizer, made, objective=parts.objective, precision=parts.precision.name,
        device=parts.device.torch_device, ranks=ranks, **settings,
    )  # fmt: skip
    accumulator.step_inside(parts.in_backward)
    return accumulator


def _warm(turn: Assembly) -> None:
    """One step of two samples, so that the optimizer has its state; a snapshot around it takes that back."""
    hold_still(turn.optimizer)
    accumulator = _accumulator(turn, 2, batch_norm="keep")
    accumulator.rehearses = True
    try:
        with turn.running(alone=True):
            batch = turn.source.trial(2)
            accumulator.open([batch])
            accumulator.run([batch])
            accumulator.finish()
    finally:
        accumulator.discard()
        accumulator.close()
