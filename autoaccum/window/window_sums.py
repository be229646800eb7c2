"""The sums of an open window: its samples, its denominators, its loss so far.

Denominators that follow from the batches are summed before the first backward, so that each micro-batch's loss enters
with its true weight. One that is only known afterwards enters divided by what it is expected to be, or the window's
samples (raw sums would overflow in fp16), and is put right once, at the end.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autoaccum.data import tree
from autoaccum.errors import LossError
from autoaccum.loss.mean import Mean, Several
from autoaccum.loss.objective import Objective
from autoaccum.ranks import Ranks

__all__ = ["Parts", "WindowSums"]

Parts = list[tuple[Tensor, float]]
"""A micro-batch's part of its window's loss: scalars with a graph, and what each is multiplied by."""


class Figures:
    """Numbers on their way from a device to the host, which nobody has to wait for yet.

    A copy to pinned memory is queued behind what makes the numbers. Reading them waits until that has run, and not for
    what was queued since: of a loss that is fetched before its backward pass, the forward pass. `at_hand`: they are on
    the host already.
    """

    def __init__(self, values: Tensor) -> None:
        """Begins to fetch them; other devices than CUDA's are waited for when they are read."""
        self._values, self._event, self.at_hand = values.detach(), None, values.device.type == "cpu"
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """All of them, in order."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values.reshape(-1).tolist()]


class WindowSums:
    """What is known of one window while it runs.

    Attributes:
        samples: of each micro-batch on this rank.
        total_samples: over the window and all ranks.
        micro_batches: on each rank.
        denominators: of each micro-batch by term; None where they are only known afterwards.
        totals: the same, summed over the window and all ranks.
        done: micro-batches run so far.
        started: the clock at the window's opening, in seconds.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        objective: Objective,
        denominators: list[dict[str, float]] | None,
        ranks: Ranks,
        what: str,
    ) -> None:
        """Sums over the micro-batches, on the host, and once over the ranks; `what` names the window in that exchange.

        The objective has `denominators` for these batches, names the terms, the same on every rank, and says what their
        sums come to.
        """
        self.started, self.done, reading = time.perf_counter(), 0, objective.reading
        self.samples = [tree.batch_size(batch) for batch in batches]
        self.denominators, self._whole = denominators, reading.whole
        own = float(sum(self.samples))
        # What is only known afterwards is divided by what it is expected to be: a good guess leaves nothing to correct,
        # and the whole batch's own rounding.
        if denominators is None:
            sums = [own, reading.expected(batches) or own]
        else:
            sums = [own, own, *(math.fsum(micro[name] for micro in denominators) for name in objective.names)]
        sums, counts = ranks.meet(what, [*sums, *reading.floors], own=len(batches))
        total, self._expected, *sums = reading.agree_on_floors(sums)
        self.total_samples, self.micro_batches = int(total), tuple(map(int, counts))
        self.totals = None
        if denominators is not None:
            self.totals = {name: self._whole(name, total) for name, total in zip(objective.names, sums, strict=True)}
        self._loss: Tensor | float = 0.0
        self._late: Tensor | float = 0.0
        self._fetched: list[Figures | float] = []  # the two, once no more is added

    @property
    def own(self) -> Mapping[str, float] | None:
        """The next micro-batch's denominators; None where they are only known afterwards."""
        return None if self.denominators is None else self.denominators[self.done]

    @property
    def counts(self) -> bool:
        """Whether anything in the next micro-batch counts: where all its targets are ignored, there is no gradient.

        A loss that is divided by something even then may have one.
        """
        own = self.own
        return own is None or any(own.values()) or any(map(self._whole, own, own.values()))

    def enter(self, terms: Mapping[str, Mean]) -> Parts:
        """The next micro-batch's part of the window's loss, to which it is added; none where nothing in it counts.

        Of the last one the sums are fetched from here on: they are there before the device has done the backward pass
        that follows, so that it still has work when they are read. A LossError for several terms whose denominators are
        only known afterwards.
        """
        totals, own = self.totals, self.own
        value: Tensor | None = None  # where the parts are not that
        if totals is None or own is None:
            parts = self._provisional(terms)
        elif not self.counts:
            parts = []
        elif isinstance(terms, Several):
            parts, value = terms.parts(totals)
        else:
            parts = [term.part(totals[name]) for name, term in terms.items() if own[name] or not term.is_empty]
        for tensor, factor in parts if value is None else [(value, 1.0)]:
            self.add(tensor, factor)
        if self.done + 1 == len(self.samples):
            both = (self._loss, self._late)
            self._fetched = [Figures(each) if isinstance(each, Tensor) else each for each in both]
        return parts

    def _provisional(self, terms: Mapping[str, Mean]) -> Parts:
        if len(terms) != 1:
            declare = ", ".join(f"{name!r}: f(batch)" for name in terms)
            raise LossError(
                f"the step returned {len(terms)} terms ({', '.join(terms)}) whose denominators are only known "
                f"afterwards, and one gradient cannot be corrected for each: declare them with reduction={{{declare}}}"
            )
        (term,) = terms.values()
        denominator = term.denominator
        if isinstance(denominator, Tensor):
            denominator = denominator.detach()
        elif term.is_empty:
            return []
        self._late = self._late + denominator
        return [term.part(self._expected)]

    def add(self, loss: Tensor, factor: float = 1.0) -> None:
        """Adds to the window's loss. What lies on a device is not waited for."""
        self._fetched = []
        self._loss = self._loss + (loss.item() if loss.device.type == "cpu" else loss.detach()) * factor

    @property
    def so_far(self) -> tuple[float, float]:
        """(this rank's part of the window's loss, denominators known only afterwards). Waits for their fetching."""
        both = self._fetched or (self._loss, self._late)
        loss, late = (each.read()[0] if isinstance(each, Figures) else float(each) for each in both)
        return loss, late

    def close(self, loss: float, late: float) -> tuple[float, float]:
        """(the window's loss over all ranks, what its gradients must be multiplied by; 0 where nothing counts).

        Of `so_far` of all ranks added up.
        """
        if self.totals is not None:
            return loss, float(any(self.totals.values()))
        whole = self._whole("loss", late)
        correction = self._expected / whole if whole else 0.0
        return loss * correction, correction
