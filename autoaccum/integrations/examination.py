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
from autoaccum.data.structure import Piece
from autoaccum.loss.asking import rounding
from autoaccum.loss.call import targets_in
from autoaccum.loss.counts import holds_indices
from autoaccum.model.snapshot import Snapshot
from autoaccum.window.determinism import Determinism

__all__ = ["Examination", "looked_at"]

_MOST_STEPS, _MOST_SAMPLES = 16, 4  # micro-batches that a check runs, and samples of one

_HOPELESS = 0.05  # above this much noise there is nothing to compare
_AT_ONCE = 2**20  # elements of each gradient that are held in double precision


def looked_at(source: Source, asked: int, batch: int | None) -> tuple[int, Sequence[Any]]:
    """(micro-batches of the check, its samples): of a trainer that accumulates `asked` of `batch` samples."""
    steps = min(asked, _MOST_STEPS)
    few = steps * min(max(batch or 2, 2), _MOST_SAMPLES)
    return steps, source.trial(few if source.length is None else min(few, source.length)).samples if steps > 1 else []


@dataclass(frozen=True)
class Examination:
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

    def report(self) -> VerifyReport:
        """Compares; nothing is trained, and model, trainer and random generators are as before afterwards.

        Raises:
            LossError, SetupError: what the trainer's own step raises is its own; ours where its loss cannot be had.
        """
        if self.steps < 2:
            return _unverifiable(
                f"{self.setting}={self.asked}: your {self.name} accumulates nothing, so there is nothing to see"
            )
        if len(self.samples) < 2 * self.steps:
            return _unverifiable(
                f"{len(self.samples)} samples cannot be made into {self.steps} micro-batches of at least 2"
            )
        stand_in = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.0)
        fixed = Determinism(self.model, samples=len(self.samples), device=self.device)
        with self.preserved(), Snapshot(self.model, stand_in, device=self.device), fixed:
            return _Comparison(self, fixed).report()

    def batch(self, places: list[int]) -> Any:
        """The samples at these places, collated."""
        return self.collate([self.samples[place] for place in places]).batch

    def weight(self, place: int) -> float:
        """The labels that count in a sample."""
        batch = self.batch([place])
        labels = targets_in(batch, apart=isinstance(batch, (tuple, list)))
        return float((labels >= 0).sum()) if holds_indices(labels) else 0.0


