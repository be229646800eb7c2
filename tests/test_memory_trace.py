"""What a recording holds: every byte asked for on the device, by whom, when; and that it leaves nothing behind."""

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoaccum.errors import ProbeError
from autoaccum.memory.trace import record
from tests import warm
from tests.synthetic import play

CPU = SimpleNamespace(torch_device=torch.device("cpu"))


def _window(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor, recording) -> None:
    for _ in range(2):
        model(batch).square().mean().backward()
    recording.mark("optimizer")
    optimizer.step()
    recording.mark("zero_grad")
    optimizer.zero_grad()


def nets(trace):
    """What each group left behind, in bytes."""
    left = [0] * len(trace.groups)
    for event in trace.events:
        left[event.group] += event.bytes
    return left


def test_peak_and_nets_are_the_bytes_asked_for():
    with record(CPU) as recording:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(250)
    trace = recording.trace
    assert trace.peak == 6000
    assert sum(nets(trace)) == 3000
    assert [event.bytes for event in trace.events] == [4000, 2000, -4000, 1000]
    assert [event.block for event in trace.events] == [0, 1, 0, 2]
    assert trace.complete
    assert trace.requested
    assert len(second) + len(third) == 750


def test_buffers_inside_a_kernel_are_seen():
    layer = nn.GroupNorm(4, 16)
    images = torch.randn(8, 16, 4, 4, requires_grad=True)
    loss = layer(images).sum()
    with record(CPU) as recording:
        loss.backward()
    trace = recording.trace
    own = [e.bytes for e in trace.events if trace.groups[e.group].operator == "aten::native_group_norm_backward"]
    gradients = 4 * (images.numel() + 2 * 16)
    assert sum(own) == gradients
    assert sum(size for size in own if size > 0) >= gradients + 2 * 4 * 8 * 16  # two sums a sample and channel, or more


def test_groups_bear_the_name_of_the_operator_that_asked():
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    with record(CPU) as recording:
        kept = a @ b
        converted = a.double()
    left = {(group.operator, group.innermost): net for group, net in zip(recording.trace.groups, nets(recording.trace))}
    assert left["aten::mm", "aten::mm"] == 256
    assert 512 in [net for (_, innermost), net in left.items() if innermost == "aten::empty_strided"]
    assert kept.dtype != converted.dtype


def test_a_tensor_factory_inside_an_operator_goes_by_its_callers_name():
    values = torch.randn(4, 8)
    with record(CPU) as recording:
        noise = torch.randn(4, 8)
        copy = torch.empty_like(values)
    made = [(group.operator, group.innermost) for group in recording.trace.groups]
    assert made == [("aten::randn", "aten::empty"), ("aten::empty_like", "aten::empty_strided")]
    assert noise.shape == copy.shape


def test_phases_follow_the_marks_and_autograd():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batch = torch.randn(3, 4)
    for _ in range(2):
        with record(CPU) as recording:
            _window(model, optimizer, batch, recording)
    trace = recording.trace
    names = [phase.name for phase in trace.phases]
    assert names == ["forward", "backward", "forward", "backward", "optimizer", "zero_grad"]
    born = {names[group.phase] for group in trace.groups if group.operator == "aten::addmm"}
    assert born == {"forward"}
    freed = -sum(net for group, net in zip(trace.groups, nets(trace)) if names[group.phase] == "zero_grad")
    assert freed == sum(4 * parameter.numel() for parameter in model.parameters())
    assert sum(nets(trace)) == 0


def test_the_same_step_gives_the_same_groups_twice():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(4))
    batch = torch.randn(4, 3, 8, 8)
    model(batch)
    optimizer = torch.optim.AdamW(model.parameters())
    traces = []
    for _ in range(3):
        with record(CPU) as recording:
            _window(model, optimizer, batch, recording)
        traces.append(recording.trace)
    assert traces[1].groups == traces[2].groups
    assert traces[1].peak == traces[2].peak


def test_a_body_that_raises_leaves_its_trace_and_no_reference():
    seen = []

    def body() -> None:
        held = torch.empty(1000)
        seen.append(weakref.ref(held))
        torch.empty(2**60)

    try:
        with record(CPU) as recording:
            body()
    except RuntimeError:
        pass
    else:
        pytest.fail("an allocation of 2**60 floats went through")
    assert not recording.trace.complete
    assert recording.trace.peak == 4000
    assert seen[0]() is None
    with record(CPU) as again:
        torch.empty(10)
    assert again.trace.peak == 40


def test_the_collector_is_as_it_was():
    assert gc.isenabled()
    with record(CPU):
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with record(CPU):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_threads_beside_the_recorded_one_do_not_count():
    stop = threading.Event()
    turns = []

    def allocate() -> None:
        while not stop.is_set():
            torch.ones(100_000)
            turns.append(1)

    worker = threading.Thread(target=allocate)
    worker.start()
    try:
        with record(CPU) as recording:
            kept = [torch.empty(100) for _ in range(50)]
            before = len(turns)
            while len(turns) < before + 20:
                stop.wait(0.001)
    finally:
        stop.set()
        worker.join()
    assert recording.trace.peak == 400 * len(kept)
    assert len(recording.trace.events) == 50


