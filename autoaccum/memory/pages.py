"""What oneDNN takes for an LSTM on the CPU: buffers rounded up to whole pages, which no line through small sizes shows.

oneDNN lays the gates and states of an LSTM's layer into one workspace and one scratchpad, each buffer at the start of a
page (set_offsets and get_good_ld in its src/cpu/rnn/rnn_utils.cpp). A dozen roundings a layer make a line through two
small steps miss by several percent. The layer's shapes say what each buffer holds, and so what it takes at any size.

What stands here is believed of a block only where it meets that block to the byte in every trace: another version of
oneDNN, or a processor for which it lays buffers out otherwise, leaves the block to the line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["LSTM", "Layer", "Stairs", "stairs_of"]

LSTM, BACKWARD = "aten::mkldnn_rnn_layer", "aten::mkldnn_rnn_layer_backward"
BLOCKS = (("workspace", LSTM), ("scratchpad", LSTM), ("scratchpad", BACKWARD))
PAGE = 4096
FLOAT = 4  # bytes of a number: the only type that is looked at
LINE = 64 // FLOAT  # numbers in a cache line
UNMERGED = 128  # samples from which on the forward pass keeps the gates of one time step only
ALIGNMENT = 568  # bytes by which a scratchpad is larger than its pages

Size = tuple[int, ...]


class Layer(NamedTuple):
    """One layer in one direction, as it was called: time steps, samples, and the widths of input and state."""

    steps: int
    samples: int
    inputs: int
    hidden: int


@dataclass(frozen=True)
class Stairs:
    """The bytes of one block of an LSTM, at any size.

    Attributes:
        block: "workspace", kept from the forward to the backward pass, or the "scratchpad" of one of the two.
        operator: that allocates it.
        inputs, hidden: widths of the layer.
        times: samples in a call for each sample of the batch.
        steps: (a, b) where a call takes a + b·length time steps.
    """

    block: str
    operator: str
    inputs: int
    hidden: int
    times: int
    steps: tuple[int, int]

    def bytes(self, size: Size) -> int:
        """At this size, to the byte."""
        rest = PAGE + ALIGNMENT if self.block == "scratchpad" else 0
        return sum(-(-buffer // PAGE) * PAGE for buffer in self._buffers(size)) + rest

    def _buffers(self, size: Size) -> list[int]:
        """What each buffer holds, in bytes."""
        samples = size[0] * self.times
        steps = self.steps[0] + (self.steps[1] * size[1] if len(size) > 1 else 0)
        state = _leading(self.hidden)
        if self.block == "workspace":  # with the states before the first step, of this layer and of what it reads
            states = 2 * (steps + 1) * samples
            wide, narrow = states * _leading(max(self.inputs, self.hidden)), states * self.hidden
            gates = steps * samples * _leading(4 * self.hidden)
            numbers = [gates, wide, wide, wide, narrow, narrow, steps * samples * state]
        else:
            kept = 1 if self.operator == LSTM and samples >= UNMERGED else steps
            numbers = [kept * samples * _leading(4 * self.hidden), samples * state, samples * state]
        return [FLOAT * count for count in numbers]


def _leading(width: int) -> int:
    """The numbers between two rows of a matrix: whole cache lines, and no multiple of 256."""
    rounded = -(-width // LINE) * LINE
    return rounded + LINE if rounded % 256 == 0 else rounded


def stairs_of(calls: Sequence[Sequence[Layer]], sizes: Sequence[Size]) -> tuple[Stairs, ...]:
    """The blocks of all LSTM layers that were called alike in every trace.

    Args:
        calls: each trace's, in order.
        sizes: of the traces: (batch,) or (batch, length).
    """
    if len({len(each) for each in calls}) > 1:
        return ()
    found: dict[Stairs, None] = {}
    for together in zip(*calls):
        steps, times = _steps(together, sizes), together[0].samples // sizes[0][0]
        alike = len({(layer.inputs, layer.hidden) for layer in together}) == 1
        if steps is None or not alike or any(layer.samples != times * size[0] for layer, size in zip(together, sizes)):
            continue
        for block, operator in BLOCKS:
            found[Stairs(block, operator, together[0].inputs, together[0].hidden, times, steps)] = None
    return tuple(found)


def _steps(together: Sequence[Layer], sizes: Sequence[Size]) -> tuple[int, int] | None:
    """(a, b) of a + b·length time steps; None where they follow another rule."""
    taken = [layer.steps for layer in together]
    if len(set(taken)) == 1:
        return taken[0], 0
    lengths = [size[1] if len(size) > 1 else 0 for size in sizes]
    low, high = lengths.index(min(lengths)), lengths.index(max(lengths))
    if lengths[low] == lengths[high]:
        return None
    slope = (taken[high] - taken[low]) // (lengths[high] - lengths[low])
    start = taken[low] - slope * lengths[low]
    return (start, slope) if all(t == start + slope * length for t, length in zip(taken, lengths)) else None
