"""The collectives of a sharded model's passes: counted, so that a rank that failed in a pass can still finish it.

FSDP gathers parameters and reduces gradients through objects that it lets one replace. These count what this rank has
issued since a pass began. A rank that runs the pass again swallows as many: the others have had them from it already.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autoaccum.ranks.places import answering

__all__ = ["Collectives"]

# Their names from torch 2.13 on, where the older ones warn.
_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Collectives:
    """What one rank issues in a pass. Its `gather` and `scatter` are for `fully_shard` modules.

    Attributes:
        done: collectives of the pass that the others have had from this rank.
        place: collectives that the present attempt at the pass has come to; 0 begins it again, on this rank alone.
        muted: gradients enter the sums as zeros.
        apart: where tensors lie in host memory, they are sent from copies on a thread of its own, so that what gloo's
            own threads hold on to is no part of a step's memory. For measuring.
        alone: nothing is issued; what would have been is written into `sequence`.
        caught_up: called where the last one that is swallowed comes up.
    """

    def __init__(self) -> None:
        self.done = self.place = 0
        self.muted = self.apart = self.alone = False
        self.sequence: list[str] = []
        self.caught_up: Callable[[], None] = lambda: None
        self.gather, self.scatter = _Allocating(self._gather), _Allocating(self._scatter)
        self._copies: dict[tuple[str, torch.dtype], Tensor] = {}
        self._lane: ThreadPoolExecutor | None = None

    def begin(self) -> None:
        """A pass begins, on all ranks."""
        self.done = self.place = 0

    def takes_turn(self, kind: str, tensor: Tensor) -> bool:
        """Whether the collective that has come up is issued."""
        swallowed = self.alone or self.place < self.done  # an earlier attempt has issued it
        self.place += 1
        if self.alone:
            self.sequence.append(f"{kind} {tensor.numel()} {tensor.dtype}")
        elif not swallowed:
            self.done = self.place
        elif self.place == self.done:
            self.caught_up()
        return not swallowed

    def _gather(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        """Gathers the shards of a group of parameters."""
        if self.takes_turn("gather", output_tensor):
            return self._issue(_GATHER, output_tensor, input_tensor, group, async_op=async_op)
        for part in output_tensor.view(-1, input_tensor.numel()):  # plausible numbers, whatever the model asks of them
            part.copy_(input_tensor)
        return None

    def _scatter(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        """Sums the gradients of a group of parameters, and gives each rank its shard."""
        if self.muted:
            input_tensor.zero_()
        if self.takes_turn("scatter", input_tensor):
            return self._issue(_SCATTER, output_tensor, input_tensor, group, op=op, async_op=async_op)
        output_tensor.zero_()
        return None

    def _issue(self, function: Any, output: Tensor, input: Tensor, group: Any, **how: Any) -> Any:
        """Calls a collective of torch.distributed; a LostRankError where another process no longer answers."""
        with answering(group):
            if not (self.apart and output.device.type == "cpu"):
                return function(output, input, group=group, **how)
            sent, got = self._copy("sent", input), self._copy("got", output)
            sent.copy_(input.view(-1))
            how["async_op"] = False
            self._lane = self._lane or ThreadPoolExecutor(1, thread_name_prefix="autoaccum-collectives")
            self._lane.submit(function, got, sent, group=group, **how).result()
            output.view(-1).copy_(got)
            return None

    def _copy(self, use: str, tensor: Tensor) -> Tensor:
        key = use, tensor.dtype
        if key not in self._copies or self._copies[key].numel() < tensor.numel():
            self._copies[key] = torch.empty(tensor.numel(), dtype=tensor.dtype)
        return self._copies[key][: tensor.numel()]

    def close(self) -> None:
        """Lets thread and copies go."""
        if self._lane is not None:
            self._lane.shutdown()
        self._lane, self.apart = None, False
        self._copies.clear()


class _Allocating:
    """A collective as FSDP takes one: it makes room, and is called."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for a collective's tensor."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Issues it, where its turn has come."""
        return self._call(*args, **named)
