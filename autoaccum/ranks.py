"""This process among others: how many there are, what they add up to, and whether all of them are still well.

A single process answers for itself and pays nothing. Several talk through PyTorch's default process group.

Choices:
- `tally`, `any` and `gather` are one and the same all-reduce, of a fixed size, and `broadcast` begins with it. So a
  rank that fails anywhere between two of them can say so in the next one, whatever the others call there: they raise,
  and nobody waits for the dead. An error that the others know of is told once, however many functions it passes.
- Gradients travel in flat buckets, so that many small ones cost one message; a bucket is all the memory this takes.
- Sparse gradients stay sparse. Each rank's rows are gathered and added, which works alike on gloo and NCCL (NCCL
  reduces no sparse tensors), and costs what is non-zero instead of the whole table.
"""

import atexit
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from autoaccum.errors import AutoaccumError, SetupError
from autoaccum.units import MIB

if dist.is_available():
    # It takes the group of the moment as its functions' default. Later, as a part of torch that an optimizer needs,
    # it would keep a destroyed group and its threads alive, and one that lets go of a tensor while the interpreter
    # ends aborts the process.
    import torch.distributed.nn

__all__ = ["BUCKET_BYTES", "Ranks", "ends_all", "here", "join"]

# As large as DistributedDataParallel's: large enough that latency does not count, small beside any model.
BUCKET_BYTES = 25 * MIB

# Numbers that one `tally` can carry. Fixed, because a failing rank does not know what the others send.
_SLOTS = 64

# Marks an error that all ranks know of.
_TOLD = "_autoaccum_told_to_all_ranks"


class Ranks:
    """A single process: rank 0 of 1, whose sums are its own numbers.

    Attributes:
        rank: this process's number, from 0.
        size: how many processes there are.
    """

    rank: int = 0
    size: int = 1

    def fail(self) -> None:
        """Lets the other ranks stop in their next exchange; to be called where an error is handled.

        Nothing where they know of that error already, or where it came from one of them.
        """

    def tally(self, values: Sequence[float] = (), *, failed: bool = False) -> list[float]:
        """The sums of each of `values` over all ranks, in float64; every rank gives equally many.

        A rank that cannot go on calls it with `failed=True` and then raises its own error; all others raise here.

        Raises:
            AutoaccumError: other ranks said `failed=True`; it names them.
            SetupError: more than 64 values.
        """
        return [float(value) for value in values]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank. Raises AutoaccumError as `tally` does."""
        return bool(self.tally([float(flag)])[0])

    def gather(self, value: int) -> list[int]:
        """Every rank's `value` (below 2**53), in the order of ranks. Raises AutoaccumError as `tally` does."""
        return [value]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrites `tensor` with rank 0's, which has the same shape and dtype, and returns it."""
        return tensor

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Overwrites every gradient with its sum over all ranks.

        All ranks give gradients of the same shapes and dtypes in the same order: one that a rank does not have is
        given as zeros. A gradient that is sparse on some ranks and dense on others keeps each rank's layout.
        """


class _Group(Ranks):
    """One rank of the default process group; `device` is where the group's backend wants its tensors."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self._device = dist.get_rank(), dist.get_world_size(), device

    def fail(self) -> None:
        error = sys.exc_info()[1]
        if hasattr(error, _TOLD):
            return
        if error is not None:
            setattr(error, _TOLD, True)
        try:
            self.tally(failed=True)
        except RuntimeError:
            return  # a connection is closed: the others have ended, and nobody waits

    def tally(self, values: Sequence[float] = (), *, failed: bool = False) -> list[float]:
        if len(values) > _SLOTS:
            raise SetupError(f"{len(values)} numbers to add up over the ranks: at most {_SLOTS}, so use fewer terms")
        return self._exchange(values, 0, failed)[self.size : self.size + len(values)]

    def gather(self, value: int) -> list[int]:
        return [int(each) for each in self._exchange((), value, False)[: self.size]]

    def _exchange(self, values: Sequence[float], own: int, failed: bool) -> list[float]:
        """One all-reduce: a slot of each rank's own, then the sums' slots, then a flag of each rank's own."""
        numbers = [0.0] * (2 * self.size + _SLOTS)
        numbers[self.rank] = float(own)
        numbers[self.size : self.size + len(values)] = [float(value) for value in values]
        numbers[self.size + _SLOTS + self.rank] = float(failed)
        packet = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(packet)
        answer: list[float] = packet.tolist()
        dead = [rank for rank, flag in enumerate(answer[self.size + _SLOTS :]) if flag]
        if dead and not failed:
            error = AutoaccumError(
                f"rank{'s' if len(dead) > 1 else ''} {', '.join(map(str, dead))} of {self.size} failed, so rank "
                f"{self.rank} stops as well: the cause is in the error that {'they' if len(dead) > 1 else 'it'} raised"
            )
            setattr(error, _TOLD, True)
            raise error
        return answer

    def broadcast(self, tensor: Tensor) -> Tensor:
        self._exchange((), 0, False)
        # No backend is sure to know bools, and none takes a tensor with gaps.
        message = (tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor).detach().contiguous()
        if self._device.type != "cpu":
            message = message.to(self._device)
        dist.broadcast(message, src=0)
        if message.data_ptr() != tensor.data_ptr():
            with torch.no_grad():
                tensor.copy_(message)
        return tensor

    @torch.no_grad()
    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        dense: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for gradient, dimensions in zip(gradients, self._sparse_dimensions(gradients), strict=True):
            if dimensions:
                self._sum_sparse(gradient, dimensions)
            else:
                dense.setdefault((gradient.dtype, gradient.device), []).append(gradient)
        for alike in dense.values():
            for bucket in _buckets(alike):
                _sum_flat(bucket)

    def _sparse_dimensions(self, gradients: Sequence[Tensor]) -> list[int]:
        """For each gradient: 0 where all ranks' are dense, else the number of sparse dimensions."""
        codes = [gradient.sparse_dim() if gradient.is_sparse else 0 for gradient in gradients]
        agreed = torch.tensor(codes, dtype=torch.int32, device=self._device)
        if codes:
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        return [int(code) for code in agreed.tolist()]

    def _sum_sparse(self, gradient: Tensor, dimensions: int) -> None:
        """Gathers every rank's non-zero rows, padded to the longest, and adds them up."""
        own = gradient.coalesce() if gradient.is_sparse else gradient.to_sparse(dimensions)
        counts = self.gather(own.indices().shape[1])
        indices, values = _padded(own.indices().T, max(counts)), _padded(own.values(), max(counts))
        all_indices = [torch.empty_like(indices) for _ in counts]
        all_values = [torch.empty_like(values) for _ in counts]
        dist.all_gather(all_indices, indices)
        dist.all_gather(all_values, values)
        # Cut to length again: padding would add zeros to row 0, and a sparse optimizer would step that row.
        rows = torch.cat([part[:count] for part, count in zip(all_indices, counts, strict=True)])
        entries = torch.cat([part[:count] for part, count in zip(all_values, counts, strict=True)])
        total = torch.sparse_coo_tensor(rows.T, entries, gradient.shape, check_invariants=False).coalesce()
        gradient.copy_(total if gradient.is_sparse else total.to_dense())


