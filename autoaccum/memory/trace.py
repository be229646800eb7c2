"""Every allocation and free of what runs inside `record`, with the operator that asked for it.

    with record(device) as recording:
        loss = model(inputs)
        loss.backward()
        recording.mark("optimizer"); optimizer.step()
        recording.mark("zero_grad"); optimizer.zero_grad()
    recording.trace.peak  # bytes above the start

Choices:

- The recorder is torch's profiler with memory events and nothing else: no stacks, no shapes, no device activity. It
  sees the buffers inside kernels, which trackers at the dispatcher miss. It is driven through the functions under
  `torch.profiler.profile`, whose Python class builds tables nobody reads here. Measured on a CPU: 0.5 ms to start and
  stop (1 ms the first time), and 5 to 10 µs for each operator and each event, two thirds of it in torch when the
  profiler stops.
- Events of one operator call that follow each other are one group: the innermost operator, since kernels
  may allocate more often at larger sizes, while what a group leaves behind and holds at most follows them.
- On CUDA the profiler tells the operator, but the size of the block that was handed out; the allocator's
  own history tells what was requested. The two are joined by address and order (cuda_history.py).
- Freed, but allocated before the recording: on the CPU torch reports such frees only for memory that an
  earlier recording happened to see, so they say nothing and are left out. On CUDA the history reports all of
  them: they count.
- Other threads: the CPU profiler follows the calling thread (and autograd's), so a DataLoader's threads
  are not in the trace. CUDA's history is of the device: what others did is `background`, one figure.
- Phases begin at the marks; forward and backward need none, since what autograd's engine calls is known.
- Python's cycle collector is off while recording: it would free tensors at places that differ between
  traces. Reference counting frees everything that is not in a cycle, as in training.
"""

from __future__ import annotations

import gc
import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler, _profiler_enabled
from torch.autograd.profiler import profile, record_function

from autoaccum.errors import ProbeError
from autoaccum.memory.allocator import Segment, Setup
from autoaccum.memory.budget import Device
from autoaccum.memory.cuda_history import NO_OPERATOR, RawEvent, history
from autoaccum.memory.resident import lies_on
from autoaccum.memory.watch import small_stacks

__all__ = ["Event", "Events", "Group", "Kept", "Phase", "Recording", "Trace", "assemble", "record"]

_MARK = "autoaccum: "
_WHOLE = frozenset({"batch", "backward", "optimizer", "zero_grad"})  # marks whose phase has no backward of its own
_LASTING = {"batch": "batch", "backward": "gradients", "optimizer": "optimizer_state"}  # by phase, what outlives it
_EVALUATE = "autograd::engine::evaluate_function: "
_LOOPS = frozenset({"ChunkedCrossEntropy"})  # run as often as there are chunks, and are one group

# Operators that only make a tensor for another one: a group of theirs is named after who called them.
_FACTORIES = frozenset(
    f"aten::{name}"
    for name in (
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "clone"),
        *("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full"),
        *("contiguous", "copy_", "to", "_to_copy"),
    )
)


class Event(NamedTuple):
    """One allocation (bytes > 0) or free (bytes < 0). `block` numbers the allocations of the trace from 0;
    a free has its allocation's number, or -1 where that was before the recording."""

    bytes: int
    block: int
    group: int
    stream: int = 0


