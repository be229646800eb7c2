"""The probe on a real model: snapshot, floor, trials, report; everything put back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from autoaccum.data import tree
from autoaccum.data.source import Source
from autoaccum.errors import NothingFitsError, PlanError
from autoaccum.interrupts import interruptible
from autoaccum.loss.objective import Objective
from autoaccum.memory.device import Budget, Device
from autoaccum.memory.forecast import Forecast, ForecastFailed
from autoaccum.memory.resident import resident_bytes, resident_parts
from autoaccum.memory.watch import ProcessGrowth
from autoaccum.model.modes import TrainingMode
from autoaccum.model.optimizer import trained_parameters
from autoaccum.model.shards import local
from autoaccum.model.snapshot import Snapshot
from autoaccum.planning.split import can_split, largest_size
from autoaccum.probing.cache import Cache, Lines, envelope
from autoaccum.probing.fastest import Alternatives, race
from autoaccum.probing.find_size import SAME_PEAK, THIRD_TRACE, Answer, find
from autoaccum.probing.floor import smallest_micro_batch
from autoaccum.probing.journal import Journal
from autoaccum.probing.length_search import LengthAnswer, OverLengths, find_by_length
from autoaccum.probing.lockstep import find_together
from autoaccum.probing.outcome import Trial
from autoaccum.probing.report import ProbeReport
from autoaccum.probing.trial import Bench, Counted
from autoaccum.ranks import here
from autoaccum.units import format_bytes
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.two_passes import LossOutOfMemoryError

__all__ = ["Question", "as_lines", "run_probe"]

# Memory that others may take and give back is read again at the end; by so much it moves on any machine.
UNSTEADY = 0.05
MOST_LOOKS = 3
# A setting of the allocator is named where so many times as much would fit: less is not worth another run.
WORTH_TELLING = 1.02

FROM_CACHE = "the forecast is from an earlier run of the same training; a small step and the answer were run again"


@dataclass(frozen=True)
class Question:
    """What the probe is asked.

    Attributes:
        share: samples of one optimizer step on this rank; None: the largest micro-batch is looked for.
        memory: the budget as the user wrote it; None: what is free.
        max_batch: no larger micro-batch is tried.
        multiple_of: preferred multiples, as in the plan.
        prefer: "fewest" micro-batches, or "fastest" by measured throughput.
        alternatives: memory savers that prefer="fastest" may take.
        window: samples of one optimizer step over all ranks, where a target says how many.
        runs: False: of a sharded model, the answer is forecast only.
    """

    share: int | None = None
    memory: int | str | None = None
    max_batch: int | None = None
    multiple_of: int = 1
    prefer: str = "fewest"
    alternatives: Alternatives = Alternatives()  # noqa: RUF009 - immutable
    window: int | None = None
    runs: bool = True


def run_probe(
    accumulator: Accumulator,
    objective: Objective,
    source: Source,
    device: Device,
    question: Question,
    *,
    journal: Journal | None = None,
    cache: Cache | None = None,
    listener: Callable[[Trial], None] | None = None,
) -> ProbeReport:
    """Finds the micro-batch, leaving no trace on model, optimizer, data and random generators.

    Args:
        accumulator: one of the probe's own, on a single rank: nobody else may be waited for in a trial. But where its
            model is sharded on all of them, which then meet in each trial.
        objective: gives the loss of a batch.
        source: gives real samples.
        device: where it runs.
        question: what is asked.
        journal: where trials are written down before they start; what becomes of it is the caller's to say.
        cache: where the forecast of an earlier run may lie, and this one's will.
        listener: told of each trial as it ends.

    Raises:
        NothingFitsError: the smallest micro-batch does not fit; says what fills the device and what would help.
        PlanError: `max_batch` is smaller than the smallest micro-batch.
        StateNotRestoredError: something could not be put back.
    """
    model, optimizer = accumulator.model, accumulator.optimizer
    held = resident_bytes(model, accumulator.optimizers)
    budget = device.budget(question.memory, held=held, headroom=device.headroom())
    growth = ProcessGrowth(budget.kind)
    others = [other for other in (objective.loss, objective.step) if other is not None]
    snapshot = interruptible(Snapshot, model, optimizer, *others, device=device.torch_device)
    with device.limit(budget), snapshot:
        snapshot.set_gradients_aside()
        try:
            TrainingMode(model).on()
            if accumulator.sharded is not None:
                accumulator.sharded.collectives.apart = True
            floor = smallest_micro_batch(objective, source, device.torch_device, accumulator.precision)
            if question.max_batch is not None and question.max_batch < floor:
                raise PlanError(
                    f"max_batch={question.max_batch} is less than the {floor} samples that a micro-batch of this model "
                    f"needs, since BatchNorm needs two values a channel: give max_batch={floor} or more, or the model "
                    "a layer without that minimum (GroupNorm for BatchNorm)"
                )
            budget = _less_the_window(budget, source, device, question)
            journal = journal or Journal(None, "")
            accumulator.rehearsed_samples = (question.share or 0) * here().size
            bench = Bench(accumulator, source, device, budget, journal, listener, growth, question.share)
            try:
                report = _look(bench, source, device, question, floor, cache, journal)
                for _ in range(MOST_LOOKS - 1 if accumulator.sharded is None else 0):
                    left = _less_by_now(bench, report, source, device, question)
                    if left is None:
                        break
                    budget, before = left, bench.lower(left)
                    report = _look(bench, source, device, question, floor, cache, journal)
                    report = replace(report, notes=(*report.notes, _taken(before, left)))
            except LossOutOfMemoryError:
                raise
            except NothingFitsError as error:
                raise _nothing_fits(bench, accumulator, device, budget, floor) from error
        finally:
            accumulator.close()
            accumulator.discard()
    device.release(young=not report.out_of_memory_count)
    if budget.beyond is None:
        return report
    return replace(report, notes=(*report.notes, _beyond(budget.beyond, report.budget_bytes)))


def _look(
    bench: Bench, source: Source, device: Device, question: Question, floor: int, cache: Cache | None, journal: Journal
) -> ProbeReport:
    known = cache.read() if cache is not None else None
    by_length = known is not None and known.longest is not None
    over_lengths = _over_lengths(bench, source, question, floor, known if by_length else None)
    if over_lengths is not None:
        report = _report_over_lengths(bench, over_lengths, device, floor, source, question)
    else:
        report = _of_the_largest(bench, source, device, question, floor, None if by_length else known, journal)
    if cache is not None and report.ladder is None and isinstance(report.forecaster, (Forecast, OverLengths)):
        cache.write(as_lines(report.forecaster, report.trials))
    return report


def _less_the_window(budget: Budget, source: Source, device: Device, question: Question) -> Budget:
    """What is left on the CPU where all samples of a step wait, in the very memory that its micro-batches take."""
    if device.type != "cpu" or budget.kind == "torch" or question.share is None:
        return budget
    share = min(question.share, source.length or question.share)
    waiting = share * tree.nbytes(source.trial(1))
    what = f"{format_bytes(waiting)} less for the {share} samples of a step (target_batch), which wait there"
    return replace(budget, bytes=max(0, budget.bytes - waiting), reason=f"{budget.reason}; {what}")


def _less_by_now(
    bench: Bench, report: ProbeReport, source: Source, device: Device, question: Question
) -> Budget | None:
    """The budget as it is now, where others took so much meanwhile that the answer no longer fits in it."""
    if not bench.shared:
        return None
    now = device.budget(question.memory, held=bench.held(), headroom=device.headroom())
    now = _less_the_window(now, source, device, question)
    return None if bench.measured(report.micro_batch) <= now.bytes * (1.0 + UNSTEADY) else now


def _beyond(asked: int, had: int) -> str:
    return (
        f"memory= asks for {format_bytes(asked)}, and no step was run here that needs more than {format_bytes(had)}: "
        "forecast(n) tells what n samples take on a larger device, and --for on the command line how many fit there"
    )


def _taken(before: Budget, now: Budget) -> str:
    return (
        f"others took memory while the probe ran: {format_bytes(before.bytes)} were free at its start, and "
        f"{format_bytes(now.bytes)} when its answer was looked at again"
    )


def _of_the_largest(
    bench: Bench, source: Source, device: Device, question: Question, floor: int, known: Lines | None, journal: Journal
) -> ProbeReport:
    """The size that fits for samples that are alike, or for the largest of those looked at."""
    asked = question if bench.ranks is None else replace(question, share=question.window)  # shares may be unequal
    ceiling, reach = _ceilings(asked, source, floor)
    killed, wanted, notes = journal.least_killed(), _wanted(question, floor), []
    if ceiling >= killed:  # where below it a size would live is not told by a kill: each costs a process
        ceiling = reach = max(floor, killed // 2)
        notes = [f"a step at {killed} samples killed its process more than once: none above {ceiling} was run again"]
    if bench.ranks is not None:
        found = find_together(bench, bench.ranks, floor, ceiling, reach, question.window, question.runs)
        report = replace(_report(found.bench, found.answer, device, floor, source), gradient_sync=found.sync)
        return report if found.bench is bench else replace(report, trials=(*bench.trials, *report.trials))
    answer = find(bench, floor=floor, ceiling=ceiling, wanted=wanted, reach=reach, known=known)
    if question.prefer == "fastest":
        raced = race(bench, answer, question.alternatives, share=question.share, floor=floor, reach=reach,
                     multiple_of=question.multiple_of)  # fmt: skip
        report = _report(raced.bench, raced.answer, device, floor, source)
        report = replace(report, throughput=raced.throughput, savers=raced.table, ladder=raced.pair.saver)
    else:
        report = _report(bench, answer, device, floor, source)
    return replace(report, notes=(*report.notes, *notes))


def _over_lengths(
    bench: Bench, source: Source, question: Question, floor: int, known: Lines | None
) -> LengthAnswer | None:
    """What fits at every length, where samples differ in length and a target says how many are wanted at once."""
    if question.share is None or bench.ranks is not None:
        return None
    lengths = source.lengths()
    most = min(question.share, question.max_batch or question.share)
    if len(lengths) < 3 or most < floor:
        return None
    try:
        return find_by_length(bench, lengths, floor=floor, most=most, known=known)
    except ForecastFailed:  # an allocator that is not simulated
        return None


def _report_over_lengths(
    bench: Bench, answer: LengthAnswer, device: Device, floor: int, source: Source, question: Question
) -> ProbeReport:
    forecaster: OverLengths | Lines
    lengths = source.lengths()
    if isinstance(answer.forecast, Lines):
        forecaster = replace(answer.forecast, longest=answer.longest)
    else:
        assert isinstance(answer.forecast, Counted)
        forecaster = OverLengths(answer.forecast.whole, answer.longest, answer.residual)
    notes = [
        f"samples differ in length, from {lengths[0]} to {lengths[-1]} of those looked at: the forecast is over lengths"
        ", sizes are those of the longest, and each window is cut by the lengths in it"
    ]
    if isinstance(forecaster, Lines):
        notes.append(FROM_CACHE)
    notes += bench.notes
    if bench.suffers and not bench.caches:
        notes.append(
            "libraries keep kernels for each shape they meet, which takes memory that PyTorch does not count: "
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY=64 in the environment bounds it"
        )
    if question.prefer == "fastest":
        notes.append('prefer="fastest" is set aside, since sizes follow from the lengths in each window')
    return ProbeReport(
        micro_batch=answer.micro_batch,
        limit=answer.micro_batch,
        limit_proof="cap" if answer.micro_batch in (question.share, question.max_batch) else "forecast",
        budget_bytes=bench.budget,
        budget_reason=bench.budget_reason,
        device=device.name,
        trials=tuple(bench.trials),
        residual=answer.residual,
        parts=bench.parts(answer.micro_batch, forecaster),
        notes=tuple(notes),
        floor=floor,
        device_type=device.type,
        by_length=answer.room,
        forecaster=forecaster,
    )


def _ceilings(question: Question, source: Source, floor: int) -> tuple[int, int]:
    """(the most samples that may be run at once, how far the limit is looked for by forecast)."""
    most = question.max_batch if question.max_batch is not None else None
    share = question.share
    if source.length is not None and share is not None:
        share = min(share, max(source.length, floor))
    ceiling = share if share is not None else source.length if source.length is not None else 65536
    if most is not None:
        ceiling = min(ceiling, most)
    reach = most if most is not None else max(ceiling, source.length or 0, 4096)
    return max(ceiling, floor), reach


def _wanted(question: Question, floor: int) -> Callable[[int], int] | None:
    share = question.share
    if share is None:
        return None

    def micro_batch(limit: int) -> int:
        if limit < floor or not can_split(share, limit, floor):
            return min(limit, share)  # the plan will say which targets can be cut
        return largest_size(share, limit, minimum=floor, multiple_of=question.multiple_of)

    return micro_batch


def _report(bench: Bench, answer: Answer, device: Device, floor: int, source: Source) -> ProbeReport:
    notes = [source.varies] if source.varies else []
    notes += [source.mixed] if source.mixed else []
    notes += bench.notes
    forecaster: Forecast | Lines | None
    if isinstance(answer.forecast, Lines):
        forecaster = answer.forecast
        notes.append(FROM_CACHE)
    else:
        forecaster = answer.forecast.whole if isinstance(answer.forecast, Counted) else None
    residual = None if forecaster is None else forecaster.residual
    if forecaster is None:
        notes.append(_without_forecast(bench.trials, answer))
    else:
        off = _farthest(forecaster, bench.trials, answer.micro_batch)
        wrong = "sizes that were not run may take more or less than is told"
        if off is not None and off[0] > max(SAME_PEAK, 2 * (residual or 0.0)):
            residual, trial = off
            notes.append(
                f"a step at {trial.batch} took {format_bytes(trial.peak_bytes or 0)}, where "
                f"{format_bytes(forecaster.peak(trial.batch, trial.length))} were forecast: kernels change with the "
                f"size, so that {wrong}"
            )
        elif residual is not None and residual > SAME_PEAK:
            notes.append(
                f"the forecast was {residual:.1%} off at a further trace: memory follows no sum of lines in the number "
                f"of samples, or differs from step to step, so that {wrong}"
            )
    if isinstance(forecaster, Forecast) and forecaster.reserve is not None:
        notes.append(
            f"the allocator is set up with {forecaster.unsupported}, which is not simulated: it is taken to reserve "
            f"{forecaster.reserve:.3f} times what is asked for, as it did at the largest step traced"
        )
    if isinstance(forecaster, Forecast) and (hint := with_expandable_segments(forecaster, answer, bench.budget)):
        notes.append(hint)
    if isinstance(forecaster, Forecast) and forecaster.unaligned > 0.001:
        notes.append(f"{forecaster.unaligned:.1%} of a step's allocations did not line up between the traces")
    return ProbeReport(
        micro_batch=answer.micro_batch,
        limit=answer.limit,
        limit_proof=answer.proof,
        budget_bytes=bench.budget,
        budget_reason=bench.budget_reason,
        device=device.name,
        trials=tuple(bench.trials),
        residual=residual,
        parts=bench.parts(answer.micro_batch, forecaster),
        notes=tuple(notes),
        floor=floor,
        device_type=device.type,
        forecaster=forecaster,
    )


def with_expandable_segments(forecast: Forecast, answer: Answer, budget: int) -> str | None:
    """What would fit in `budget` bytes if the allocator's segments grew in place; None where that is hardly more.

    Both figures are simulated, without a retry: torch's allocator finds no room in fixed segments for a block that is
    larger than each free one, though together they hold it.
    """
    if not forecast.simulated or forecast.expandable or answer.limit is None or answer.proof != "forecast":
        return None
    more = forecast.largest(budget, 2 * answer.limit, reserved=True, expandable=True)
    if more < answer.limit * WORTH_TELLING:
        return None
    return (
        f"PYTORCH_ALLOC_CONF=expandable_segments:True in the environment would let {more} samples fit, by simulation, "
        f"where {answer.limit} do now (older torch calls the variable PYTORCH_CUDA_ALLOC_CONF); probe again then"
    )


def _without_forecast(trials: Sequence[Trial], answer: Answer) -> str:
    traced = [trial.batch for trial in trials if trial.kind == "trace" and trial.fits]
    if len(traced) > 1:
        return "the traces did not line up, so sizes were searched for by running them"
    if answer.proof == "cap" and traced == [answer.limit]:
        return f"there is no forecast, which needs two sizes: nothing but {answer.limit} at once was allowed"
    return "no second trace would surely have fitted, so sizes were searched for by running them"


def _farthest(forecaster: Forecast | Lines, trials: Sequence[Trial], micro_batch: int) -> tuple[float, Trial] | None:
    """The step that the forecast missed by most, with the relative error; None where none was measured.

    Of traces those near the answer count: what kernels do at a few samples says nothing of it.
    """
    off = [
        (abs(forecaster.peak(trial.batch, trial.length) / trial.peak_bytes - 1.0), trial)
        for trial in trials
        if trial.peak_bytes and (trial.kind != "trace" or THIRD_TRACE * trial.batch >= micro_batch)
    ]
    return max(off, key=lambda pair: pair[0], default=None)


def as_lines(forecast: Forecast | OverLengths, trials: Sequence[Trial]) -> Lines:
    """The forecast as a few functions, and what the allocator reserved above it at the largest step measured."""
    whole, longest = (forecast.whole, forecast.longest) if isinstance(forecast, OverLengths) else (forecast, None)
    ran = [trial for trial in trials if trial.reserved_bytes is not None and trial.peak_bytes]
    largest = max(ran, key=lambda trial: trial.peak_bytes or 0, default=None)
    reserve = 1.0 if largest is None else (largest.reserved_bytes or 0) / (largest.peak_bytes or 1)
    return Lines(envelope(whole.lines()), forecast.residual, reserve, longest)


def _nothing_fits(
    bench: Bench, accumulator: Accumulator, device: Device, budget: Budget, floor: int
) -> NothingFitsError:
    model = accumulator.model
    parts = resident_parts(model, accumulator.optimizers)
    parts["gradients"] = sum(local(p).numel() * p.element_size() for p in trained_parameters(model))
    if bench.other():
        parts["libraries' workspaces and other tensors"] = bench.other()
    needs = ", ".join(
        f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in parts.items() if name != "batch"
    )
    samples = (
        "one sample" if floor == 1 else f"a micro-batch of {floor} (BatchNorm needs more than one value a channel)"
    )
    peaks = [trial.peak_bytes for trial in bench.trials if trial.batch == floor and trial.peak_bytes is not None]
    more = "a larger memory=" if budget.beyond is None else "more memory that is free"
    measured = f"; its step was measured at {format_bytes(max(peaks))}" if peaks else ""
    compared = ""
    if accumulator.compares:
        compared = (
            f". The loss compares all {accumulator.rehearsed_samples} samples of a window at once, and what it takes "
            "for that no micro-batch lowers: a smaller target_batch does"
        )
    return NothingFitsError(
        f"not even {samples} fits in {format_bytes(budget.bytes)} on {device.name} ({budget.reason}): {needs}; "
        f"the rest is what a step needs for its activations{measured}. What would help: {more}, "
        f"an optimizer with less state (SGD), smaller samples{compared}{_not_taken(parts)}"
    )


def _not_taken(parts: Mapping[str, int]) -> str:
    """What changes the result and is left to the user, with what it would free at most."""
    state, trained = parts.get("optimizer_state", 0), parts["gradients"]
    frees = {
        "8-bit optimizer states": state * 3 // 4,  # a byte of four
        "bf16 parameters": (parts.get("parameters", 0) + trained + state) // 2,
        "LoRA": trained + state,
    }
    what = ", ".join(f"{name} (frees up to {format_bytes(size)})" for name, size in frees.items() if size)
    return f". What changes the result, and is never taken: {what}"
