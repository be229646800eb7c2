"""Every allocation and free of what runs inside `record`, with the operator that asked for it.

    with record(device) as recording:
        recording.mark("forward"); loss = step(batch)
        recording.mark("backward"); loss.backward()
        recording.mark("optimizer"); optimizer.step()
        recording.mark("zero_grad"); optimizer.zero_grad()
    recording.trace.peak  # bytes above the start

Choices:

- The recorder is torch's profiler with memory events and nothing else: no shapes, no stacks, no device
  activity. It sees the buffers inside kernels, which trackers at the dispatcher miss. It is driven
  through the functions under `torch.profiler.profile`, whose Python class builds tables nobody reads here.
- Events of one operator call that follow each other are one group: the innermost operator, since kernels
  may allocate more often at larger sizes, which a group's net and inside figures survive.
- On CUDA the profiler tells the operator, but the size of the block that was handed out; the allocator's
  own history tells what was requested. The two are joined by address and order (history.py).
- Freed, but allocated before the recording: on the CPU torch reports such frees only for memory that an
  earlier recording happened to see, so they say nothing and are left out of all figures
  (`freed_before` keeps their sum). On CUDA the history reports all of them: they count.
- Other threads: the CPU profiler follows the calling thread (and autograd's), so a DataLoader's threads
  are not in the trace. CUDA's history is of the device: what others did is `background`, one figure.
- Python's cycle collector is off while recording: it would free tensors at places that differ between
  traces. Reference counting frees everything that is not in a cycle, as in training.
"""

from __future__ import annotations

import gc
import os
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler, _profiler_enabled
from torch.autograd.profiler import profile, record_function

from autoaccum.errors import ProbeError
from autoaccum.memory.allocator import Segment
from autoaccum.memory.history import NO_OPERATOR, History, RawEvent
from autoaccum.memory.resident import resident_bytes, resident_parts

__all__ = ["Event", "Group", "Phase", "Recording", "Trace", "assemble", "record", "resident_bytes", "resident_parts"]

_MARK = "autoaccum: "
_EVALUATE = "autograd::engine::evaluate_function: "

# Operators that only make a tensor for another one: a group of theirs is named after who called them.
_FACTORIES = frozenset(
    f"aten::{name}"
    for name in (
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "clone"),
        *("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full"),
        *("contiguous", "copy_", "to", "_to_copy"),
    )
)


class Where(Protocol):
    """What `record` needs of a memory.device.Device."""

    @property
    def torch_device(self) -> torch.device:
        """The device."""


class Group(NamedTuple):
    """What one operator call allocated and freed, in bytes.

    `net` is what it left behind (negative: it freed older memory), `inside` the most it held at any
    moment, above its start (at least 0). `innermost` is the operator that allocated, `operator` the one
    to show: the nearest caller that is more than a tensor factory. `phase` indexes Trace.phases.
    """

    operator: str
    net: int
    inside: int
    phase: int = 0
    innermost: str = ""


class Event(NamedTuple):
    """One allocation (bytes > 0) or free (bytes < 0). `block` numbers the allocations of the trace from 0;
    a free has its allocation's number, or -1 where that was before the recording."""

    bytes: int
    block: int
    group: int
    time_ns: int
    stream: int = 0


class Phase(NamedTuple):
    """A part of the window: its name, when it began, and its first group."""

    name: str
    time_ns: int
    first_group: int


@dataclass(frozen=True)
class Trace:
    """What happened inside one `record`. Sizes are bytes, times are nanoseconds of the profiler's clock.

    Attributes:
        groups: by operator call, in time order.
        events: each allocation and free in time order; on the CPU exactly the bytes asked for.
        phases: the marks, in time order; what came before the first mark is a phase named "".
        peak: the most in use above the start; at least 0.
        freed_before: bytes freed that were allocated before the recording (0 or more).
        anonymous: bytes allocated outside any operator.
        background: the most that other threads held at once (CUDA).
        requested: False where block sizes had to stand for requested sizes (CUDA, history not to be had).
        complete: False where the body raised.
        seconds: how long the body took, profiler included.
        segments, expandable, unsupported: the allocator at the start, for allocator.py (CUDA).
    """

    groups: tuple[Group, ...]
    events: tuple[Event, ...]
    phases: tuple[Phase, ...]
    peak: int
    freed_before: int = 0
    anonymous: int = 0
    background: int = 0
    requested: bool = True
    complete: bool = True
    seconds: float = 0.0
    segments: tuple[Segment, ...] = ()
    expandable: bool = False
    unsupported: str | None = None

    def timeline(self) -> Iterator[tuple[float, str, int]]:
        """(seconds since the first event, phase, bytes in use above the start) after each event."""
        level = 0
        for event in self.events:
            level += event.bytes
            phase = self.phases[self.groups[event.group].phase]
            yield (event.time_ns - self.events[0].time_ns) / 1e9, phase.name, level


@dataclass
class Recording:
    """Handed out by `record`; `trace` is there once the block is left, also when the body raised."""

    _trace: Trace | None = field(default=None, repr=False)

    @property
    def trace(self) -> Trace:
        """What happened inside.

        Raises:
            ProbeError: the `with` block has not been left yet.
        """
        if self._trace is None:
            raise ProbeError("the trace is not there yet: it is made when the `with record(...)` block is left")
        return self._trace

    def mark(self, name: str) -> None:
        """A new phase begins: "batch", "forward", "backward", "optimizer", "zero_grad", or any other name."""
        # An empty profiler range carries the name and the profiler's own clock.
        with record_function(_MARK + name):
            pass