class Events:
    """Events in time order, in columns of machine numbers: a limit on the process counts what the records take."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._columns = tuple(array("q") for _ in Event._fields)
        for event in events:
            self.append(event)

    def append(self, event: Event) -> None:
        """Adds an event at the end."""
        for column, value in zip(self._columns, event):
            column.append(value)

    def __len__(self) -> int:
        return len(self._columns[0])

    def __iter__(self) -> Iterator[Event]:
        return map(Event, *self._columns)

    def __getitem__(self, span: slice) -> list[Event]:
        return list(map(Event, *(column[span] for column in self._columns)))


class Group(NamedTuple):
    """One operator call that allocated or freed.

    `innermost` is the operator that did so, `operator` the one to show: the nearest caller that is more than a tensor
    factory. `phase` indexes Trace.phases.
    """

    operator: str
    phase: int = 0
    innermost: str = ""


class Phase(NamedTuple):
    """A part of the window: its name, and its first group."""

    name: str
    first_group: int


class Kept(NamedTuple):
    """A block that the first window leaves for good: the phase it was made in, its bytes, and by whom.

    `after` is how many allocations and frees of that call of `operator` come before it.
    """

    phase: str
    bytes: int
    operator: str = ""
    after: int = 0


@dataclass(frozen=True)
class Trace:
    """What happened inside one `record`. Sizes are bytes.

    Attributes:
        groups: by operator call, in time order.
        events: each allocation and free in time order; on the CPU exactly the bytes asked for.
        phases: in time order. The marks, and before the first mark "forward". Such a phase, or one under a name
            of the caller's own, is followed by "backward" where autograd's engine takes over, and by "forward"
            where it has ended.
        peak: the most in use above the start; at least 0.
        background: the most that other threads held at once (CUDA).
        requested: False where block sizes had to stand for requested sizes (CUDA, history not to be had).
        complete: False where the body raised.
        caching: whether the device's allocator caches (CUDA); `segments`, `setup` and `unsupported` then
            describe it at the start, for allocator.py.
        kept: what a training's first window adds for good to what `segments` hold, in order: an optimizer's state,
            libraries' workspaces; none where `segments` hold it already.
    """

    groups: tuple[Group, ...]
    events: Events
    phases: tuple[Phase, ...]
    peak: int
    background: int = 0
    requested: bool = True
    complete: bool = True
    caching: bool = False
    segments: tuple[Segment, ...] = ()
    kept: tuple[Kept, ...] = ()
    setup: Setup = Setup()  # noqa: RUF009 - immutable
    unsupported: str | None = None

    def left(self) -> tuple[Kept, ...]:
        """What was allocated and is still there at the end, in order."""
        live: dict[int, Kept] = {}
        group, first = -1, 0
        for at, event in enumerate(self.events):
            if event.group != group:
                group, first = event.group, at
            if event.bytes > 0:
                operator, phase = self.groups[group].operator, self.phases[self.groups[group].phase].name
                live[event.block] = Kept(phase, event.bytes, operator, at - first)
            else:
                live.pop(event.block, None)
        return tuple(live.values())

    def parts(self) -> list[str]:
        """What each block is: "temporary", or by the phase that it was made in and outlives."""
        born: list[int] = []
        found: list[str] = []
        for event in self.events:
            phase = self.groups[event.group].phase
            if event.bytes > 0:
                born.append(phase)
                found.append(_LASTING.get(self.phases[phase].name, "activations"))
            elif event.block >= 0 and born[event.block] == phase:
                found[event.block] = "temporary"
        return found


class Recording:
    """Handed out by `record`; `trace` is there once the block is left, also when the body raised."""

    trace: Trace

    def mark(self, name: str) -> None:
        """A new phase begins: "batch" (its move to the device), "forward", "optimizer", "zero_grad", or any name."""
        # An empty profiler range carries the name and the profiler's own clock.
        with record_function(_MARK + name):
            pass


@contextmanager
def record(device: Device) -> Iterator[Recording]:
    """Records the allocations on `device` of what runs inside, in this thread and in autograd's.

    Nothing is kept of the tensors. An error inside leaves `recording.trace` with what happened until then (`complete`
    False), and goes on. A ProbeError where a profiler is already running in this thread.
    """
    if _profiler_enabled():
        raise ProbeError(
            "the memory trace needs torch's profiler, and one is already running in this thread: "
            "leave its `with profile(...)` block first"
        )
    where, recording = device.torch_device, Recording()
    complete, collecting = False, gc.isenabled()
    gc.disable()
    try:
        with history(where) if where.type == "cuda" else nullcontext() as joined:
            _start()
            try:
                yield recording
                complete = True
            finally:
                found, marks = _memory_events(_disable_profiler().experimental_event_tree(), where)
                more: dict[str, Any] = {}
                if joined is not None:
                    found, more = joined(found)
                caching = joined is not None
                recording.trace = assemble(found, marks, earlier=caching, complete=complete, caching=caching, **more)
    finally:
        if collecting:
            gc.enable()


def assemble(found: Sequence[RawEvent], marks: Sequence[tuple[int, str]], *, earlier: bool, **extra: Any) -> Trace:
    """A trace from raw events in time order and marks (time, name).

    `earlier`: frees of memory from before the recording are reliable, and count.
    An allocation where a block is thought to be still in use means that its free went unseen (another
    thread did it): it is freed just before.
    """
    builder = _Builder(sorted(marks))
    for raw in found:
        builder.take(raw, earlier)
    return builder.trace(**extra)


class _Builder:
    """Phases, groups and events, while they come in."""

    def __init__(self, marks: Sequence[tuple[int, str]]) -> None:
        self._marks = list(reversed(marks))  # those not reached yet, the next one last
        self._phases = [Phase("forward", 0)]
        self._whole = False  # whether the marked phase is taken as it is
        self._groups: list[Group] = []
        self._events = Events()
        self._open: tuple[int, int] | None = None  # call and phase of the last group
        self._live: dict[int, tuple[int, int]] = {}  # address -> (block, bytes)
        self._blocks = 0

    def take(self, raw: RawEvent, earlier: bool) -> None:
        block, size = self._live.pop(raw.address, (-1, -raw.bytes))  # or older than the recording
        if raw.bytes < 0 and block < 0 and not earlier:
            return
        self._reach(raw.time_ns)
        if raw.call >= 0 and not self._whole and raw.backward != (self._phases[-1].name == "backward"):
            self._phases.append(Phase("backward" if raw.backward else "forward", len(self._groups)))
        if self._open != (raw.call, len(self._phases)):
            self._open = (raw.call, len(self._phases))
            self._groups.append(Group(raw.operator, len(self._phases) - 1, raw.innermost))
        if block >= 0 or raw.bytes < 0:
            self._events.append(Event(-size, block, len(self._groups) - 1, raw.stream))
        if raw.bytes > 0:
            self._live[raw.address] = (self._blocks, raw.bytes)
            self._events.append(Event(raw.bytes, self._blocks, len(self._groups) - 1, raw.stream))
            self._blocks += 1

    def trace(self, **extra: Any) -> Trace:
        self._reach(2**63)
        peak = max(accumulate((event.bytes for event in self._events), initial=0))
        return Trace(tuple(self._groups), self._events, tuple(self._phases), peak, **extra)

    def _reach(self, time_ns: int) -> None:
        """Begin the phases marked up to this time."""
        while self._marks and self._marks[-1][0] <= time_ns:
            _, name = self._marks.pop()
            self._phases.append(Phase(name, len(self._groups)))
            self._whole = name in _WHOLE


def _start() -> None:
    """Starts the profiler with memory events alone."""
    tool = profile(use_kineto=True, profile_memory=True)
    # Kineto writes "USDT: profiler_start" to stderr from torch 2.12 on; its level is read when it first starts.
    quiet = "KINETO_LOG_LEVEL" not in os.environ
    if quiet:
        os.environ["KINETO_LOG_LEVEL"] = "6"
    try:
        config = tool.config()  # type: ignore[no-untyped-call]
        with small_stacks():  # Kineto's thread stays for as long as the process does
            _prepare_profiler(config, tool.kineto_activities)
            _enable_profiler(config, tool.kineto_activities)
    finally:
        if quiet:
            del os.environ["KINETO_LOG_LEVEL"]


def _memory_events(tree: list[Any], where: torch.device) -> tuple[list[RawEvent], list[tuple[int, str]]]:
    """The memory events on `where` in time order with their operators, and the marks."""
    found: list[RawEvent] = []
    marks: list[tuple[int, str]] = []
    pending: list[tuple[Any, int, str, str, bool]] = [(event, -1, "", NO_OPERATOR, False) for event in reversed(tree)]
    calls = 0
    while pending:
        event, call, innermost, operator, backward = pending.pop()
        name = sys.intern(event.name)  # each event brings a text of its own
        if name == "[memory]":
            fields = event.extra_fields
            if lies_on(fields.device, where):
                size, address, when = fields.alloc_size, fields.ptr, event.start_time_ns
                found.append(RawEvent(when, size, address, call, innermost, operator, backward))
        elif name.startswith(_MARK):
            marks.append((event.start_time_ns, name[len(_MARK) :]))
        elif event.children:
            if innermost not in _LOOPS:
                calls += 1
                operator = operator if name in _FACTORIES and call >= 0 else sys.intern(name.removeprefix(_EVALUATE))
                call, innermost, backward = calls, name, backward or name.startswith(_EVALUATE)
            pending.extend((child, call, innermost, operator, backward) for child in reversed(event.children))
    found.sort(key=lambda raw: raw.time_ns)
    return found, marks
