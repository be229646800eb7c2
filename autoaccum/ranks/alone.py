"""A single process, and what each of its methods means where there are several: what the rest of the package calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Flight", "Ranks"]


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
    """A single process: rank 0 of 1, whose sums are its own numbers.

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

    def fail(self) -> None:
        """Lets the other ranks stop in their next exchange; to be called where an error is handled.

        Nothing where they know of that error already, or where it came from one of them.
        """

    def meet(
        self, what: str, values: Sequence[float] = (), own: float = 0, *, failed: bool = False
    ) -> tuple[list[float], list[float]]:
        """(the sums of each of `values` over all ranks, every rank's `own`), in float64.

        Every rank gives equally many values. A rank that cannot go on calls it with `failed=True` and then raises its
        own error; all others raise here.

        Raises:
            AutoaccumError: other ranks said `failed=True`; it names them.
            LostRankError: another process ended, or no longer answers.
            SetupError: the ranks are at different places; or more than 64 values.
        """
        return [float(value) for value in values], [float(own)]

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
        return [message]

    def broadcast(self, what: str, tensor: Tensor) -> Tensor:
        """Overwrites `tensor` with rank 0's, which has the same shape and dtype, and returns it. Raises as `meet`."""
        return tensor

    def send(self, what: str, message: bytes) -> bytes:
        """Rank 0's message, of whatever length; what the others give is not looked at. Raises as `meet` does."""
        return message

    def ready(self, tensors: Sequence[Tensor]) -> Flight:
        """What overwrites dense `tensors` with their sums over all ranks, once `run` is called with it.

        All memory is allocated here. All ranks give tensors of the same sizes and dtypes in the same order, and meet
        before they run it.
        """
        return Flight()

    def run(self, flight: Flight) -> None:
        """Starts all of the flight's collectives, then waits for all of them.

        Raises:
            LostRankError: another process ended, or no longer answers.
        """

    def sum(self, what: str, tensors: Sequence[Tensor]) -> None:
        """Overwrites every one of dense `tensors` with its sum over all ranks.

        Raises:
            SetupError: the ranks' differ in number, size or dtype. And as `meet`.
        """

    def ready_rows(self, tensor: Tensor, counts: Sequence[int]) -> tuple[Flight, list[Tensor]]:
        """What gathers every rank's `tensor`, of `counts[rank]` rows each, and where they will stand."""
        return Flight(), [tensor]

    def agree(self, what: str, facts: Mapping[str, Any], advice: str) -> None:
        """Compares what all ranks must have alike: plain values by name. `advice` ends the error's message.

        Raises:
            SetupError: they differ; all that differs is named, with each rank's value, on all ranks. And as `meet`.
        """
