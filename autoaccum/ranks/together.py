"""This process among others, or alone: what the rest of the package calls. Alone it answers for itself."""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autoaccum.errors import AutoaccumError, SetupError
from autoaccum.ranks.places import (
    PROCESSES,
    LostRankError,
    answering,
    by_rank,
    bytes_of,
    digest,
    listed,
    short,
    this_process,
    told,
    was_told,
)
from autoaccum.units import MIB

__all__ = ["BUCKET_BYTES", "LARGE_BYTES", "Flight", "Ranks"]

# As large as DistributedDataParallel's: large enough that latency does not count, small beside any model.
BUCKET_BYTES = 25 * MIB

# From here on copying a tensor into a bucket and out again costs more than a message of its own.
LARGE_BYTES = MIB

# Numbers that one `tally` can carry. Fixed, because a failing rank does not know what the others send.
_SLOTS = 256
_PLACE_BYTES = 64  # of the text that says where a rank is
_NAMED = 5  # differences, in an error


@dataclass
class Flight:
    """Collectives whose memory is there already.

    Attributes:
        starts: begin one each, without waiting; in the same order on every rank.
        lands: what is done with the answers, once all are there.
    """

    starts: list[Callable[[], Any]] = field(default_factory=list)
    lands: list[Callable[[], None]] = field(default_factory=list)


