"""Is a trainer's own accumulated gradient the batch's? Found by running its own code on a few of its own samples.

The whole batch is run at once, as one micro-batch whose loss is a plain mean; then the trainer accumulates the same
samples as it is configured. Where the two differ, each micro-batch is run alone: what the trainer's gradient is made of
them (added up undivided, averaged each by itself, a multiple of the whole's) names the cause.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from autoaccum.checking.diagnosis import Cause
from autoaccum.checking.verify import VerifyReport
from autoaccum.data.base import Source
from autoaccum.data.piece import Piece
from autoaccum.loss.asking import rounding
from autoaccum.loss.call import targets_in
from autoaccum.loss.counts import holds_indices
from autoaccum.model.snapshot import Snapshot
from autoaccum.window.determinism import Determinism

__all__ = ["Subject", "examine", "looked_at"]

_MOST_STEPS, _MOST_SAMPLES = 16, 4  # micro-batches that a check runs, and samples of one

_HOPELESS = 0.05  # above this much noise there is nothing to compare


@dataclass(frozen=True)
class Subject:
    """A trainer whose accumulation is looked at.

    Attributes:
        name: what it is called: "Trainer".
        setting: what says how many micro-batches it accumulates: "gradient_accumulation_steps".
        steps: how many those are, in the check; `asked` as the user configured it.
        model: trained; the gradient is looked at in its parameters.
        device: where it is.
        samples: as Pieces of one sample each.
        collate: makes a Piece of samples.
        plain: backward of the plain mean loss of one batch.
        own: the trainer's own forwards and backwards of so many batches, as one window; the second argument makes each
            when it is its turn, and again before its forward where it was fetched ahead.
        preserved: a context after which the trainer is as before.
        blame: why micro-batches are added up undivided, in the trainer's own terms.
        mend: the line that would mend it.
    """

    name: str
    setting: str
    steps: int
    asked: int
    model: nn.Module
    device: torch.device
    samples: Sequence[Any]
    collate: Callable[[list[Any]], Piece]
    plain: Callable[[Any], None]
    own: Callable[[int, Callable[[int], Any]], None]
    preserved: Callable[[], AbstractContextManager[Any]]
    blame: str
    mend: str


def looked_at(source: Source, asked: int, batch: int | None) -> tuple[int, Sequence[Any]]:
    """(micro-batches of the check, its samples): of a trainer that accumulates `asked` of `batch` samples."""
    steps = min(asked, _MOST_STEPS)
    few = steps * min(max(batch or 2, 2), _MOST_SAMPLES)
    return steps, source.trial(few if source.length is None else min(few, source.length)).samples if steps > 1 else []


def examine(subject: Subject) -> VerifyReport:
    """Compares; nothing is trained, and model, trainer and random generators are as before afterwards.

    Raises:
        LossError, SetupError: what the trainer's own step raises is its own; ours where its loss cannot be had.
    """
    if subject.steps < 2:
        return _unverifiable(
            f"{subject.setting}={subject.asked}: your {subject.name} accumulates nothing, so there is nothing to see"
        )
    if len(subject.samples) < 2 * subject.steps:
        return _unverifiable(
            f"{len(subject.samples)} samples cannot be made into {subject.steps} micro-batches of at least 2"
        )
    stand_in = torch.optim.SGD([p for p in subject.model.parameters() if p.requires_grad], lr=0.0)
    fixed = Determinism(subject.model, samples=len(subject.samples), device=subject.device)
    with subject.preserved(), Snapshot(subject.model, stand_in, device=subject.device), fixed:
        return _Examination(subject, fixed).report()


class _Examination:
    def __init__(self, subject: Subject, fixed: Determinism) -> None:
        self._subject, self._fixed = subject, fixed
        self._named = [(name, p) for name, p in subject.model.named_parameters() if p.requires_grad]
        size = len(subject.samples) // subject.steps
        order = sorted(range(size * subject.steps), key=self._weight)
        # Neighbours by weight together, so that micro-batches count as unequally as these samples let them.
        self._groups = [order[start : start + size] for start in range(0, len(order), size)]

    def report(self) -> VerifyReport:
        subject, groups = self._subject, self._groups
        whole = list(chain(*groups))
        reference = self._alone(whole)
        norm = _norm(reference)
        if norm == 0 or not math.isfinite(norm):
            return _unverifiable(
                f"the gradient of {len(whole)} samples has the norm {norm:g}: there is nothing to compare"
            )
        noise = self._error(self._alone(whole), reference)
        if noise > _HOPELESS:
            return _unverifiable(
                f"the same {len(whole)} samples give gradients that differ by {noise:.2g} of their norm, through "
                "randomness that cannot be switched off",
                Cause.RANDOM,
            )
        tolerance = max(rounding(self._fixed.noise.formats, subject.device), 10 * noise)
        full = self._own(groups)
        error, ratio = self._error(full, reference), _product(full, reference) / norm**2
        if error > tolerance:
            return self._failed(groups, full, reference, error, ratio, tolerance)
        tail = groups[: max(subject.steps // 2, 1)]
        tail = [*tail[:-1], tail[-1][: max(len(tail[-1]) - 1, 1)]]
        shorter = self._alone(list(chain(*tail)))
        end = self._own(tail)
        off, short = self._error(end, shorter), _product(end, shorter) / _norm(shorter) ** 2
        if off > tolerance:
            return self._failed(tail, end, shorter, off, short, tolerance, tail=True)
        text = (
            f"your {subject.name}'s accumulated gradient is the batch's: {len(whole)} samples at once and as "
            f"{subject.setting}={subject.steps} differ by {error:.1g} of its norm (tolerance {tolerance:.1g}), and so "
            f"does an epoch's short last window, by {off:.1g}"
        )
        return VerifyReport(True, True, error, ratio, None, None, text)

    def _failed(
        self, groups: list[list[int]], own: list[Tensor], reference: list[Tensor], error: float, ratio: float,
        tolerance: float, tail: bool = False,
    ) -> VerifyReport:  # fmt: skip
        subject, k = self._subject, len(groups)
        where = (
            f"the last window of an epoch, of {k} micro-batches where {subject.setting}={subject.steps}"
            if tail
            else f"{subject.setting}={subject.steps}"
        )
        cause, why = self._why(groups, own, reference, ratio, tolerance, tail)
        worst = max(zip(self._named, own, reference, strict=True), key=lambda each: float((each[1] - each[2]).norm()))[
            0
        ][0]
        off = f"{ratio:.2f} × the batch's" if abs(ratio - 1) > 0.05 else f"{error:.2g} of its norm off the batch's"
        asked = "" if subject.asked == subject.steps else f" (looked at in the place of your {subject.asked})"
        text = f"your {subject.name}'s gradient is {off} at {where}{asked}: {why}.\n{subject.mend}"
        return VerifyReport(False, True, error, ratio, cause, worst, text)

    def _why(
        self, groups: list[list[int]], own: list[Tensor], reference: list[Tensor], ratio: float, tolerance: float,
        tail: bool,
    ) -> tuple[str, str]:  # fmt: skip
        k, steps = len(groups), self._subject.steps
        alone = [self._alone(group) for group in groups]
        added = [torch.stack(parts).sum(0) for parts in zip(*alone, strict=True)]
        near = 10 * tolerance

        def of(factor: float) -> bool:
            return self._error(own, [part * factor for part in added]) <= near

        if self._coupled(alone, reference, near):
            return Cause.COUPLED, (
                "its loss compares samples with one another (contrastive pairs, statistics over the batch), so that no "
                "weights of the micro-batches give the whole batch's gradient"
            )
        if of(1.0):
            return Cause.TOO_LARGE, self._subject.blame
        if of(1.0 / k):
            return Cause.UNEVEN, (
                "what a micro-batch counts (its tokens) is averaged per micro-batch, and the means are averaged, so "
                "that a token of a short micro-batch weighs more than one of a long one"
            )
        if tail and of(1.0 / steps):
            return Cause.TOO_SMALL, f"each of its {k} micro-batches is divided by {steps}, as if it were full"
        if self._error(own, [part * ratio for part in reference]) <= near:
            return (Cause.TOO_LARGE if ratio > 1 else Cause.TOO_SMALL), (
                "it divides by another count than its loss does: labels are counted that the model shifts away, or "
                "ignores"
            )
        return Cause.UNEVEN, "its micro-batches are weighted by something else than what its loss divides by"

    def _coupled(self, alone: list[list[Tensor]], reference: list[Tensor], near: float) -> bool:
        """Whether no weights of the micro-batches' gradients give the whole batch's."""
        gram = torch.tensor([[_product(a, b) for b in alone] for a in alone], dtype=torch.float64)
        right = torch.tensor([_product(a, reference) for a in alone], dtype=torch.float64)
        weights = torch.linalg.lstsq(gram, right[:, None], driver="gelsd").solution.flatten().tolist()
        fitted = [
            torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum(0)
            for parts in zip(*alone, strict=True)
        ]
        return self._error(fitted, reference) > max(near, 1e-3)

    def _alone(self, places: list[int]) -> list[Tensor]:
        return self._run(lambda: self._subject.plain(self._turn(places)))

    def _own(self, groups: list[list[int]]) -> list[Tensor]:
        self._fixed.begin(list(chain(*groups)))
        return self._run(lambda: self._subject.own(len(groups), lambda place: self._turn(groups[place])))

    def _batch(self, places: list[int]) -> Any:
        return self._subject.collate([self._subject.samples[place] for place in places]).batch

    def _turn(self, places: list[int]) -> Any:
        """The batch of a micro-batch whose turn it is, for which the model is put back to its start."""
        self._fixed.begin(places)
        return self._batch(places)

    def _run(self, backward: Callable[[], None]) -> list[Tensor]:
        for _, parameter in self._named:
            parameter.grad = None
        backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad.detach().to_dense().clone() for _, p in self._named]
        for _, parameter in self._named:
            parameter.grad = None
        return found

    def _error(self, gradient: list[Tensor], reference: list[Tensor]) -> float:
        return _norm([a - b for a, b in zip(gradient, reference, strict=True)]) / _norm(reference)

    def _weight(self, place: int) -> float:
        batch = self._batch([place])
        labels = targets_in(batch, apart=isinstance(batch, (tuple, list)))
        return float((labels >= 0).sum()) if holds_indices(labels) else 0.0


def _norm(gradient: list[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().norm()) ** 2 for part in gradient))


def _product(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _unverifiable(why: str, cause: str | None = None) -> VerifyReport:
    return VerifyReport(True, False, None, None, cause, None, f"not verifiable: {why}")