def test_tensors_that_another_thread_frees_do_not_drift():
    with record(CPU) as recording:
        for _ in range(50):
            passed = [torch.empty(100_000)]
            worker = threading.Thread(target=passed.clear)
            worker.start()
            worker.join()
    # Where the allocator hands out the same address again, the free that nobody reported is known.
    assert recording.trace.peak <= 400_000 * 50


def test_memory_from_before_the_recording_does_not_count_on_the_cpu():
    with record(CPU):
        old = torch.empty(5000)
    with record(CPU) as recording:
        new = torch.empty(100)
        del old
        later = torch.empty(100)
    trace = recording.trace
    assert trace.peak == 800
    assert len(new) == len(later)


def test_a_profiler_that_is_already_running_is_named():
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        pytest.raises(ProbeError, match=r"one is already running in this thread: leave its .* block first"),
        record(CPU),
    ):
        pass


def test_other_devices_do_not_count():
    with record(SimpleNamespace(torch_device=torch.device("meta"))) as recording:
        torch.empty(1000)
    assert not recording.trace.events


def test_activation_checkpointing_shows_in_the_trace():
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32)) for _ in range(4))
    batch = torch.randn(64, 32)

    def peak(wrap) -> int:
        def step() -> None:
            x = batch
            for block in blocks:
                x = wrap(block, x)
            x.sum().backward()
            blocks.zero_grad()

        step()
        with record(CPU) as recording:
            step()
        return recording.trace.peak

    def recomputed(block, x):
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)

    assert peak(recomputed) < 0.7 * peak(lambda block, x: block(x))


@pytest.mark.slow
def test_the_first_recording_prints_nothing():
    code = (
        "import torch; from types import SimpleNamespace; from autoaccum.memory.trace import record\n"
        "with record(SimpleNamespace(torch_device=torch.device('cpu'))) as r: torch.empty(3)\n"
        "import os; assert 'KINETO_LOG_LEVEL' not in os.environ; print(r.trace.peak)"
    )
    code, out, err = warm.run("-c", code)
    assert (code, out) == (0, "12\n")
    assert "profiler" not in err


def test_a_recording_under_autocast_sees_the_cast_copies():
    layer = nn.Linear(64, 64)
    batch = torch.randn(16, 64)
    with record(CPU) as recording, torch.autocast("cpu", dtype=torch.bfloat16):
        F.relu(layer(batch))
    casts = sum(event.bytes for event in recording.trace.events if event.bytes == 2 * 64 * 64)
    assert casts == 2 * 64 * 64


# --- assembled from events


def test_events_of_one_call_are_one_group():
    trace = play([("mm", "+a", 100), ("mm", "+b", 50), ("mm", "-b", 0), ("mm'", "+c", 7)])
    assert [group.operator for group in trace.groups] == ["mm", "mm"]
    assert nets(trace) == [100, 7]
    assert trace.peak == 150


def test_bytes_outside_of_operators_are_counted():
    trace = play([("", "+a", 30), ("mm", "+b", 10), ("", "-a", 0)])
    assert trace.peak == 40
    assert [group.operator for group in trace.groups] == ["(no operator)", "mm", "(no operator)"]


def test_an_allocation_where_a_block_was_in_use_means_it_was_freed():
    trace = play([("mm", "+a", 100), ("mm'", "+a", 40)])
    assert [event.bytes for event in trace.events] == [100, -100, 40]
    assert trace.peak == 100


def test_frees_of_older_memory_are_negative_nets_where_they_are_reliable():
    script = [("del", "-old", 500), ("mm", "+a", 100)]
    counted, left_out = play(script, earlier=True), play(script)
    assert nets(counted) == [-500, 100]
    assert nets(left_out) == [100]
    assert (counted.peak, left_out.peak) == (0, 100)


def test_a_phase_of_ones_own_is_looked_into_and_the_known_ones_are_not():
    script = [("mark", "first half", 0), ("mm", "+a", 1), ("backward: mm", "+b", 1), ("mark", "optimizer", 0)]
    script += [("backward: mm", "+c", 1), ("sqrt", "+d", 1)]
    trace = play(script)
    assert [phase.name for phase in trace.phases] == ["forward", "first half", "backward", "optimizer"]
    assert [group.phase for group in trace.groups] == [1, 2, 3, 3]
    assert [phase.first_group for phase in trace.phases] == [0, 0, 1, 2]


def test_a_marked_phase_without_events_is_kept():
    trace = play([("mm", "+a", 1), ("mark", "optimizer", 0), ("mark", "zero_grad", 0)])
    assert [(phase.name, phase.first_group) for phase in trace.phases] == [
        ("forward", 0),
        ("optimizer", 1),
        ("zero_grad", 1),
    ]
