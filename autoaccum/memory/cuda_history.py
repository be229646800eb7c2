"""CUDA's own record of allocations: the requested sizes, joined to the profiler's operators.

The profiler says which operator asked, but reports the block that was handed out, which is the request
rounded up, or more where the rest was not worth splitting. The caching allocator's history says what was
requested, but not by whom. Both tell of the same calls in the same order (each reports under the
allocator's lock), so they are joined by address and order; what no profiled thread did is set apart.

The history is switched on without stack traces, for the length of one recording. Where someone else has
it on already, it is left as it is and read; where its entries do not cover the recording (a ring buffer
that ran over), the block sizes stand for the requests, and the trace says so (`requested` False).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from autoaccum.memory.allocator import Segment, setup_of, unsupported

__all__ = ["NO_OPERATOR", "RawEvent", "history", "join", "segments_of"]

NO_OPERATOR = "(no operator)"
_DEFERRED = "(freed once another stream was done)"


class RawEvent(NamedTuple):
    """One allocation (bytes > 0) or free as the profiler or the history told it.

    `call` is the same number for all events of one operator call, -1 outside any operator. `innermost`
    is that operator, `operator` the one to show for it; `backward`: autograd's engine called it.
    """

    time_ns: int
    bytes: int
    address: int
    call: int
    innermost: str
    operator: str
    backward: bool = False
    stream: int = 0


Joined = Callable[[Sequence[RawEvent]], tuple[list[RawEvent], dict[str, Any]]]


@contextmanager
def history(where: torch.device) -> Iterator[Joined]:
    """Has the allocator keep its history inside; what it gives joins that to the profiler's events, at the end.

    That returns the events with requested sizes, and what else a trace of a device that caches wants to know.
    """
    index = torch.cuda.current_device() if where.index is None else where.index
    backend = torch.cuda.memory.get_allocator_backend()
    if backend != "native":  # others record none, and say so by an error
        yield lambda found: (list(found), {"unsupported": unsupported({}, backend), "requested": False})
        return
    ours = not torch._C._cuda_isHistoryEnabled()
    if ours:
        torch.cuda.memory._record_memory_history("all", context=None)
    try:
        start = torch.cuda.memory._snapshot(index)
        before, settings = len(start["device_traces"][index]), start.get("allocator_settings", {})
        own = [segment for segment in start["segments"] if segment["device"] == index]
        extra = {
            "segments": segments_of(own, index),
            "setup": setup_of(settings),
            "unsupported": unsupported(settings, backend, own),
        }

        def joined(found: Sequence[RawEvent]) -> tuple[list[RawEvent], dict[str, Any]]:
            entries = torch.cuda.memory._snapshot(index)["device_traces"][index][before:]
            events, background = join(found, entries) or (None, 0)
            told = {**extra, "requested": events is not None, "background": background}
            return list(found) if events is None else events, told

        yield joined
    finally:
        if ours:
            torch.cuda.memory._record_memory_history(None)


def join(found: Sequence[RawEvent], entries: Sequence[Mapping[str, Any]]) -> tuple[list[RawEvent], int] | None:
    """The history's events with the profiler's operators, and the most bytes that unprofiled threads held at once.

    `found`: the profiler's events (block sizes) in time order. `entries`: the history, in order. A block
    that another stream still used is freed when that is over ("free_completed"), not when it was asked for.
    Frees outside any operator may lack in `found`: PyTorch keeps no event of a GPU's memory that no operator
    is the parent of. None where a profiled event is not in the history.
    """
    waiting: dict[int, deque[RawEvent]] = defaultdict(deque)
    for raw in found:
        waiting[raw.address].append(raw)
    events: list[RawEvent] = []
    foreign: dict[int, int] = {}  # address -> bytes, of other threads' live allocations
    asked: dict[int, tuple[RawEvent | None, int]] = {}  # address -> who asked to free it, events until then
    background = held = 0
    now = found[0].time_ns if found else 0
    for entry in entries:
        action, address, size = entry["action"], entry.get("addr", 0), entry["size"]
        if action in ("alloc", "free_requested"):
            queue = waiting[address]
            # In turn at each address: what comes next there is this one, or the profiler did not tell this one. A block
            # is never smaller than the request: if so, the entry is another thread's at the same address.
            told = bool(queue) and (queue[0].bytes > 0) == (action == "alloc") and abs(queue[0].bytes) >= size
            who = queue.popleft() if told else None
            now = now if who is None else max(now, who.time_ns)
            if action == "free_requested":
                asked[address] = (who, len(events))
            elif who is not None:
                events.append(who._replace(bytes=size, time_ns=now, stream=entry["stream"]))
            else:
                foreign[address] = size
                held += size
                background = max(background, held)
        elif action == "free_completed":
            who, then = asked.pop(address, (None, len(events)))
            if address in foreign:
                held -= foreign.pop(address)
            elif who is not None and then == len(events):
                events.append(who._replace(bytes=-size, time_ns=now, stream=entry["stream"]))
            else:
                name = NO_OPERATOR if then == len(events) else _DEFERRED
                events.append(RawEvent(now, -size, address, -1, "", name, stream=entry["stream"]))
    if any(waiting.values()):
        return None
    return events, background


def segments_of(segments: Sequence[Mapping[str, Any]], index: int) -> tuple[Segment, ...]:
    """The default pool's segments of device `index` in a snapshot, by address."""
    return tuple(
        Segment(
            segment["stream"],
            segment["segment_type"] == "small",
            tuple((block["size"], block["state"] != "inactive") for block in segment["blocks"]),
            bool(segment.get("is_expandable", False)),
        )
        for segment in sorted(segments, key=lambda segment: segment["address"])
        if segment["device"] == index and tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0)
    )