def join() -> None:
    """Joins the group where torchrun, or something with its environment, started this process and nobody has yet.

    Who joins leaves again: the group is destroyed when the process ends, before the interpreter does.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not asked or not dist.is_available() or dist.is_initialized():
        return
    atexit.register(_leave)
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local < torch.cuda.device_count():
        # Otherwise all ranks of a host would meet on its first GPU, where NCCL waits forever.
        torch.cuda.set_device(local)
    # A model may be trained on the CPU of a machine with GPUs, and small messages need not wait for a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl")


def _leave() -> None:
    if dist.is_initialized():
        # A thread of gloo's may still hold a tensor, and wait for the interpreter to let it go. Torch 2.4 joins that
        # thread without giving way to it, for ever.
        time.sleep(0.02)
        dist.destroy_process_group()


@contextmanager
def ends_all(together: bool = True) -> Iterator[None]:
    """For what all ranks do together and ends in an exchange: an error on one of them ends it on all."""
    try:
        yield
    except Exception:
        if together:
            here().fail()
        raise


def here(device: torch.device | None = None) -> Ranks:
    """This process among those of the initialised default process group; without one, a single process.

    `device` is where this process trains: a backend without CPU tensors (NCCL) talks through it. Where none is given,
    it is the current device, or under torchrun the one of the local rank.
    """
    if not dist.is_available() or not dist.is_initialized():
        return Ranks()
    return _Group(_meeting_place(dist.get_backend_config(), device))


def _meeting_place(backends: str, device: torch.device | None) -> torch.device:
    """The device for small messages, from a configuration such as "cpu:gloo,cuda:nccl"."""
    kinds = [part.split(":")[0] for part in backends.split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    if device is not None and device.type in kinds:
        return device
    # Where nobody has made a device current, all ranks of a host would meet on its first one: NCCL hangs there.
    api, local = getattr(torch, kinds[0]), int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device(kinds[0], api.current_device() or (local if local < api.device_count() else 0))


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Gradients in order, as many together as fit in a bucket, but at least one."""
    buckets: list[list[Tensor]] = []
    room = 0
    for gradient in gradients:
        size = gradient.numel() * gradient.element_size()
        if not buckets or size > room:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(gradient)
        room -= size
    return buckets


def _sum_flat(bucket: list[Tensor]) -> None:
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0])  # a large one needs no copy
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
    dist.all_reduce(flat)
    start = 0
    for gradient in bucket:
        gradient.copy_(flat[start : start + gradient.numel()].view(gradient.shape))
        start += gradient.numel()


def _padded(rows: Tensor, length: int) -> Tensor:
    padded = rows.new_zeros((length, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    return padded
