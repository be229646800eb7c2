"""The profiler's events and the CUDA allocator's history, joined: here with both written by hand."""

from typing import Any

import pytest
import torch

from autoaccum.memory.allocator import Segment, Setup
from autoaccum.memory.cuda_history import RawEvent, history, join, segments_of
from autoaccum.units import MIB


def _profiled(time: int, size: int, address: int, operator: str = "mm") -> RawEvent:
    return RawEvent(time, size, address, call=time, innermost=operator, operator=operator)


def _entry(action: str, address: int, size: int, stream: int = 0) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": stream}


def _freed(address: int, size: int, stream: int = 0) -> list[dict[str, Any]]:
    return [_entry("free_requested", address, size, stream), _entry("free_completed", address, size, stream)]


def test_sizes_are_the_requested_ones_and_operators_the_profilers():
    found = [_profiled(10, 1024, 1), _profiled(20, 512, 2, "relu"), _profiled(30, -1024, 1, "relu")]
    entries = [
        _entry("segment_alloc", 0, 2 * MIB),
        _entry("alloc", 1, 1000),
        _entry("alloc", 2, 300, stream=7),
        *_freed(1, 1000),
    ]
    joined = join(found, entries)
    assert joined is not None
    events, background = joined
    assert [(event.bytes, event.operator, event.stream) for event in events] == [
        (1000, "mm", 0),
        (300, "relu", 7),
        (-1000, "relu", 0),
    ]
    assert background == 0


def test_what_other_threads_hold_is_one_figure():
    found = [_profiled(10, 512, 5), _profiled(20, -512, 5)]
    entries = [
        _entry("alloc", 8, 700),
        _entry("alloc", 5, 500),
        _entry("alloc", 9, 200),
        *_freed(8, 700),
        _entry("alloc", 9000, 100),
        *_freed(5, 500),
    ]
    joined = join(found, entries)
    assert joined is not None
    assert [event.bytes for event in joined[0]] == [500, -500]
    assert joined[1] == 900


def test_another_threads_larger_block_at_the_same_address_is_not_taken_for_ours():
    found = [_profiled(10, 512, 5)]
    joined = join(found, [_entry("alloc", 5, 4000), *_freed(5, 4000), _entry("alloc", 5, 400)])
    assert joined is not None
    assert [event.bytes for event in joined[0]] == [400]
    assert joined[1] == 4000


def test_a_block_that_another_stream_uses_is_freed_when_that_is_over():
    found = [_profiled(10, 512, 1), _profiled(20, -512, 1), _profiled(30, 1024, 2)]
    entries = [
        _entry("alloc", 1, 400),
        _entry("free_requested", 1, 400),
        _entry("alloc", 2, 900),
        _entry("free_completed", 1, 400),
    ]
    joined = join(found, entries)
    assert joined is not None
    assert [(event.bytes, event.call >= 0) for event in joined[0]] == [(400, True), (900, True), (-400, False)]
    assert [event.time_ns for event in joined[0]] == [10, 30, 30]


def test_older_memory_that_is_freed_by_any_thread_counts():
    joined = join([_profiled(10, -512, 1)], [*_freed(1, 400), *_freed(2, 300)])
    assert joined is not None
    assert [(event.bytes, event.call >= 0) for event in joined[0]] == [(-400, True), (-300, False)]


def test_a_free_outside_any_operator_that_the_profiler_left_out_takes_no_later_ones_place():
    """PyTorch keeps no event of a GPU's memory without an operator around it: here the first free of address 1."""
    found = [_profiled(10, 512, 1), _profiled(20, 512, 2), _profiled(30, 512, 1), _profiled(40, -512, 1)]
    entries = [_entry("alloc", 1, 400), *_freed(1, 400), _entry("alloc", 2, 300), _entry("alloc", 1, 500)]
    joined = join(found, [*entries, *_freed(1, 500), *_freed(2, 300)])
    assert joined is not None
    seen = [(event.bytes, event.time_ns, event.call >= 0) for event in joined[0]]
    assert seen == [
        (400, 10, True), (-400, 10, False), (300, 20, True), (500, 30, True), (-500, 40, True), (-300, 40, False),
    ]  # fmt: skip
    assert joined[1] == 0


def test_a_history_that_does_not_cover_the_recording_is_refused():
    assert join([_profiled(10, 512, 1), _profiled(20, 512, 2)], [_entry("alloc", 2, 512)]) is None


def _segment(address: int, *, device: int = 0, pool: tuple[int, int] = (0, 0), kind: str = "small") -> dict[str, Any]:
    return {
        "device": device,
        "address": address,
        "stream": 0,
        "segment_type": kind,
        "segment_pool_id": pool,
        "is_expandable": False,
        "blocks": [{"size": MIB, "state": "active_allocated"}, {"size": MIB, "state": "inactive"}],
    }


BLOCKS = ((MIB, True), (MIB, False))


def test_segments_are_the_devices_own_in_the_default_pool():
    found = segments_of([_segment(9, kind="large"), _segment(3), _segment(1, device=1), _segment(2, pool=(0, 1))], 0)
    assert found == (Segment(0, True, BLOCKS), Segment(0, False, BLOCKS))


class _Cuda:
    """What a history asks of torch.cuda, without a device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, on: bool) -> None:
        self.on = on
        self.entries: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {"expandable_segments": True, "garbage_collection_threshold": 0.8}
        monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: self.on, raising=False)
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", self._switch)
        monkeypatch.setattr(torch.cuda.memory, "_snapshot", self._snapshot)
        monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: "native")

    def _switch(self, enabled: str | None, context: str | None = "all") -> None:
        assert context is None or enabled is None
        self.on = enabled is not None

    def _snapshot(self, device: int) -> dict[str, Any]:
        traces = [[] for _ in range(device)] + [list(self.entries)]
        return {"device_traces": traces, "segments": [_segment(1, device=1)], "allocator_settings": self.settings}


def test_the_history_is_on_only_while_recording(monkeypatch):
    cuda = _Cuda(monkeypatch, on=False)
    with history(torch.device("cuda", 1)) as joined:
        assert cuda.on
        cuda.entries.append(_entry("alloc", 1, 400))
        events, extra = joined([_profiled(10, 512, 1)])
    assert [event.bytes for event in events] == [400]
    assert extra == {
        "segments": (Segment(0, True, BLOCKS),),
        "setup": Setup(expandable=True),
        "unsupported": "garbage_collection_threshold",
        "requested": True,
        "background": 0,
    }
    assert not cuda.on


def test_a_history_that_someone_else_has_on_is_read_from_here_and_left_on(monkeypatch):
    cuda = _Cuda(monkeypatch, on=True)
    cuda.entries.append(_entry("alloc", 1, 100))
    with history(torch.device("cuda", 1)) as joined:
        cuda.entries.append(_entry("alloc", 1, 400))
        events, _ = joined([_profiled(10, 512, 1)])
    assert [event.bytes for event in events] == [400]
    assert cuda.on


def test_without_a_whole_history_block_sizes_stand_for_requests(monkeypatch):
    _Cuda(monkeypatch, on=False)
    with history(torch.device("cuda", 1)) as joined:
        events, extra = joined([_profiled(10, 512, 1)])
    assert [event.bytes for event in events] == [512]
    assert extra["requested"] is False
