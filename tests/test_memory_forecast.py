"""Forecasts against what is then measured, on a dozen and more architectures; and when a forecast must not be made."""

import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from autoaccum.memory.allocator import Segment, Setup, SimulatedOutOfMemory
from autoaccum.memory.forecast import Forecast, ForecastFailed
from autoaccum.memory.resident import resident_bytes, resident_parts
from autoaccum.memory.trace import Kept, Trace, record
from autoaccum.planning.bisection import largest
from autoaccum.probing.answered import with_expandable_segments
from autoaccum.probing.find_size import Answer
from autoaccum.units import MIB
from tests import recorded
from tests.architectures import ARCHITECTURES, BY_NAME, Architecture, multiplies_bf16
from tests.synthetic import play

CPU = SimpleNamespace(torch_device=torch.device("cpu"))
sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Windows:
    """Windows of two micro-batches, an optimizer step and zero_grad, of one architecture."""

    def __init__(self, architecture: Architecture, optimizer=torch.optim.AdamW, *, bf16: bool = False) -> None:
        if not architecture.installed:
            pytest.skip(f"{architecture.needs} is not installed")
        if bf16 and multiplies_bf16():
            pytest.skip("this processor multiplies bfloat16 itself, in scratch that follows no line")
        torch.manual_seed(0)
        self.architecture, self.bf16 = architecture, bf16
        self.model = architecture.make().train()
        self.optimizer = optimizer(self.model.parameters())
        self.trace(2)  # warm-up: the optimizer's state is there from here on

    def trace(self, n: int, length: int | None = None) -> Trace:
        batches = [self.architecture.samples(n, length) for _ in range(2)]
        with record(CPU) as recording:
            for batch in batches:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                    loss = self.architecture.step(self.model, batch)
                loss.backward()
                del loss
            recording.mark("optimizer")
            self.optimizer.step()
            recording.mark("zero_grad")
            self.optimizer.zero_grad()
        return recording.trace

    def forecast(self, *batches: int) -> Forecast:
        return Forecast.fit([self.trace(n) for n in batches], [(n,) for n in batches])


def but_in_pages(architectures):
    """All but the LSTM, whose blocks oneDNN rounds up to pages; the GRU, slow to record, for the slow tests."""
    plain = [each for each in architectures if each.name != "lstm"]
    return [pytest.param(each, marks=pytest.mark.slow) if each.name == "gru" else each for each in plain]


@pytest.mark.parametrize(
    ("optimizer", "bf16"), [(torch.optim.AdamW, False), (sgd, True)], ids=["adamw-fp32", "sgd-bf16"]
)
@pytest.mark.parametrize("architecture", but_in_pages(ARCHITECTURES), ids=lambda architecture: architecture.name)
def test_the_forecast_is_what_is_measured(architecture, optimizer, bf16):
    windows = Windows(architecture, optimizer, bf16=bf16)
    forecast = windows.forecast(2, 4, 8)
    assert forecast.unaligned == 0
    for n in (24, 61):
        assert forecast.peak(n) == windows.trace(n).peak
    assert forecast.residual is not None
    assert forecast.residual < 1e-9


@pytest.mark.slow
def test_what_is_rounded_up_to_pages_is_missed_by_less_than_the_residual_says():
    windows = Windows(BY_NAME["lstm"])
    forecast = windows.forecast(2, 4, 15)  # as a probe traces: two small steps, and one nearer to what is wanted
    assert forecast.residual is not None
    for n in (24, 61):
        missed = abs(forecast.peak(n) / windows.trace(n).peak - 1)
        assert missed < 0.005
        assert missed <= forecast.residual


SEQUENCES = [architecture for architecture in ARCHITECTURES if architecture.sequence]
LENGTHS = [*((n, length) for n in (2, 3) for length in (6, 8, 10)), (4, 12)]


