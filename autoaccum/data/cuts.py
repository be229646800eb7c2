"""How the plan cuts what lies ahead: a window's samples, this rank's part of them, its micro-batches.

The plan is asked for each window anew, since it changes when memory runs out. Sources ask here and never look into a
plan themselves; the arithmetic is `planning.split`'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from autoaccum.data import tree
from autoaccum.data.sample_lengths import ByLength
from autoaccum.errors import DataError, PlanError
from autoaccum.planning.plan import Plan
from autoaccum.planning.split import Windows, even_split

__all__ = ["Cut", "Cutter", "Look"]

Look = Callable[[int], tuple[int, bool]]
"""How many samples lie ahead, looked for up to so many, and whether there will be no more."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A window of `total` samples over all ranks: this rank has [start, stop) of them, in micro-batches of `sizes`."""

    total: int
    start: int
    stop: int
    sizes: tuple[int, ...]


class Cutter:
    """Cuts windows by whatever `plan()` says at the time.

    With `drop_last` a short last window is dropped, whatever the plan says. With `batch` samples at the epoch's end
    that are short of a batch of so many are left out, whatever the windows are: such a cutter begins at the epoch's
    beginning.
    """

    def __init__(self, plan: Callable[[], Plan], drop_last: bool, batch: int = 1) -> None:
        self._ask, self._drop_last, self._batch, self._before = plan, drop_last, batch, 0
        self._known: tuple[Plan, Windows] | None = None
        self._cuts: dict[int, Cut] = {}

    def total(self, look: Look) -> int:
        """Samples of the next window over all ranks; 0 where the epoch is over.

        A tail that is too small to be cut (see `planning.split.Windows`) is part of the window before it.
        """
        windows = self._asked()[1]
        ahead, ended = look(windows.target + windows.look_ahead + self._batch - 1)
        ahead -= (self._before + ahead) % self._batch  # up to the end of the last batch that is seen to be full
        total = windows.next(ahead, ended=ended)
        assert total is not None  # as much was looked for as the answer needs
        self._before += total
        return total

    def cut(self, total: int) -> Cut:
        """This rank's part of a window of `total` samples; a PlanError where the plan cannot cut it."""
        plan = self.plan
        if total not in self._cuts:
            self._cuts[total] = Cut(total, *plan.share(total), plan.split(total))
        return self._cuts[total]

    def pieces(self, portions: Sequence[Any], by_length: ByLength | None = None) -> list[Any]:
        """Ready batches, or what a window takes of them, each cut evenly into micro-batches that fit at its length.

        One that is below the plan's minimum joins its neighbour; a DataError where it can be neither cut nor joined.
        """
        plan = self.plan
        limit = plan.limits[plan.rank]
        pieces = []
        for portion in _joined(portions, plan.minimum):
            samples = tree.batch_size(portion)
            if by_length is not None:
                limit = by_length.limit(portion)
            if plan.minimum <= samples <= limit:
                pieces.append(portion)
                continue
            try:
                sizes = even_split(samples, limit, minimum=plan.minimum, multiple_of=plan.multiple_of)
            except PlanError as error:
                raise DataError(
                    f"{samples} samples of a ready batch fall into one window, and cannot be cut into micro-batches of "
                    f"{plan.minimum} to {limit}: choose a target batch that is a multiple of the loader's batches, or "
                    "give a loader with batch_size=, whose batching can be redone"
                ) from error
            pieces += tree.split(portion, sizes)
        return pieces

    @property
    def plan(self) -> Plan:
        """The plan as it is now."""
        return self._asked()[0]

    def _asked(self) -> tuple[Plan, Windows]:
        plan = self._ask()
        if self._known is None or plan is not self._known[0]:
            windows = plan.windows
            self._known, self._cuts = (plan, windows._replace(tail="drop") if self._drop_last else windows), {}
        return self._known


def _joined(portions: Sequence[Any], minimum: int) -> list[Any]:
    """The portions, each below `minimum` samples joined to the one before it; the first to the one behind it."""
    result: list[Any] = []
    for portion in portions:
        if result and min(tree.batch_size(portion), tree.batch_size(result[-1])) < minimum:
            result[-1] = tree.join([result[-1], portion])
        else:
            result.append(portion)
    return result