@contextmanager
def record(device: Where) -> Iterator[Recording]:
    """Record the allocations on `device` of what runs inside, in this thread and in autograd's.

    Nothing is kept of the tensors. An error inside leaves `recording.trace` with what happened until then
    (`complete` False), and goes on.

    Raises:
        ProbeError: a profiler is already running in this thread.
    """
    if _profiler_enabled():
        raise ProbeError(
            "the memory trace needs torch's profiler, and one is already running in this thread: "
            "leave its `with profile(...)` block first"
        )
    where = device.torch_device
    recording = Recording()
    collecting = gc.isenabled()
    history = History(where) if where.type == "cuda" else None
    complete = False
    gc.disable()
    started = 0.0
    try:
        _start()
        started = time.perf_counter()
        try:
            yield recording
            complete = True
        finally:
            seconds = time.perf_counter() - started
            result = _disable_profiler()
            found, marks = _memory_events(result.experimental_event_tree(), where)
            del result
            extra: dict[str, Any] = {"complete": complete, "seconds": seconds}
            if history is not None:
                found, more = history.finish(found)
                extra |= more
            recording._trace = assemble(found, marks, earlier=where.type == "cuda", **extra)
    finally:
        if history is not None:
            history.stop()
        if collecting:
            gc.enable()


def assemble(found: Sequence[RawEvent], marks: Sequence[tuple[int, str]], *, earlier: bool, **extra: Any) -> Trace:
    """A trace from raw events in time order and marks (time, name).

    `earlier`: frees of memory from before the recording are reliable, and count.
    An allocation where a block is thought to be still in use means that its free went unseen (another
    thread did it): it is freed just before.
    """
    marks = sorted(marks)
    times = [when for when, _ in marks]
    groups: list[list[Any]] = []
    events: list[Event] = []
    first_groups: dict[int, int] = {}
    live: dict[int, tuple[int, int]] = {}  # address -> (block, bytes)
    blocks = freed_before = anonymous = level = peak = 0
    previous: tuple[int, int] | None = None

    def add(size: int, block: int, raw: RawEvent) -> None:
        nonlocal level, peak
        group = groups[-1]
        group[1] += size
        group[2] = max(group[2], group[1])
        level += size
        peak = max(peak, level)
        events.append(Event(size, block, len(groups) - 1, raw.time_ns, raw.stream))

    for raw in found:
        known = live.get(raw.address)
        if raw.bytes < 0 and known is None and not earlier:
            freed_before -= raw.bytes
            continue
        phase = bisect_right(times, raw.time_ns)
        if previous != (raw.call, phase):
            groups.append([raw.operator, 0, 0, phase, raw.innermost])
            first_groups.setdefault(phase, len(groups) - 1)
            previous = (raw.call, phase)
        if raw.bytes > 0:
            if known is not None:
                add(-known[1], known[0], raw)
            live[raw.address] = (blocks, raw.bytes)
            anonymous += raw.bytes if raw.call < 0 else 0
            add(raw.bytes, blocks, raw)
            blocks += 1
        elif known is not None:
            del live[raw.address]
            add(-known[1], known[0], raw)
        else:
            freed_before -= raw.bytes
            add(raw.bytes, -1, raw)
    begun = [(times[0] if times else 0, ""), *marks]
    following = len(groups)
    phases: list[Phase] = []
    for index in reversed(range(len(begun))):
        following = first_groups.get(index, following)
        phases.append(Phase(begun[index][1], begun[index][0], following))
    return Trace(
        tuple(Group(*group) for group in groups),
        tuple(events),
        tuple(reversed(phases)),
        peak,
        freed_before=freed_before,
        anonymous=anonymous,
        **extra,
    )


def _start() -> None:
    """Start the profiler with memory events only."""
    tool = profile(use_kineto=True, profile_memory=True)
    # Kineto writes "USDT: profiler_start" to stderr from torch 2.12 on; its level is read when it first starts.
    quiet = "KINETO_LOG_LEVEL" not in os.environ
    if quiet:
        os.environ["KINETO_LOG_LEVEL"] = "6"
    try:
        config = tool.config()  # type: ignore[no-untyped-call]
        _prepare_profiler(config, tool.kineto_activities)
        _enable_profiler(config, tool.kineto_activities)
    finally:
        if quiet:
            del os.environ["KINETO_LOG_LEVEL"]


def _memory_events(tree: list[Any], where: torch.device) -> tuple[list[RawEvent], list[tuple[int, str]]]:
    """The memory events on `where` in time order with their operators, and the marks."""
    found: list[RawEvent] = []
    marks: list[tuple[int, str]] = []
    pending: list[tuple[Any, int, str, str]] = [(event, -1, "", NO_OPERATOR) for event in reversed(tree)]
    calls = 0
    while pending:
        event, call, innermost, operator = pending.pop()
        name = event.name
        if name == "[memory]":
            fields = event.extra_fields
            if _same(fields.device, where):
                found.append(RawEvent(event.start_time_ns, fields.alloc_size, fields.ptr, call, innermost, operator))
            continue
        if name.startswith(_MARK):
            marks.append((event.start_time_ns, name[len(_MARK) :]))
            continue
        children = event.children
        if children:
            calls += 1
            shown = operator if name in _FACTORIES and call >= 0 else name.removeprefix(_EVALUATE)
            pending.extend((child, calls, name, shown) for child in reversed(children))
    found.sort(key=lambda raw: raw.time_ns)
    return found, marks


def _same(device: torch.device, where: torch.device) -> bool:
    return device.type == where.type and (where.index is None or where.type == "cpu" or device.index == where.index)