@pytest.mark.parametrize("architecture", but_in_pages(SEQUENCES), ids=lambda architecture: architecture.name)
def test_the_forecast_holds_for_other_lengths(architecture):
    windows = Windows(architecture)
    forecast = Forecast.fit([windows.trace(*size) for size in LENGTHS], LENGTHS)
    assert forecast.residual is not None
    for n, length in ((3, 40), (12, 16)):
        assert forecast.peak(n, length) == windows.trace(n, length).peak
        assert forecast.residual < 1e-9


# --- what must not be a silent guess


class _Switch(nn.Module):
    """A kernel that takes another way, with a copy more, from some batch size on."""

    def __init__(self, at: int, *, extra: int = 2) -> None:
        super().__init__()
        self.first, self.second, self.at, self.extra = nn.Linear(40, 64), nn.Linear(64, 10), at, extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if len(x) >= self.at:
            x = torch.cat([x] * self.extra, 1).exp()[:, :64]
        return self.second(x.relu())


class _Grown(nn.Module):
    """A kernel whose buffer has another size from some batch size on, asked for in the same way."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.layer, self.at = nn.Linear(40, 10), at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        buffer = torch.empty(len(x) * (400 if len(x) >= self.at else 40))
        return self.layer(x) + buffer[0].detach() * 0


class _Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.second(self.first(row).relu()) for row in x])


def _rows(make) -> Windows:
    return Windows(Architecture("made up", make, BY_NAME["mlp"].batch, F.cross_entropy))


def test_a_third_trace_shows_that_a_kernel_changed():
    windows = _rows(lambda: _Grown(8))
    assert windows.forecast(2, 4).residual is None
    changed = windows.forecast(2, 4, 8).residual
    assert changed is not None
    assert changed > 0.3
    settled = windows.forecast(8, 16, 32)
    assert settled.residual is not None
    assert settled.residual < 1e-9
    assert settled.peak(100) == windows.trace(100).peak


def test_traces_too_small_to_match_the_larger_ones_are_left_out():
    windows = _rows(lambda: _Switch(4))
    forecast = windows.forecast(2, 4, 8, 12)
    assert forecast.sizes == ((4,), (8,), (12,))
    assert forecast.unaligned == 0
    assert forecast.peak(100) == windows.trace(100).peak


def test_traces_that_differ_are_refused_where_nothing_shows_that_the_rest_holds():
    windows = _rows(lambda: _Switch(8))
    with pytest.raises(
        ForecastFailed, match=r"could not be matched between the sizes \[\(4,\), \(8,\)\], and there is no"
    ):
        windows.forecast(4, 8)
    with pytest.raises(ForecastFailed, match=r"the rest misses a held-out trace by \d+\.\d%"):
        windows.forecast(2, 4, 8)


def test_a_difference_that_weighs_nothing_is_only_reported():
    forecast = Forecast.fit(
        [play([*_big(n), ("odd" if n < 8 else "even", "+c", 8), ("end", "+d", 8)]) for n in (2, 4, 8)],
        [(2,), (4,), (8,)],
    )
    assert 0 < forecast.unaligned < 0.01


def _big(n: int):
    return [(name, f"+{name}", 1000 * n) for name in ("mm", "relu", "exp", "log")]


def test_a_loop_over_the_samples_is_forecast():
    windows = _rows(_Loop)
    forecast = windows.forecast(4, 6, 8)
    assert forecast.peak(40) == windows.trace(40).peak


def test_a_kernel_that_allocates_more_often_at_larger_sizes_is_forecast_by_its_group():
    def script(n: int):
        buffers = [("conv", sign + "buffer", 900 * n) for sign in "+-"]
        turns = [("conv", f"{sign}turn{turn}", 64) for turn in range(n) for sign in "+-"]
        return [("mm", "+x", 100 * n), *buffers, *turns, ("relu", "+y", 100 * n)]

    forecast = Forecast.fit([play(script(n)) for n in (2, 4, 8)], [(2,), (4,), (8,)])
    assert forecast.peak(64) == play(script(64)).peak == 64_000
    assert at_peak(forecast, 64) == {"activations": 6400, "temporary": 57_600}
    assert forecast.residual == 0


def test_traces_that_carry_no_forecast_are_refused():
    trace = play(_big(2))
    with pytest.raises(ForecastFailed, match="cut short"):
        Forecast.fit([trace, play(_big(4), complete=False)], [(2,), (4,)])
    with pytest.raises(ForecastFailed, match="or nothing was recorded"):
        Forecast.fit([trace, play([])], [(2,), (4,)])
    with pytest.raises(ForecastFailed, match="do not determine the fit"):
        Forecast.fit([trace, trace], [(2,), (2,)])


def test_a_length_is_asked_for_and_one_alone_tells_nothing_of_others():
    with pytest.raises(ForecastFailed, match="do not determine the fit"):
        Forecast.fit([play(_big(n)) for n in (2, 4)], [(2, 16), (4, 16)])
    sizes = [(n, length) for n in (2, 4) for length in (8, 16, 24)]
    many = Forecast.fit([play(_big(n * length)) for n, length in sizes], sizes)
    assert many.peak(3, 100) == 4 * 1000 * 300
    with pytest.raises(ForecastFailed, match="needs a length"):
        many.peak(3)
    assert max(line[3] for line in many.lines()) == pytest.approx(4 * 1000)  # of batch times length


def at_peak(forecast: Forecast, n: int) -> dict[str, int]:
    """What is in use at the fullest moment, by part."""
    timeline = forecast.timeline(n, moments=10**6)
    totals = [sum(column) for column in zip(*timeline["bytes"], strict=True)]
    fullest = totals.index(max(totals))
    return {name: row[fullest] for name, row in zip(timeline["parts"], timeline["bytes"], strict=True) if row[fullest]}


# --- arithmetic, on synthetic steps whose every allocation is affine

steps = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 50), st.integers(0, 6)), min_size=1, max_size=30)


def _synthetic(found: list[tuple[int, int, int]], n: int) -> list[tuple[str, str, int]]:
    """Operators that allocate a + b·n (at least one byte) and free an older block, or keep it."""
    script: list[tuple[str, str, int]] = []
    live: list[str] = []
    for at, (constant, slope, free) in enumerate(found):
        script.append((f"op{at}", f"+{at}", constant + slope * n + 1))
        live.append(str(at))
        if free < 4:
            script.append((f"op{at}", f"-{live.pop(free % len(live))}", 0))
    return script


def _fitted(found, resident=0, *sizes: int, **extra) -> Forecast:
    """From steps of these sizes; `resident` bytes were there before each, or by part before each."""
    sizes = sizes or (2, 4)
    resident = [{"parameters": resident}] * len(sizes) if isinstance(resident, int) else resident
    return Forecast.fit([play(_synthetic(found, n), **extra) for n in sizes], [(n,) for n in sizes], resident)


@settings(deadline=None)
@given(steps, st.integers(1, 5000), st.integers(0, 10**6))
def test_the_forecast_is_the_maximum_of_affine_functions(found, n, resident):
    forecast = _fitted(found, resident)
    measured = play(_synthetic(found, n)).peak
    assert forecast.peak(n) == resident + measured
    assert max(a + b * n for a, b in forecast.lines()) == pytest.approx(forecast.peak(n))


@settings(deadline=None)
@given(steps, st.integers(0, 10**6), st.integers(1, 10**5))
def test_the_largest_batch_fits_and_the_next_does_not(found, budget, ceiling):
    forecast = _fitted(found, 50)
    limit = largest(lambda n: forecast.peak(n) <= budget, ceiling)
    assert 0 <= limit <= ceiling
    if limit:
        assert forecast.peak(limit) <= budget
    if limit < ceiling:
        assert forecast.peak(limit + 1) > budget
    assert largest(lambda n: forecast.peak(n) <= budget + 1000, ceiling) >= limit


@settings(deadline=None)
@given(steps, st.integers(1, 500), st.booleans())
def test_parts_add_up(found, n, coarse):
    sizes = (2, 4, 8)
    scripts = [_synthetic(found, size) for size in sizes]
    if coarse:  # a kernel that allocates more often at larger sizes
        for script, size in zip(scripts, sizes, strict=True):
            last = script[-1][0]
            script += [(last, what + f"x{turn}", 7) for turn in range(size) for what in "+-"]
    forecast = Forecast.fit(
        [play(script) for script in scripts], [(size,) for size in sizes], [{"parameters": 321}] * 3
    )
    assert at_peak(forecast, n)["parameters"] == 321
    timeline = forecast.timeline(n, moments=9)
    columns = [sum(column) for column in zip(*timeline["bytes"], strict=True)]
    assert len(columns) <= 9
    assert max(columns) == pytest.approx(forecast.peak(n), abs=len(timeline["parts"]))


def test_what_is_there_before_may_grow_with_the_batch():
    found = [(100, 10, 6)]
    each = [{"parameters": 1000, "batch": 8 * n} for n in (2, 4)]
    forecast = _fitted(found, each)
    assert forecast.peak(10) == 1000 + 80 + 100 + 100 + 1
    assert at_peak(forecast, 10)["batch"] == 80


def test_what_other_threads_hold_comes_on_top():
    forecast = _fitted([(100, 10, 6)], background=5000)
    assert forecast.peak(10) == 201 + 5000


# --- what it says of real windows


def test_parts_name_the_gradients_and_what_the_backward_pass_needs():
    windows = Windows(BY_NAME["batchnorm-cnn"])
    sizes = (2, 4, 8)
    resident = resident_parts(windows.model, windows.optimizer)
    forecast = Forecast.fit([windows.trace(n) for n in sizes], [(n,) for n in sizes], [resident] * 3)
    parts = at_peak(forecast, 64)
    assert {name: parts[name] for name in resident if resident[name]} == {
        n: size for n, size in resident.items() if size
    }
    assert parts["gradients"] <= resident["parameters"] + 4
    assert parts["activations"] > 0.5 * (forecast.peak(64) - sum(resident.values()))
    assert sum(parts.values()) == pytest.approx(forecast.peak(64), abs=len(parts))
    assert forecast.peak(64) == resident_bytes(windows.model, windows.optimizer) + windows.trace(64).peak
    phases = [name for name, _ in forecast.timeline(64)["phases"]]
    assert phases == ["forward", "backward", "forward", "backward", "optimizer", "zero_grad"]


def test_the_peak_may_lie_in_the_optimizers_step():
    windows = Windows(BY_NAME["mlp"])
    forecast = windows.forecast(2, 4)
    timeline = forecast.timeline(1, moments=10**6)
    totals = [sum(column) for column in zip(*timeline["bytes"], strict=True)]
    at = dict(timeline["phases"])
    assert at["optimizer"] <= totals.index(max(totals)) < at["zero_grad"]
    assert forecast.peak(2) == windows.trace(2).peak


# --- the simulated allocator


def test_without_a_caching_allocator_reserved_is_the_peak():
    forecast = _fitted([(100, 10, 6)], 1000)
    assert forecast.reserved(10) == forecast.peak(10)


def _caching(n: int) -> Trace:
    script = [("mm", "+a", 40_000 * n), ("relu", "+b", 300_000 * n), ("", "-a", 0), ("mm'", "+c", 500_000 * n)]
    return play([*script, ("end", "-b", 0), ("end", "-c", 0)], caching=True)


def test_fitted_requests_are_played_through_the_allocator():
    forecast = Forecast.fit([_caching(n) for n in (2, 4)], [(2,), (4,)])
    # At 40: 1.6 MB and 12 MB in one segment of 20 MiB; then 20 MB, for which 1.6 MB and the segment's end are apart.
    outcome = forecast.simulate(40)
    assert (outcome.peak_reserved, outcome.retries) == (40 * MIB, 0)
    assert forecast.reserved(40) == 40 * MIB
    assert forecast.peak(40) == 32_000_000
    with pytest.raises(SimulatedOutOfMemory):
        forecast.simulate(40, limit=39 * MIB)


def test_freed_requests_are_served_again():
    def trace(n: int) -> Trace:
        return play(
            [("mm" + "'" * turn, f"{sign}{turn}", 10**6 * n) for turn in range(5) for sign in "+-"], caching=True
        )

    forecast = Forecast.fit([trace(n) for n in (2, 4)], [(2,), (4,)])
    assert forecast.reserved(30) == 30 * MIB


def test_the_largest_batch_under_a_reserved_limit_needs_no_retry():
    forecast = Forecast.fit([_caching(n) for n in (2, 4)], [(2,), (4,)])
    limit = largest(lambda n: forecast.within(n, 100 * MIB), 10_000)
    assert forecast.simulate(limit, limit=100 * MIB).retries == 0
    assert forecast.reserved(limit + 1) > 100 * MIB
    assert forecast.peak(limit + 1) <= 100 * MIB


def test_what_would_fit_in_segments_that_grow_is_told_where_it_is_more():
    traces, sizes = [_caching(n) for n in (2, 4)], [(2,), (4,)]
    forecast, budget = Forecast.fit(traces, sizes), 100 * MIB
    limit = largest(lambda n: forecast.within(n, budget), 10_000)
    more = largest(lambda n: forecast.within(n, budget, expandable=True), 10_000)
    assert more > 1.02 * limit
    answer = Answer(limit, limit, "forecast", forecast)
    hint = with_expandable_segments(forecast, answer, budget)
    assert hint is not None
    assert f"would let {more} samples fit, by simulation, where {limit} do now" in hint
    growing = [replace(trace, setup=Setup(expandable=True)) for trace in traces]
    assert with_expandable_segments(Forecast.fit(growing, sizes), answer, budget) is None
    assert with_expandable_segments(forecast, replace(answer, limit=more), budget) is None
    assert with_expandable_segments(forecast, replace(answer, limit=None, proof=None), budget) is None


def test_an_allocator_that_is_not_simulated_reserves_as_was_measured():
    extra = {"caching": True, "unsupported": "garbage_collection_threshold"}
    traces, sizes = [play([("mm", "+a", 1000 * n)], **extra) for n in (2, 4)], [(2,), (4,)]
    with pytest.raises(ForecastFailed, match="garbage_collection_threshold, which is not simulated"):
        Forecast.fit(traces, sizes).reserved(8)
    forecast = Forecast.fit(traces, sizes, reserved=[2600, 5000])
    assert (forecast.peak(8), forecast.reserved(8)) == (8000, 10_000)


def _window(n: int, *, state: bool) -> Trace:
    """Two micro-batches: activations, gradients born in the first backward, and an optimizer that makes its state."""
    script = []
    for turn in range(2):
        script += [("mark", "batch", 0), ("mark", "forward", 0)]
        script += [(f"mm{at}", f"+activation{turn}{at}", 12 * MIB * n) for at in range(2)]
        script += [("mark", "backward", 0)]
        for at in (1, 0):
            script += [(f"mm{at} backward", f"+gradient{at}", 30 * MIB)] if turn == 0 else []
            script += [(f"mm{at} backward'", f"-activation{turn}{at}", 0)]
    script += [("mark", "optimizer", 0)]
    script += [("adam", f"+state{at}", 120 * MIB) for at in range(2)] if state else [("adam", "+nothing", 512)]
    script += [] if state else [("adam", "-nothing", 0)]
    script += [("mark", "zero_grad", 0), *(("", f"-gradient{at}", 0) for at in (1, 0))]
    return play(script, caching=True)


def test_a_training_is_played_from_an_emptied_cache_through_two_windows():
    first = _window(2, state=True)
    assert first.left() == tuple(Kept("optimizer", 120 * MIB, "adam", at) for at in range(2))
    cached = Segment(0, False, ((400 * MIB, False),))  # of trials before, which a training finds emptied
    traces = [replace(_window(n, state=False), segments=(cached,), kept=first.left()) for n in (2, 4)]
    forecast = Forecast.fit(traces, [(2,), (4,)])
    assert forecast.peak(20) == 540 * MIB
    # 240 MiB twice, and 30 for a gradient; the other one is cut out of a freed block, so that the second micro-batch
    # finds that no longer whole: 240 more. The gradients at hand beforehand would hide it.
    assert Forecast.fit([replace(trace, kept=()) for trace in traces], [(2,), (4,)]).reserved(20) == 752 * MIB
    # So is the optimizer's state, and there it stays.
    assert forecast.reserved(20) == 992 * MIB


@pytest.mark.parametrize("sizes", [(4, 8), (4, 40), (4, 8, 40)])
def test_a_training_recorded_on_cudas_allocator_is_forecast_though_its_kernels_change_with_the_size(sizes):
    """Where a reduction stages 8 bytes, a block of 16 MiB and those together would not fit where it does alone."""
    told = json.loads(recorded.HERE.read_text(encoding="utf-8"))
    traces = [recorded.from_json(told["traces"][str(size)]) for size in sizes]
    forecast = Forecast.fit(
        traces, [(size,) for size in sizes], [{"parameters": told["resident"][str(size)]} for size in sizes]
    )
    assert forecast.unaligned < 0.01
    assert len(told["measured"]) == 2
    for size, measured in told["measured"].items():
        assert forecast.peak(int(size)) == pytest.approx(measured["requested"], rel=0.001)
        assert forecast.reserved(int(size)) == pytest.approx(measured["reserved"], rel=0.01)


def test_a_further_trace_that_matches_nothing_does_not_undo_a_good_forecast():
    def step(n: int, way: str) -> Trace:
        kernels = [(f"{way}{at}", f"+x{at}", 1000 * n) for at in range(5)]
        return play([*kernels, ("end", "-x0", 0)], caching=True)

    traces = [step(2, "small"), step(4, "small"), step(40, "large")]
    sizes = [(2,), (4,), (40,)]
    forecast = Forecast.fit(traces, sizes)
    assert forecast.unaligned == 1.0
    assert (forecast.peak(40), forecast.peak(60), forecast.residual) == (200_000, 300_000, 0.0)
    traces[2] = play([("large", "+x", 300_000)], caching=True)  # and its peak is another one: nothing holds there
    with pytest.raises(ForecastFailed, match="could not be matched"):
        Forecast.fit(traces, sizes)


def test_a_kernel_that_stages_partial_sums_from_some_size_on_leaves_the_layers_matched():
    """Twelve equal layers, one of which reduces in two steps at larger sizes: folded into one loop none would match."""

    def step(n: int) -> Trace:
        script = [(f"{name}{at % 2 * '_'}", f"+{name}{at}", 10_000 * n) for at in range(12) for name in ("mm", "gelu")]
        staged = [("sum", "+staging", 600), ("sum", "-staging", 0)] if n > 4 else []
        return play([*script[:14], *staged, *script[14:]], caching=True)

    sizes = [(2,), (4,), (40,)]
    forecast = Forecast.fit([step(n) for (n,) in sizes], sizes)
    assert 0 < forecast.unaligned < 0.01
    assert len(forecast._table.phases) == 24 + 2, "a row for each event, and two for the stretch that does not match"
    assert forecast.peak(300) == step(300).peak
