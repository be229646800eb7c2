"""The probe on a real model: snapshot, floor, trials, report; everything put back."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from autoaccum.batch_norm.pooled_statistics import needs_two
from autoaccum.data import tree
from autoaccum.data.source import Source
from autoaccum.errors import NothingFitsError, PlanError
from autoaccum.interrupts import interruptible
from autoaccum.loss.objective import Objective
from autoaccum.memory.budget import Budget, Device
from autoaccum.memory.forecast import Forecast, ForecastFailed
from autoaccum.memory.resident import resident_bytes
from autoaccum.memory.watch import ProcessGrowth
from autoaccum.model.given_model import TrainingMode, has_batch_norm
from autoaccum.model.precision import Precision
from autoaccum.model.shards import reset_all
from autoaccum.model.snapshot import Snapshot
from autoaccum.planning.split import usable_size
from autoaccum.probing.allowance import Allowance
from autoaccum.probing.answered import nothing_fits, report_of
from autoaccum.probing.cache import Forecaster, Lines, keep_lines, read_lines
from autoaccum.probing.fastest import Race
from autoaccum.probing.find_size import Answer, Search
from autoaccum.probing.journal import Journal
from autoaccum.probing.length_search import LengthSearch
from autoaccum.probing.lockstep import find_together
from autoaccum.probing.outcome import Trial
from autoaccum.probing.report import ProbeReport
from autoaccum.probing.trial import Bench
from autoaccum.ranks import here
from autoaccum.units import format_bytes
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.two_passes import LossOutOfMemoryError

__all__ = ["Question", "run_probe", "smallest_micro_batch"]

# Memory that others may take and give back is read again at the end; by so much it moves on any machine.
UNSTEADY = 0.05
MOST_LOOKS = 3
# A kill costs a process: a size that lives is not improved on by less than this.
NOT_WORTH_A_KILL = 1.04


@dataclass(frozen=True)
class Question:
    """What the probe is asked.

    Attributes:
        share: samples of one optimizer step on this rank; None: the largest micro-batch is looked for.
        memory: the budget as the user wrote it; None: what is free.
        max_batch, multiple_of, prefer: as in `prepare`.
        savers, under: memory savers that prefer="fastest" may take, cheapest first; the model runs under one inside.
        window: samples of one optimizer step over all ranks, where a target says how many.
        runs: False: of a sharded model, the answer is forecast only.
    """

    share: int | None = None
    memory: int | str | None = None
    max_batch: int | None = None
    multiple_of: int = 1
    prefer: str = "fewest"
    savers: tuple[str, ...] = ()
    under: Callable[[str | None], AbstractContextManager[Any]] = nullcontext
    window: int | None = None
    runs: bool = True


def run_probe(
    accumulator: Accumulator,
    source: Source,
    device: Device,
    question: Question,
    *,
    journal: Journal,
    cache: str | None,
    listener: Callable[[Trial], None],
) -> ProbeReport:
    """Finds the micro-batch, leaving no trace on model, optimizer, data and random generators.

    Args:
        accumulator: one of the probe's own, on a single rank: nobody else may be waited for in a trial. But where its
            model is sharded on all of them, which then meet in each trial.
        source, device, question: real samples, where they run, and what is asked.
        journal: where trials are written down before they start; what becomes of it is the caller's to say.
        cache: the key under which the forecast of an earlier run may lie, and this one's will; None: none does.
        listener: told of each trial as it ends.

    Raises:
        NothingFitsError: the smallest micro-batch does not fit; says what fills the device and what would help.
        PlanError: `max_batch` is smaller than the smallest micro-batch.
        StateNotRestoredError: something could not be put back.
    """
    model, objective = accumulator.model, accumulator.objective
    held = partial(resident_bytes, model, accumulator.optimizers)
    budget = device.budget(question.memory, held=held())
    growth = ProcessGrowth(budget.kind)  # at once: what the process takes from here on is taken of the budget
    snapshot = interruptible(Snapshot, model, accumulator.optimizer, *objective.owners, device=device.torch_device)
    with device.limit(budget), snapshot:
        snapshot.set_gradients_aside()  # a window begins without
        try:
            TrainingMode(model).on()
            if accumulator.sharded is not None:
                accumulator.sharded.collectives.apart = True  # what gloo allocates is none of the step's
            floor = smallest_micro_batch(objective, source, device.torch_device, accumulator.precision)
            if question.max_batch is not None and question.max_batch < floor:
                raise PlanError(
                    f"max_batch={question.max_batch} is less than the {floor} samples that a micro-batch of this model "
                    f"needs, since BatchNorm needs two values a channel: give max_batch={floor} or more, or a layer "
                    "without that minimum (GroupNorm for BatchNorm)"
                )
            # A loss that compares samples is computed over the whole window's, whatever micro-batch is tried.
            accumulator.rehearsed_samples = (question.share or 0) * here().size
            allowance = Allowance(_less_the_window(budget, source, device, question), device, growth, held)
            bench = Bench(accumulator, source, device, allowance, floor=floor, share=question.share, journal=journal,
                          listener=listener)  # fmt: skip
            try:
                report = _steady(bench, question, cache)
            except LossOutOfMemoryError:  # which says what would help itself: no smaller micro-batch does
                raise
            except NothingFitsError as error:
                raise NothingFitsError(nothing_fits(bench)) from error
        finally:
            accumulator.close()
            accumulator.discard()
    device.release(young=not report.out_of_memory_count)
    if budget.beyond is None:
        return report
    beyond = (
        f"memory= asks for {format_bytes(budget.beyond)}, and no step was run here that needs more than "
        f"{format_bytes(report.budget_bytes)}: forecast(n) tells what n samples take on a larger device, and --for on "
        "the command line how many fit there"
    )
    return replace(report, notes=(*report.notes, beyond))


def smallest_micro_batch(objective: Objective, source: Source, device: torch.device, precision: Precision) -> int:
    """1, or 2 where a BatchNorm sees one value a channel in a single sample, which is then tried.

    The caller puts the model into training mode, and back to how it was.
    """
    if not has_batch_norm(objective.model):
        return 1
    batch = tree.move(source.trial(1), device)
    try:
        # With gradients on: a model may ask for some inside its forward, as force fields do.
        with precision.autocast():
            interruptible(objective.forward, batch)
    except (ValueError, RuntimeError, torch.jit.Error) as error:  # a compiled model wraps the layer's ValueError
        if not needs_two(error):
            raise
        reset_all([objective.model])
        return 2
    return 1


def _less_the_window(budget: Budget, source: Source, device: Device, question: Question) -> Budget:
    """What is left on the CPU where all samples of a step wait, in the very memory that its micro-batches take."""
    if device.type != "cpu" or budget.kind == "torch" or question.share is None:
        return budget
    share = min(question.share, source.length or question.share)
    waiting = share * tree.nbytes(source.trial(1))
    return budget.without(waiting, f" for the {share} samples of a step (target_batch), which wait there")


def _steady(bench: Bench, question: Question, cache: str | None) -> ProbeReport:
    """Looks; and once more where others took so much memory meanwhile that the answer does not fit in what is left."""
    report = _look(bench, question, cache)
    device, allowance = bench.device, bench.allowance
    shared = not allowance.given.hard and allowance.given.kind != "data segment"  # with others, who may take of it
    for _ in range(MOST_LOOKS - 1 if shared and bench.ranks is None else 0):
        left = device.budget(question.memory, held=allowance.held())
        left = _less_the_window(left, bench.source, device, question)
        took = max((t.counted_bytes or 0 for t in bench.trials if t.batch == report.micro_batch), default=0)
        if took <= left.bytes * (1.0 + UNSTEADY):
            break
        taken = (
            f"others took memory while the probe ran: {format_bytes(allowance.given.bytes)} were free at its start, "
            f"and {format_bytes(left.bytes)} when its answer was looked at again"
        )
        allowance.given = left
        report = _look(bench, question, cache)
        report = replace(report, notes=(*report.notes, taken))
    return report


def _look(bench: Bench, question: Question, cache: str | None) -> ProbeReport:
    """Over lengths where samples differ in it, else the size that fits for the largest of the samples looked at."""
    known = None if cache is None else read_lines(cache)
    by_length = known is not None and known.longest is not None
    answer = _over_lengths(bench, question, known if by_length else None)
    if answer is None:
        report = _of_the_largest(bench, question, None if by_length else known)
    else:
        report = report_of(bench, answer)
        if question.prefer == "fastest":
            aside = 'prefer="fastest" is set aside, since sizes follow from the lengths in each window'
            report = replace(report, notes=(*report.notes, aside))
    if cache is not None and report.ladder is None and isinstance(report.forecaster, Forecast):
        keep_lines(cache, Lines.of(report.forecaster, report.trials))
    return report


def _over_lengths(bench: Bench, question: Question, known: Lines | None) -> Answer | None:
    """What fits at every length, where samples differ in length and a target says how many are wanted at once."""
    if question.share is None or bench.ranks is not None:
        return None
    lengths = bench.source.lengths()
    most = min(question.share, question.max_batch or question.share)
    if len(lengths) < 3 or most < bench.floor:
        return None
    try:
        return LengthSearch(bench, lengths, most).run(known)
    except ForecastFailed:  # an allocator that is not simulated
        return None


def _of_the_largest(bench: Bench, question: Question, known: Lines | None) -> ProbeReport:
    share = question.share if bench.ranks is None else question.window  # ranks' shares may be unequal
    ceiling, reach = _ceilings(share, question.max_batch, bench.source.length, bench.floor)
    if bench.ranks is not None:
        return find_together(bench, ceiling, reach, share, runs=question.runs)

    def usable(limit: int) -> int:
        return usable_size(share or 0, limit, minimum=bench.floor, multiple_of=question.multiple_of)

    notes: tuple[str, ...] = ()
    killed, wanted = bench.journal.least_killed(), None if share is None else usable
    if ceiling < killed:
        answer = Search(bench, ceiling, wanted=wanted, reach=reach, known=known).run()
    else:
        answer = _below(killed, bench, wanted, known)
        notes = (f"a step at {killed} samples killed its process more than once: no size from there on was run again",)
    if question.prefer == "fastest":
        report = Race(bench, answer, question.savers, question.under, share=share, reach=reach,
                      multiple_of=question.multiple_of).report()  # fmt: skip
    else:
        report = report_of(bench, answer)
    return replace(report, notes=(*report.notes, *notes))


def _ceilings(share: int | None, most: int | None, length: int | None, floor: int) -> tuple[int, int]:
    """(the most samples that may be run at once, how far the limit is looked for by forecast)."""
    if length is not None and share is not None:
        share = min(share, max(length, floor))
    ceiling = share or length or 65536
    if most is not None:
        ceiling = min(ceiling, most)
    return max(ceiling, floor), most or max(ceiling, length or 0, 4096)


def _below(killed: int, bench: Bench, wanted: Callable[[int], int] | None, known: Forecaster | None) -> Answer:
    """The answer where `killed` samples killed their process: by bisection from what lived, since no forecast tells.

    A kill in here costs the process, and the next one goes on from what the journal has.
    """
    takes = wanted or (lambda limit: limit)
    lived = bench.journal.lived(killed)

    def near() -> bool:
        return takes(killed - 1) <= lived or killed - 1 <= NOT_WORTH_A_KILL * lived

    while True:
        # Halfway, or the next that would be taken.
        wide = range((lived + killed) // 2, killed)
        ceiling = max(lived if near() else next(size for size in wide if takes(size) > lived), bench.floor)
        answer = Search(bench, ceiling, wanted=wanted, known=known).run()
        if answer.limit is None or answer.limit < ceiling:
            return answer  # memory runs out before the kill
        lived, known = max(ceiling, lived), answer.forecast
        if near():
            is_next = lived + 1 == killed
            return replace(answer, limit=lived if is_next else None, proof="out of memory" if is_next else None)
