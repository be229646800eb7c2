"""What the probe found out, as plain values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoaccum.checks import check_counts, plain
from autoaccum.display.shown import Drawn
from autoaccum.errors import ProbeError
from autoaccum.planning.plan import Plan
from autoaccum.probing.outcome import KILLED, OUT_OF_MEMORY, OVER_BUDGET, Trial
from autoaccum.units import format_bytes

if TYPE_CHECKING:
    from autoaccum.probing.cache import Forecaster, Lines

__all__ = ["ForecastBytes", "ProbeReport"]


class ForecastBytes(int):
    """A forecast peak in the bytes that a budget counts, to be compared with one.

    `requested` is what tensors take; `reserved`, the number itself, what the allocator takes from the device for them
    (the CPU's keeps nothing).
    """

    requested: int
    reserved: int

    def __new__(cls, requested: int, reserved: int) -> "ForecastBytes":
        """The number is `reserved`."""
        made = super().__new__(cls, reserved)
        made.requested, made.reserved = requested, reserved
        return made


@dataclass(frozen=True)
class ProbeReport(Drawn):
    """The answer of a probe and what it rests on.

    Attributes:
        micro_batch: was run, fits, use it.
        limit: the largest that fits; None when it was not looked for, or is not known.
        limit_proof: "forecast" (limit + 1 is forecast to overrun the budget), "out of memory" (limit + 1 did), "cap"
            (nothing larger was allowed), or None: the largest that was run, and what is between it and the sizes that
            did not fit is not known; or, under a limit on the process, so little is that it was not run.
        budget_bytes: what the training may use.
        budget_reason: where that figure comes from, in one line.
        device: its name.
        device_type: "cpu", "cuda", ...
        trials: in the order they ran.
        residual: relative error of the forecast at the trace that checks it; None without a forecast.
        parts: bytes of parameters, buffers, gradients, optimizer_state, and per_sample (what one more sample costs); on
            a GPU also "other": what else of this process lies there, such as libraries' workspaces.
        notes: what a person should know: shapes that vary, operators that could not be aligned, a cached answer.
        plan: the plan for the target batch; None without a target.
        throughput: (micro-batch, samples per second), where prefer="fastest" measured it.
        floor: the smallest micro-batch the model takes: 2 where BatchNorm sees one value a channel.
        by_length: where samples differ in length: (length, samples), so many fit at once up to that padded length;
            `micro_batch` and `limit` are then of the longest samples looked at.
        ladder: the rung under which this holds, such as "checkpointing"; None where the step ran as it is.
        savers: where prefer="fastest" looked at memory savers, a row for each, the step as it is (None) first: saver,
            limit, micro_batch, peak_bytes (forecast), window_seconds (None: not timed), throughput, same_result; or
            limit None and obstacle, why it was not looked at further.
        gradient_sync: when a sharded model's gradients are summed over the ranks, and why; None where that is no
            question. Once a "window", forecast and limit are of that, and so are the last trials.
        timeline: for drawing, as a probe in a child told it; None where the forecast at hand can tell.
    """

    micro_batch: int
    limit: int | None
    limit_proof: str | None
    budget_bytes: int
    budget_reason: str
    device: str
    trials: tuple[Trial, ...]
    residual: float | None
    parts: dict[str, int]
    notes: tuple[str, ...] = ()
    plan: Plan | None = None
    throughput: tuple[tuple[int, float], ...] = ()
    floor: int = 1
    device_type: str = "cpu"
    by_length: tuple[tuple[int, int], ...] = ()
    ladder: str | None = None
    savers: tuple[dict[str, Any], ...] = ()
    gradient_sync: str | None = None
    timeline: dict[str, Any] | None = field(default=None, repr=False, compare=False)
    forecaster: "Forecaster | None" = field(default=None, repr=False, compare=False)

    _view = "probe_view"

    @property
    def out_of_memory_count(self) -> int:
        """Trials that ran out of memory or were killed for it."""
        return sum(trial.outcome in (OUT_OF_MEMORY, KILLED) for trial in self.trials)

    @property
    def limit_reason(self) -> str:
        """What shows that no more than `limit` fits, in words."""
        more, all_fit = (self.limit or 0) + 1, all(trial.fits for trial in self.trials)
        if self.limit is None:
            return "the target needs no larger size" if all_fit else "it is not known which larger sizes fit"
        if self.limit_proof == "forecast":
            over = (trial for trial in self.trials if (trial.batch, trial.outcome) == (more, OVER_BUDGET))
            took = max((trial.counted_bytes or 0 for trial in over), default=0)
            if took:
                return f"a step at {more} took {format_bytes(took)}"
            forecast = "over the budget" if self.forecaster is None else format_bytes(self.forecaster.reserved(more))
            return f"at {more} the forecast is {forecast}"
        unproved = "larger ones did not fit where the forecast let them"
        if all_fit:
            unproved = "the little more that may fit was not worth a step near the limit"
        return {
            "out of memory": f"{more} ran out of memory",
            "cap": "nothing larger was allowed or looked for; memory has room for more",
            None: f"the largest that was run: {unproved}",
        }[self.limit_proof]

    def forecast(self, batch: int, length: int | None = None) -> ForecastBytes:
        """The peak in bytes at `batch` samples (of `length`, where it was traced over lengths), run or not.

        The number is what a budget counts, on a device what its allocator reserves; `forecast(n).requested` is what the
        tensors take of it.

        Raises:
            ProbeError: the probe had to measure instead: it has no forecast.
            PlanError: a number that is no count.
        """
        check_counts(batch=batch or None, length=length)
        if self.forecaster is None:
            raise ProbeError(
                "this report has no forecast: sizes were run until one did not fit, or the answer came from the cache "
                "(cache=False probes anew)"
            )
        return ForecastBytes(self.forecaster.peak(batch, length), self.forecaster.reserved(batch, length))

    def expected(self, plan: Plan) -> int | None:
        """The largest forecast peak of a plan's micro-batches, whatever their lengths; None without a forecast."""
        if self.forecaster is None:
            return None
        if plan.by_length:
            return max(int(self.forecast(samples, length)) for length, samples in plan.by_length)
        return int(self.forecast(plan.micro_batch))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: the attributes, and `curve` and `timeline` for drawing."""
        apart = ("plan", "timeline", "forecaster")
        kept = {field.name: plain(getattr(self, field.name)) for field in fields(self) if field.name not in apart}
        timeline: Callable[[int], dict[str, Any]] | None = getattr(self.forecaster, "timeline", None)
        drawn = {"curve": self._curve(), "timeline": self.timeline if timeline is None else timeline(self.micro_batch)}
        return {**kept, "limit_reason": self.limit_reason, "out_of_memory_count": self.out_of_memory_count, **drawn}

    def _values(self) -> dict[str, Any]:
        return {**(self.plan.to_dict() if self.plan is not None else {}), **self.to_dict()}

    def _curve(self) -> list[list[int]]:
        if self.forecaster is None:
            return []
        top = max(self.micro_batch, self.limit or 0) * 5 // 4 + 2
        sizes = sorted({max(1, round(top * i / 48)) for i in range(49)} | {self.micro_batch})
        return [[size, self.forecaster.peak(size)] for size in sizes]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], forecaster: "Lines | None" = None) -> "ProbeReport":
        """The report that `to_dict` wrote; its forecast has to be given beside it."""
        names = {field.name for field in fields(cls)} & values.keys()
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value := values[name], list) else value for name in names
        }
        given["trials"] = tuple(Trial(**trial) for trial in values["trials"])
        given["by_length"] = tuple((int(length), int(samples)) for length, samples in values.get("by_length", ()))
        given["throughput"] = tuple((int(size), float(rate)) for size, rate in values["throughput"])
        return cls(**given, forecaster=forecaster)

    def plot(self, path: str | Path) -> None:
        """Draws forecast, trials and budget, and the memory over one window, into an image file.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from autoaccum.display.plots import probe_plot

        probe_plot(self.to_dict(), path)
