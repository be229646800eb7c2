"""What a probe has found, as its report: figures, and in words what a person should know beside them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from autoaccum.memory.forecast import Forecast
from autoaccum.memory.resident import resident_parts
from autoaccum.model.optimizer import trained_parameters
from autoaccum.model.shards import local
from autoaccum.planning.bisection import largest
from autoaccum.probing.cache import Forecaster, Lines
from autoaccum.probing.find_size import SAME_PEAK, THIRD_TRACE, Answer
from autoaccum.probing.outcome import Trial
from autoaccum.probing.report import ProbeReport
from autoaccum.probing.trial import Bench
from autoaccum.units import format_bytes

__all__ = ["nothing_fits", "report_of", "restored", "stored", "with_expandable_segments"]

# A setting of the allocator is named where so many times as much would fit: less is not worth another run.
WORTH_TELLING = 1.02

FROM_CACHE = "the forecast is from an earlier run of the same training; a small step and the answer were run again"


def stored(report: ProbeReport) -> dict[str, Any]:
    """A report and its forecast as plain values, of which `restored` makes it again."""
    lines = report.forecaster
    if isinstance(lines, Forecast):
        lines = Lines.of(lines, report.trials)
    return {"report": report.to_dict(), "lines": None if lines is None else asdict(lines)}


def restored(values: Mapping[str, Any]) -> ProbeReport:
    """The report that `stored` took apart."""
    return ProbeReport.from_dict(values["report"], values["lines"] and Lines.from_dict(values["lines"]))


def report_of(bench: Bench, answer: Answer) -> ProbeReport:
    """What a report says of an answer, and beside it what a person should know."""
    forecast = answer.forecast
    residual = None if forecast is None else forecast.residual
    notes = [*(_on_lengths(bench) if answer.by_length else (bench.source.varies, bench.source.mixed)), *bench.notes]
    if isinstance(forecast, Lines):
        notes.append(FROM_CACHE)
    if forecast is None:
        traced = sum(trial.kind == "trace" and trial.fits for trial in bench.trials)
        why = "whose allocations line up" if traced > 1 else "that are allowed and would surely fit"
        notes.append(f"there is no forecast, which needs two sizes {why}: what fits was found by running it")
    elif not answer.by_length:
        residual, missed = _missed(forecast, bench.trials, answer.micro_batch)
        notes.append(missed)
        if isinstance(forecast, Forecast):
            notes += _on_allocator(forecast, answer, bench.allowance.bytes)
    return ProbeReport(
        micro_batch=answer.micro_batch,
        limit=answer.limit,
        limit_proof=answer.proof,
        budget_bytes=bench.allowance.bytes,
        budget_reason=bench.allowance.reason,
        device=bench.device.name,
        trials=tuple(bench.trials),
        residual=residual,
        parts=_parts(bench, answer.micro_batch, forecast),
        notes=tuple(note for note in notes if note),
        floor=bench.floor,
        device_type=bench.device.type,
        by_length=answer.by_length,
        forecaster=forecast,
    )


def _on_lengths(bench: Bench) -> Iterator[str]:
    lengths = bench.source.lengths()
    yield (
        f"samples differ in length, from {lengths[0]} to {lengths[-1]} of those looked at: the forecast is over lengths"
        ", sizes are those of the longest, and each window is cut by the lengths in it"
    )
    if bench.allowance.suffers and not bench.allowance.caches:
        yield (
            "libraries keep kernels for each shape they meet, which takes memory that PyTorch does not count: "
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY=64 in the environment bounds it"
        )


def _missed(forecast: Forecaster, trials: Sequence[Trial], micro_batch: int) -> tuple[float | None, str | None]:
    """(the forecast's residual, or by how much it missed a step where that is clearly more; what to say of either)."""
    residual, wrong = forecast.residual, "sizes that were not run may take more or less than is told"

    def off(trial: Trial) -> float:
        return abs(forecast.peak(trial.batch, trial.length) / (trial.peak_bytes or 1) - 1.0)

    # Of traces those near the answer count: what kernels do at a few samples says nothing of it.
    near = (trial for trial in trials if trial.kind != "trace" or THIRD_TRACE * trial.batch >= micro_batch)
    farthest = max((trial for trial in near if trial.peak_bytes), key=off, default=None)
    if farthest is not None and off(farthest) > max(SAME_PEAK, 2 * (residual or 0.0)):
        return off(farthest), (
            f"a step at {farthest.batch} took {format_bytes(farthest.peak_bytes or 0)}, where "
            f"{format_bytes(forecast.peak(farthest.batch, farthest.length))} were forecast: kernels change with the "
            f"size, so that {wrong}"
        )
    if residual is not None and residual > SAME_PEAK:
        return residual, (
            f"the forecast was {residual:.1%} off at a further trace: memory follows no sum of lines in the number "
            f"of samples, or differs from step to step, so that {wrong}"
        )
    return residual, None


def _on_allocator(forecast: Forecast, answer: Answer, budget: int) -> Iterator[str | None]:
    if forecast.reserve is not None:
        yield (
            f"the allocator is set up with {forecast.unsupported}, which is not simulated: it is taken to reserve "
            f"{forecast.reserve:.3f} times what is asked for, as it did at the largest step traced"
        )
    yield with_expandable_segments(forecast, answer, budget)
    if forecast.unaligned > 0.001:
        yield f"{forecast.unaligned:.1%} of a step's allocations did not line up between the traces"


def _parts(bench: Bench, size: int, forecast: Forecaster | None) -> dict[str, int]:
    """Bytes of parameters, buffers, gradients and optimizer state, and what one more sample costs at `size`."""
    held = bench.resident[max(bench.resident)]
    parts = {name: held.get(name, 0) for name in ("parameters", "buffers", "gradients", "optimizer_state")}
    parts["gradients"] += bench.gradients.bytes
    if held.get("other"):
        parts["other"] = held["other"]
    peaks = sorted((trial.batch, trial.peak_bytes) for trial in bench.trials if trial.peak_bytes is not None)
    if forecast is not None:
        parts["per_sample"] = forecast.peak(size + 1) - forecast.peak(size)
    elif len(peaks) > 1:
        (a, at_a), (b, at_b) = peaks[-2:]
        parts["per_sample"] = (at_b - at_a) // max(b - a, 1)
    return parts


def with_expandable_segments(forecast: Forecast, answer: Answer, budget: int) -> str | None:
    """What would fit in `budget` bytes if the allocator's segments grew in place; None where that is hardly more.

    Both figures are simulated, without a retry: torch's allocator finds no room in fixed segments for a block that is
    larger than each free one, though together they hold it.
    """
    if not forecast.simulated or forecast.expandable or answer.limit is None or answer.proof != "forecast":
        return None
    more = largest(lambda size: forecast.within(size, budget, expandable=True), 2 * answer.limit)
    if more < answer.limit * WORTH_TELLING:
        return None
    return (
        f"PYTORCH_ALLOC_CONF=expandable_segments:True in the environment would let {more} samples fit, by simulation, "
        f"where {answer.limit} do now (older torch calls the variable PYTORCH_CUDA_ALLOC_CONF); probe again then"
    )


def nothing_fits(bench: Bench) -> str:
    """Why not even the smallest micro-batch fits: what fills the device, and what would help."""
    accumulator, floor, budget = bench.accumulator, bench.floor, bench.allowance.given
    model = accumulator.model
    parts = resident_parts(model, accumulator.optimizers)
    parts["gradients"] = sum(local(p).numel() * p.element_size() for p in trained_parameters(model))
    other = (bench.device.allocated() or 0) - bench.allowance.held()
    if other > 0:
        parts["libraries' workspaces and other tensors"] = other
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
    return (
        f"not even {samples} fits in {format_bytes(budget.bytes)} on {bench.device.name} ({budget.reason}): {needs}; "
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
