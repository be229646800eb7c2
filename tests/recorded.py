"""Traces recorded on CUDA's allocator, kept as JSON, so that what is built on them is tested without a GPU.

`python -m tests.recorded` records them anew, on a GPU or on a stand-in (`DIR/python -m tests.recorded`): a transformer
of two layers whose kernels change between the sizes, since an embedding's backward pass takes another path above 3,072
tokens, and a layer norm's adds up in stages from some number of rows on.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoaccum.memory.allocator import Segment, Setup
from autoaccum.memory.device import open_device
from autoaccum.memory.trace import Event, Events, Group, Kept, Phase, Trace, record

__all__ = ["HERE", "as_json", "from_json"]

HERE = Path(__file__).with_name("recorded_traces.json")
TRACED, FORECAST, LENGTH, WIDTH, WORDS = (4, 8, 40), (64, 120), 128, 256, 5000


def as_json(trace: Trace) -> dict[str, Any]:
    """What the forecast reads of a trace; names stand once, in "names"."""
    names: dict[str, int] = {}

    def number(name: str) -> int:
        return names.setdefault(name, len(names))

    groups = [[number(g.operator), g.phase, number(g.innermost)] for g in trace.groups]
    events = [[e.bytes, e.block, e.group, e.stream] for e in trace.events]
    phases = [[p.name, p.first_group] for p in trace.phases]
    return {
        "names": list(names), "groups": groups, "events": events, "phases": phases,
        "peak": trace.peak, "segments": [list(each) for each in trace.segments], "kept": [list(k) for k in trace.kept],
        "setup": list(trace.setup),
    }  # fmt: skip


def from_json(told: dict[str, Any]) -> Trace:
    """The trace that `as_json` wrote."""
    names = told["names"]
    return Trace(
        groups=tuple(Group(names[name], phase, names[innermost]) for name, phase, innermost in told["groups"]),
        events=Events(Event(*each) for each in told["events"]),
        phases=tuple(Phase(*each) for each in told["phases"]),
        peak=told["peak"],
        caching=True,
        segments=tuple(Segment(stream, small, tuple((size, used) for size, used in blocks), grows)
                       for stream, small, blocks, grows in told["segments"]),
        kept=tuple(Kept(*each) for each in told["kept"]),
        setup=Setup(told["setup"][0], told["setup"][1], tuple(told["setup"][2])),
    )  # fmt: skip


class Text(nn.Module):
    """Two layers of a transformer over an embedding that the head shares."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True, norm_first=True) for _ in range(2))
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, length) tokens -> (batch, length, WORDS)."""
        return self.layers(self.words(tokens)) @ self.words.weight.T


class Training:
    """Windows of two micro-batches with AdamW, each recorded or measured from an emptied cache."""

    def __init__(self) -> None:
        self.device = open_device("cuda")
        self.model = Text().train().cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def window(self, size: int, mark: Any = lambda name: None) -> None:
        for _ in range(2):
            mark("batch")
            tokens = torch.randint(WORDS, (size, LENGTH)).cuda()
            mark("forward")
            outputs = self.model(tokens)
            nn.functional.cross_entropy(outputs.flatten(0, 1), tokens.flatten()).backward()
            del outputs, tokens
        mark("optimizer")
        self.optimizer.step()
        mark("zero_grad")
        self.optimizer.zero_grad()

    def begin(self) -> None:
        """To where a training begins: no optimizer state, nothing cached."""
        self.optimizer.state.clear()
        self.device.release()

    def recorded(self, size: int) -> Trace:
        """One window."""
        with record(self.device) as recording:
            self.window(size, recording.mark)
        return recording.trace

    def measured(self, size: int) -> dict[str, int]:
        """What two windows take from where a training begins: peaks in bytes, requested and reserved."""
        self.begin()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            self.window(size)
        stats = torch.cuda.memory_stats()
        return {"requested": stats["requested_bytes.all.peak"], "reserved": stats["reserved_bytes.all.peak"]}


def main() -> int:
    if not torch.cuda.is_available():
        print("skipped: no CUDA device can be seen")
        return 1
    torch.manual_seed(0)
    training = Training()
    training.window(2)
    training.begin()
    first = training.recorded(2)
    traces, residents = {}, {}
    for size in TRACED:
        training.device.drop_cache()
        residents[size] = training.device.allocated()
        traces[size] = replace(training.recorded(size), segments=first.segments, kept=first.left())
    told = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "traces": {size: as_json(trace) for size, trace in traces.items()},
        "resident": residents,
        "measured": {size: training.measured(size) for size in FORECAST},
    }
    HERE.write_text(json.dumps(told, separators=(",", ":")) + "\n", encoding="utf-8")
    print(HERE, HERE.stat().st_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
