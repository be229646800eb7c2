"""What oneDNN takes for an LSTM's layer: the rule against the real operator, and when it must not be believed."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autoaccum.memory.forecast import Forecast
from autoaccum.memory.pages import LSTM, Layer, Stairs, stairs_of
from autoaccum.memory.trace import Trace, record
from tests.architectures import lstm_is_known
from tests.synthetic import play

CPU = SimpleNamespace(torch_device=torch.device("cpu"))
measured_here = pytest.mark.skipif(
    not lstm_is_known(), reason="oneDNN's layout of an LSTM was measured on processors up to AVX-512 only"
)


def _traced(layer: nn.LSTM, samples: int, steps: int) -> Trace:
    inputs = torch.zeros(samples, steps, layer.input_size)
    with record(CPU, shapes=True) as recording:
        layer(inputs)[0].sum().backward()
    return recording.trace


@measured_here
@pytest.mark.parametrize(
    ("inputs", "hidden", "steps", "samples"),
    [(32, 64, 20, 4), (7, 13, 5, 1), (300, 64, 9, 17), (50, 100, 30, 3), (20, 84, 3, 127), (20, 84, 3, 128)],
)
def test_the_rule_is_what_onednn_takes(inputs, hidden, steps, samples):
    trace = _traced(nn.LSTM(inputs, hidden, batch_first=True), samples, steps)
    assert trace.layers == (Layer(steps, samples, inputs, hidden),)
    found = {(stairs.block, stairs.operator): stairs for stairs in stairs_of([trace.layers], [(samples,)])}
    assert len(found) == 3
    for (_, operator), stairs in found.items():
        taken = [event.bytes for event in trace.events if trace.groups[event.group].operator == operator]
        assert stairs.bytes((samples,)) in taken


@measured_here
def test_a_forecast_of_an_lstm_meets_every_page():
    """The size from which on the forward pass keeps one step's gates included; by lines alone none would be met."""
    layer = nn.LSTM(11, 37, num_layers=2, bidirectional=True, batch_first=True)
    _traced(layer, 2, 13)
    traces = [_traced(layer, samples, 13) for samples in (2, 4)]
    forecast = Forecast.fit(traces, [(2,), (4,)])
    lines = Forecast.fit([SimpleNamespace(**{**vars(trace), "layers": ()}) for trace in traces], [(2,), (4,)])
    for samples in (3, 9, 127, 128):
        measured = _traced(layer, samples, 13).peak
        assert forecast.above(samples) == measured
        assert lines.above(samples) != measured


def _layers(*samples: int) -> list[tuple[Layer, ...]]:
    return [(Layer(20, n, 32, 64),) for n in samples]


def test_a_block_that_the_rule_does_not_meet_follows_a_line():
    """As with another version of oneDNN: what was measured decides."""
    (stairs, *_), sizes = stairs_of(_layers(2, 4, 7), [(2,), (4,), (7,)]), (2, 4, 7)
    assert stairs.block == "workspace"

    def forecast(more: int) -> Forecast:
        traces = [
            play([(LSTM, "+a", stairs.bytes((n,)) + more * n), ("backward: x", "-a", 0)], layers=layers)
            for n, layers in zip(sizes, _layers(*sizes))
        ]
        return Forecast.fit(traces, [(n,) for n in sizes])

    assert forecast(0).above(61) == stairs.bytes((61,))
    assert forecast(0).residual == 0
    a, b = (stairs.bytes((n,)) + 4 * n for n in (4, 7))
    assert forecast(4).above(61) == round(b + (b - a) / 3 * 54)
    assert forecast(4).residual > 0


def test_what_another_operator_allocates_is_not_taken_for_an_lstm():
    (stairs, *_), sizes = stairs_of(_layers(2, 4), [(2,), (4,)]), (2, 4)
    traces = [
        play([("mm", "+a", stairs.bytes((n,))), ("", "-a", 0)], layers=layers)
        for n, layers in zip(sizes, _layers(*sizes))
    ]
    low, high = (stairs.bytes((n,)) for n in sizes)
    assert Forecast.fit(traces, [(2,), (4,)]).above(10) == high + 3 * (high - low)


@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 3), st.integers(1, 300), st.integers(1, 300))
def test_calls_follow_batch_and_length(times, start, slope, inputs, hidden):
    sizes = [(2, 6), (3, 8), (5, 11)]
    calls = [[Layer(start + slope * length, times * batch, inputs, hidden)] for batch, length in sizes]
    workspace = Stairs("workspace", LSTM, inputs, hidden, times, (start, slope) if slope else (start, 0))
    assert stairs_of(calls, sizes)[0] == workspace
    assert workspace.bytes((7, 9)) >= 4 * times * 7 * (start + 9 * slope) * 5 * hidden


@pytest.mark.parametrize(
    "calls",
    [
        [[Layer(5, 2, 3, 4)], [Layer(5, 4, 3, 4), Layer(5, 4, 4, 4)]],  # a layer more
        [[Layer(5, 2, 3, 4)], [Layer(5, 4, 3, 8)]],  # another layer
        [[Layer(5, 2, 3, 4)], [Layer(5, 3, 3, 4)]],  # samples that do not follow the batch
        [[Layer(5, 2, 3, 4)], [Layer(9, 4, 3, 4)]],  # steps that follow nothing known
    ],
)
def test_calls_that_differ_otherwise_are_left_to_lines(calls):
    assert stairs_of(calls, [(2,), (4,)]) == ()