class Ranks:
    """One rank of a process group of PyTorch's; without one a single process, whose sums are its own numbers.

    In every method `what` says in a few words where the caller is, such as "step 4"; where the ranks' differ, all of
    them raise a SetupError that names them.

    Attributes:
        rank: this process's number, from 0.
        size: how many processes there are.
        group: their process group of torch.distributed; None where nothing is exchanged.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        """Takes the place that this process has in `group`, whose backend wants its tensors on `device`."""
        if group is not None:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            self.group, self._device = group, device or torch.device("cpu")
            # Reserved now, so that a vote on memory needs none.
            self._packet = torch.zeros(3 * self.size + _SLOTS, dtype=torch.float64, device=device)

    def fail(self) -> None:
        """Lets the other ranks stop in their next exchange; to be called where an error is handled.

        Nothing where they know of that error already, or where it came from one of them.
        """
        error = sys.exc_info()[1]
        if self.group is None or was_told(error):
            return
        if error is not None:
            told(error)
        with contextlib.suppress(RuntimeError, LostRankError):  # the others have ended, and nobody waits
            self.meet("an error", failed=True)

    def meet(
        self, what: str, values: Sequence[float] = (), own: float = 0, *, failed: bool = False
    ) -> tuple[list[float], list[float]]:
        """(the sums of each of `values` over all ranks, every rank's `own`), in float64.

        Every rank gives equally many values. A rank that cannot go on calls it with `failed=True` and then raises its
        own error; all others raise here.

        Raises:
            AutoaccumError: other ranks said `failed=True`; it names them.
            LostRankError: another process ended, or no longer answers.
            SetupError: the ranks are at different places; or more than 256 values.
        """
        if self.group is None:
            return [float(value) for value in values], [float(own)]
        if len(values) > _SLOTS:
            raise SetupError(f"{len(values)} numbers to add up over the ranks: at most {_SLOTS}, so use fewer terms")
        size, rank = self.size, self.rank
        numbers = [0.0] * (3 * size + _SLOTS)
        numbers[: len(values)] = [float(value) for value in values]
        for place, number in enumerate((own, digest(what), failed)):
            numbers[_SLOTS + place * size + rank] = float(number)
        packet = self._packet
        packet.copy_(torch.tensor(numbers, dtype=torch.float64))
        with answering(self.group):
            dist.all_reduce(packet, group=self.group)
        answer: list[float] = packet.tolist()
        owns, places, flags = (answer[_SLOTS + at * size : _SLOTS + (at + 1) * size] for at in range(3))
        if any(flags):
            if not failed:
                dead = listed([at for at, flag in enumerate(flags) if flag])
                stops = f"{dead} of {size} failed, so rank {rank} stops as well: the cause is in the error raised there"
                raise told(AutoaccumError(stops))
        elif len(set(places)) > 1:
            raise told(SetupError(self._apart(what)))
        return answer[: len(values)], owns

    def tally(self, what: str, values: Sequence[float] = ()) -> list[float]:
        """The sums of each of `values` over all ranks. Raises as `meet` does."""
        return self.meet(what, values)[0]

    def any(self, what: str, flag: bool) -> bool:
        """Whether `flag` is true on any rank. Raises as `meet` does."""
        return bool(self.meet(what, [float(flag)])[0][0])

    def gather(self, what: str, value: int) -> list[int]:
        """Every rank's `value` (below 2**53), in the order of ranks. Raises as `meet` does."""
        return [int(each) for each in self.meet(what, own=value)[1]]

    def collect(self, what: str, message: bytes) -> list[bytes]:
        """Every rank's message, of whatever length, in the order of ranks. Raises as `meet` does."""
        if self.group is None:
            return [message]
        sizes = self.gather(what, len(message))
        own = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        own[: len(message)] = _bytes_in(message)
        flight, room = self.ready_rows(own.to(self._device), [len(own)] * self.size)
        self.meet(what)
        self.run(flight)
        return [bytes_of(row[:size]) for row, size in zip(room, sizes, strict=True)]

    def broadcast(self, what: str, tensor: Tensor) -> Tensor:
        """Overwrites `tensor` with rank 0's, which has the same shape and dtype, and returns it. Raises as `meet`."""
        if self.group is None:
            return tensor
        # No backend is sure to know bools, and none takes a tensor with gaps.
        message = (tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor).detach().contiguous()
        if self._device.type != "cpu":
            message = message.to(self._device)
        self.meet(what)
        with answering(self.group):
            dist.broadcast(message, src=dist.get_global_rank(self.group, 0), group=self.group)
        if message.data_ptr() != tensor.data_ptr():
            with torch.no_grad():
                tensor.copy_(message)
        return tensor

    def send(self, what: str, message: bytes) -> bytes:
        """Rank 0's message, of whatever length; what the others give is not looked at. Raises as `meet` does."""
        if self.group is None:
            return message
        size = self.gather(what, len(message))[0]
        parts = []
        for start in range(0, size, BUCKET_BYTES):
            part = torch.zeros(min(BUCKET_BYTES, size - start), dtype=torch.uint8)
            if self.rank == 0:
                part.copy_(_bytes_in(message[start : start + BUCKET_BYTES]))
            parts.append(bytes_of(self.broadcast(what, part)))
        return b"".join(parts)

    @torch.no_grad()
    def ready(self, tensors: Sequence[Tensor]) -> Flight:
        """What overwrites dense `tensors` with their sums over all ranks, once `run` is called with it.

        All memory is allocated here. All ranks give tensors of the same sizes and dtypes in the same order, and meet
        before they run it.
        """
        flight = Flight()
        small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors if self.group is not None else ():
            if tensor.numel() * tensor.element_size() < LARGE_BYTES:
                small.setdefault((tensor.dtype, tensor.device), []).append(tensor)
            elif tensor.is_contiguous():
                flight.starts.append(self._summing(tensor))
            else:
                copy = tensor.contiguous()
                flight.starts.append(self._summing(copy))
                flight.lands.append(partial(_unpack, copy, [tensor]))
        for alike in small.values():
            for bucket in _buckets(alike):
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                flight.starts.append(self._summing(flat))
                flight.lands.append(partial(_unpack, flat, bucket))
        return flight

    def _summing(self, tensor: Tensor) -> Callable[[], Any]:
        return partial(dist.all_reduce, tensor, group=self.group, async_op=True)

    @torch.no_grad()
    def run(self, flight: Flight) -> None:
        """Starts all of the flight's collectives, then waits for all of them.

        Raises:
            LostRankError: another process ended, or no longer answers.
        """
        if flight.starts:
            with answering(self.group):
                for work in [start() for start in flight.starts]:
                    work.wait()
        for land in flight.lands:
            land()

    def sum(self, what: str, tensors: Sequence[Tensor]) -> None:
        """Overwrites every one of dense `tensors` with its sum over all ranks.

        Raises:
            SetupError: the ranks' differ in number, size or dtype. And as `meet`.
        """
        flight = self.ready(tensors)
        described = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]
        _, sizes = self.meet(what, own=digest(described))
        if len(set(sizes)) > 1:
            raise told(SetupError(f"the ranks add up tensors of other shapes in {what}; rank {self.rank}'s are "
                                   f"{described[:3]}: build the same model on every rank"))  # fmt: skip
        self.run(flight)

    def ready_rows(self, tensor: Tensor, counts: Sequence[int]) -> tuple[Flight, list[Tensor]]:
        """What gathers every rank's `tensor`, of `counts[rank]` rows each, and where they will stand."""
        if self.group is None:
            return Flight(), [tensor]
        rows = tensor.new_zeros((max(counts), *tensor.shape[1:]))
        rows[: len(tensor)] = tensor
        room = [torch.empty_like(rows) for _ in counts]
        start = partial(dist.all_gather, room, rows, group=self.group, async_op=True)
        # Cut to length: padding would add zeros to row 0, and a sparse optimizer would step that row.
        return Flight([start]), [part[:count] for part, count in zip(room, counts, strict=True)]

    def agree(self, what: str, facts: Mapping[str, Any], advice: str) -> None:
        """Compares what all ranks must have alike: plain values by name. `advice` ends the error's message.

        Raises:
            SetupError: they differ; all that differs is named, with each rank's value, on all ranks. And as `meet`.
        """
        if self.group is None:
            return
        if self.group not in PROCESSES:  # which process each is, once a group, for when one no longer answers
            processes = self.collect(what, json.dumps(this_process()).encode())
            PROCESSES[self.group] = [json.loads(message) for message in processes]
        own = json.dumps(facts, default=str)
        _, digests = self.meet(what, own=digest(own))
        if len(set(digests)) == 1:
            return
        everyone = [json.loads(message) for message in self.collect(what, own.encode())]
        names = dict.fromkeys(name for facts in everyone for name in facts)
        different = [name for name in names if len({json.dumps(facts.get(name)) for facts in everyone}) > 1]
        said = [f"{name}: {by_rank([short(facts.get(name)) for facts in everyone], 'has', 'have')}"
                for name in different[:_NAMED]]  # fmt: skip
        more = f"; and {len(different) - _NAMED} more" if len(different) > _NAMED else ""
        raise told(SetupError(f"the ranks differ in what they must have alike. {'; '.join(said)}{more}. {advice}"))

    def _apart(self, what: str) -> str:
        """All ranks know that they are apart, so all of them say where they are."""
        own = _bytes_in(what.encode()[:_PLACE_BYTES].ljust(_PLACE_BYTES)).to(self._device)
        flight, room = self.ready_rows(own, [_PLACE_BYTES] * self.size)
        self.run(flight)
        texts = [bytes_of(row).decode(errors="replace").strip() for row in room]
        return f"{by_rank(texts, 'is in', 'are in')}: call it on every rank, in the same order"


def _bytes_in(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else torch.empty(0, dtype=torch.uint8)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors in order, those together that begin within the size of one bucket."""
    begins = accumulate((tensor.numel() * tensor.element_size() for tensor in tensors), initial=0)
    parts = groupby(zip(tensors, begins), key=lambda each: each[1] // BUCKET_BYTES)
    return [[tensor for tensor, _ in part] for _, part in parts]


def _unpack(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    parts = torch.split_with_sizes(flat.view(-1), [tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))