class _Comparison:
    """The gradients of the same samples, run in several ways; each is one vector, over all parameters."""

    def __init__(self, of: Examination, fixed: Determinism) -> None:
        self._of, self._fixed = of, fixed
        self._named = [(name, p) for name, p in of.model.named_parameters() if p.requires_grad]
        size = len(of.samples) // of.steps
        order = sorted(range(size * of.steps), key=of.weight)
        # Neighbours by weight together, so that micro-batches count as unequally as these samples let them.
        self._groups = [order[start : start + size] for start in range(0, len(order), size)]

    def report(self) -> VerifyReport:
        of, groups = self._of, self._groups
        whole = list(chain(*groups))
        reference = self._alone(whole)
        norm = float(reference.norm())
        if norm == 0 or not math.isfinite(norm):
            return _unverifiable(
                f"the gradient of {len(whole)} samples has the norm {norm:g}: there is nothing to compare"
            )
        noise = _error(self._alone(whole), reference)
        if noise > _HOPELESS:
            return _unverifiable(
                f"the same {len(whole)} samples give gradients that differ by {noise:.2g} of their norm, through "
                "randomness that cannot be switched off",
                Cause.RANDOM,
            )
        tolerance = max(rounding(self._fixed.noise.formats, of.device), 10 * noise)
        full = self._own(groups)
        error = _error(full, reference)
        if error > tolerance:
            return self._failed(groups, full, reference, tolerance)
        tail = groups[: max(of.steps // 2, 1)]
        tail = [*tail[:-1], tail[-1][: max(len(tail[-1]) - 1, 1)]]
        shorter, end = self._alone(list(chain(*tail))), self._own(tail)
        off = _error(end, shorter)
        if off > tolerance:
            return self._failed(tail, end, shorter, tolerance, tail=True)
        text = (
            f"your {of.name}'s accumulated gradient is the batch's: {len(whole)} samples at once and as "
            f"{of.setting}={of.steps} differ by {error:.1g} of its norm (tolerance {tolerance:.1g}), and so "
            f"does an epoch's short last window, by {off:.1g}"
        )
        return VerifyReport(True, True, error, _ratio(full, reference), None, None, text)

    def _failed(
        self, groups: list[list[int]], own: Tensor, reference: Tensor, tolerance: float, tail: bool = False
    ) -> VerifyReport:
        of, error, ratio = self._of, _error(own, reference), _ratio(own, reference)
        where = f"{of.setting}={of.steps}"
        if tail:
            where = f"the last window of an epoch, of {len(groups)} micro-batches where {where}"
        cause, why = self._why(groups, own, reference, tolerance, tail)
        parts = torch.split(own - reference, [parameter.numel() for _, parameter in self._named])
        worst = max(zip(self._named, parts), key=lambda each: float(each[1].norm()))[0][0]
        off = f"{ratio:.2f} × the batch's" if abs(ratio - 1) > 0.05 else f"{error:.2g} of its norm off the batch's"
        asked = "" if of.asked == of.steps else f" (looked at in the place of your {of.asked})"
        text = f"your {of.name}'s gradient is {off} at {where}{asked}: {why}.\n{of.mend}"
        return VerifyReport(False, True, error, ratio, cause, worst, text)

    def _why(
        self, groups: list[list[int]], own: Tensor, reference: Tensor, tolerance: float, tail: bool
    ) -> tuple[str, str]:
        k, steps, ratio, near = len(groups), self._of.steps, _ratio(own, reference), 10 * tolerance
        alone = torch.stack([self._alone(group) for group in groups])
        added = alone.sum(0)
        # Whether no weights of the micro-batches' gradients give the whole batch's.
        gram, right = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
        for own_part, part in zip(torch.split(alone, _AT_ONCE, 1), torch.split(reference, _AT_ONCE)):
            # In double precision, or gradients that are nearly parallel would seem to be coupled.
            rows = own_part.cpu().double()
            gram, right = gram + rows @ rows.T, right + rows @ part.cpu().double()
        weights = torch.linalg.lstsq(gram, right[:, None], driver="gelsd").solution.flatten().to(alone)
        if _error(weights @ alone, reference) > max(near, 1e-3):
            return Cause.COUPLED, (
                "its loss compares samples with one another (contrastive pairs, statistics over the batch), so that no "
                "weights of the micro-batches give the whole batch's gradient"
            )
        if _error(own, added) <= near:
            return Cause.TOO_LARGE, self._of.blame
        if _error(own, added / k) <= near:
            return Cause.UNEVEN, (
                "what a micro-batch counts (its tokens) is averaged per micro-batch, and the means are averaged, so "
                "that a token of a short micro-batch weighs more than one of a long one"
            )
        if tail and _error(own, added / steps) <= near:
            return Cause.TOO_SMALL, f"each of its {k} micro-batches is divided by {steps}, as if it were full"
        if _error(own, reference * ratio) <= near:
            return (Cause.TOO_LARGE if ratio > 1 else Cause.TOO_SMALL), (
                "it divides by another count than its loss does: labels are counted that the model shifts away, or "
                "ignores"
            )
        return Cause.UNEVEN, "its micro-batches are weighted by something else than what its loss divides by"

    def _alone(self, places: list[int]) -> Tensor:
        return self._run(lambda: self._of.plain(self._turn(places)))

    def _own(self, groups: list[list[int]]) -> Tensor:
        self._fixed.begin(list(chain(*groups)))
        return self._run(lambda: self._of.own(len(groups), lambda place: self._turn(groups[place])))

    def _turn(self, places: list[int]) -> Any:
        """The batch of a micro-batch whose turn it is, for which the model is put back to its start."""
        self._fixed.begin(places)
        return self._of.batch(places)

    def _run(self, backward: Callable[[], None]) -> Tensor:
        parameters = [parameter for _, parameter in self._named]
        for parameter in parameters:
            parameter.grad = None
        backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad.detach().to_dense() for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        flat = [each.flatten() if each.dtype == torch.float64 else each.flatten().float() for each in found]
        return torch.cat([each.to(flat[0].device) for each in flat])  # a model may lie on several


def _error(gradient: Tensor, reference: Tensor) -> float:
    return float((gradient - reference).norm()) / float(reference.norm())


def _ratio(gradient: Tensor, reference: Tensor) -> float:
    return float((gradient * reference).sum()) / float(reference.norm()) ** 2


def _unverifiable(why: str, cause: str | None = None) -> VerifyReport:
    return VerifyReport(True, False, None, None, cause, None, f"not verifiable: {why}")
