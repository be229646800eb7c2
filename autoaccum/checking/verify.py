"""Is the accumulated gradient the large batch's? Asked of the user's own model, before it is trained.

The whole batch is run at once, twice: what differs between the two cannot be held against accumulation. Then it is cut
raggedly, so that the parts have unequal denominators, and accumulated by the very code that trains (bench.py). Only
where that disagrees is more run: the whole batch in another order, for what rounding alone may do, and each part alone;
and the loss is read, for the cause (diagnosis.py).

The reference is the gradient of the loss as the user wrote it. What a loss divides by within one batch is never
doubted; doubted is what the parts' losses are weighted with.
"""

import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from autoaccum.checking.bench import Bench, Difference, Gradient, PartFailed, PartRaised
from autoaccum.checking.diagnosis import Cause, Diagnosis, declaration, diagnose, no_mean
from autoaccum.data import tree
from autoaccum.data.structure import AsSamples
from autoaccum.display.shown import Drawn
from autoaccum.interrupts import uninterrupted
from autoaccum.loss.asking import Rows, ragged
from autoaccum.loss.objective import Objective

__all__ = ["VerifyReport", "verify_gradient"]

_NOISE_FACTOR = 10  # by which the error may exceed what two runs of the whole batch differ by
_HOPELESS = 0.05  # above this much noise there is nothing to compare
_TINY = 1e-300
_CANCELLED = 1e3  # parts' gradients that are this much larger than the whole's leave rounding


@dataclass(frozen=True)
class VerifyReport(Drawn):
    """Whether the accumulated gradient is the large batch's.

    Attributes:
        ok: nothing is wrong as far as could be seen.
        verifiable: there was something to compare; False for a single sample, a batch that cannot be cut, a
            gradient of 0, and a random loss.
        relative_error: ‖g − ref‖ / ‖ref‖ over all parameters; g accumulated, ref of the whole batch at once.
        ratio: ⟨g, ref⟩ / ⟨ref, ref⟩; about k where the loss is not divided.
        cause: the likely cause in short, one of `diagnosis.Cause`; None where nothing is wrong.
        worst_parameter: the one whose gradient is off by most, in absolute terms; None where nothing is wrong.
        text: all of it for a reader, with what to declare; one to three lines.
    """

    ok: bool
    verifiable: bool
    relative_error: float | None
    ratio: float | None
    cause: str | None
    worst_parameter: str | None
    text: str

    _view = "verify_view"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@uninterrupted
def verify_gradient(
    objective: Objective, batch: Any, *, device: torch.device, precision: str, most: int
) -> VerifyReport:
    """Compares the gradient of a batch at once with the same accumulated over ragged micro-batches; about four steps.

    Model and random generators are left bit for bit as they were; no step is taken. The model, on `device`, is run in
    training mode, but without dropout, and with BatchNorm by its running statistics.

    Args:
        objective: the loss as declared, whose weighting is examined.
        batch: on the host; some of its samples are used, chosen so that their denominators differ.
        device: where the model is.
        precision: as in `fit`.
        most: samples that may be used. They run at once.

    Raises:
        LossError: the loss of the whole batch is not a scalar with a graph.
        DataError: the batch does not fit the calls.
        SetupError: the model cannot be trained.
    """
    available = tree.batch_size(batch)
    samples = min(available, most)
    if samples < 2:
        return _unverifiable(
            f"not verifiable: {samples} sample{'s' * (samples != 1)} in one micro-batch cannot be split, so there is "
            "nothing to compare with; see that the loss is a mean over samples, or declare its reduction"
        )
    for place, leaf in AsSamples(batch, available).uncut():
        return _unverifiable(
            f"not verifiable: {place} of the batch is of type {type(leaf).__name__}, which cannot be cut into samples, "
            "so there is nothing to compare with: see that the loss is a mean over samples, or declare its reduction; "
            "tensors, and tuples, dicts or dataclasses of them, can be cut"
        )
    with ExitStack() as stack:
        return _Examination(Bench(stack, objective, batch, samples, device, precision)).report()


class _Examination:
    """The runs in turn, and what is said of them."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        first, second = ragged(bench.samples)
        self._whole: Rows = tuple(range(bench.samples))
        self._pieces = [self._whole[:first], self._whole[first:]]
        self._split = f"{bench.samples} samples at once and accumulated as {first} + {second}"
        self._tolerance = 0.0
        self._reference: Gradient = []
        self._unfit: PartFailed | None = None  # a part whose loss is not finite
        self._shown = True  # whether the whole batch has a gradient

    def report(self) -> VerifyReport:
        """Says what the windows show, unless the loss's values over other samples showed that it is no mean."""
        found, reading = self._report(), self._bench.objective.reading
        alike = found.verifiable or not self._shown  # by chance
        if found.ok and reading.is_no_mean and alike:
            return self._refused("these need not differ, and the loss does over others", no_mean(reading.unseen or ""))
        return found

    def _report(self) -> VerifyReport:
        """Two windows of the whole batch, one of its parts; more only where these disagree."""
        bench = self._bench
        first = bench.window([self._whole])
        if isinstance(first, str):
            return _unverifiable(
                f"not verifiable: {first} over {bench.samples} samples, before any training: see that the data and the "
                "loss hold no NaN"
            )
        self._reference = [gradient.cpu() for gradient in first]
        del first
        self._allow(bench.rounding / _NOISE_FACTOR)
        repeated = self._compare(bench.window([self._whole]))
        self._shown = repeated.reference != 0
        if not self._shown:
            return _unverifiable(
                f"not verifiable: the gradient of {bench.samples} samples is 0, so there is nothing to compare: see "
                "that their targets count, and that the loss reaches a parameter that is trained"
            )
        if not repeated.error <= _HOPELESS:
            return self._random(repeated.error)
        self._allow(repeated.error)
        try:
            split = self._compare(bench.part(self._pieces))
            return self._passed(split) if split.error <= self._tolerance else self._doubted(split)
        except PartFailed as failure:
            return self._refused("only the first can be run", self._of_failure(failure))

    def _compare(self, gradient: Gradient | str) -> Difference:
        if isinstance(gradient, str):
            return Difference(float("inf"), float("nan"), "", float("nan"))
        return self._bench.difference(gradient, self._reference)

    def _allow(self, noise: float) -> None:
        """Takes what the whole batch itself differs by for no fault of accumulation."""
        self._tolerance = min(max(self._tolerance, _NOISE_FACTOR * noise), _HOPELESS)

    @cached_property
    def _alone(self) -> list[Tensor]:
        """Each part's own gradient; 0 where its loss is not finite, as nothing may count in it."""
        found = []
        for piece in self._pieces:
            try:
                found.append(self._bench.sampled(self._bench.part([piece])))
            except PartRaised:
                raise
            except PartFailed as failure:
                self._unfit = failure
                found.append(self._bench.sampled(self._bench.nothing))
        return found

    def _doubted(self, split: Difference) -> VerifyReport:
        """Parts and whole differ by more than the whole from itself: by rounding, by chance, or by a fault?"""
        bench = self._bench
        weighed = [float(own.norm()) * len(piece) / bench.samples for own, piece in zip(self._alone, self._pieces)]
        cancelled = math.fsum(weighed) / max(float(bench.sampled(self._reference).norm()), _TINY)
        if cancelled > _CANCELLED:
            return _unverifiable(
                f"not verifiable: single parts have gradients {cancelled:.0f} times as large as all "
                f"{bench.samples} samples together, whose gradient is what rounding leaves: the model fits them already"
            )
        order = self._compare(bench.window([self._whole[::-1]])).error
        suspected = bench.fixed.noise.unexplained or order > _HOPELESS
        if suspected and not self._compare(bench.window([self._whole], seed=1)).error <= self._tolerance:
            return self._random(order)
        if order > _HOPELESS:
            text = (
                f"a batch-coupled loss: the same samples in another order give another gradient (by {order:.2g}), so "
                "the model or the loss mixes neighbouring samples; accumulating cannot be right.\nSee that dimension 0 "
                "is the samples everywhere (an RNN needs batch_first=True), or use a micro-batch as large as the "
                "target batch"
            )
            return self._failed(split, Diagnosis(Cause.COUPLED, text))
        self._allow(max(order, bench.rounding * cancelled / _NOISE_FACTOR))
        if split.error <= self._tolerance:
            return self._passed(split)
        summed = torch.stack(self._alone).sum(0)
        off = float((bench.sampled(bench.part(self._pieces)) - summed).norm())
        diagnosis = diagnose(
            bench.objective, bench.read(), [bench.batch(rows) for rows in self._pieces],
            added_up=off <= self._tolerance * float(summed.norm()),
        )  # fmt: skip
        if diagnosis.cause == Cause.COUPLED:
            diagnosis = self._of_failure(self._unfit) if self._unfit is not None else self._priced(diagnosis)
        return self._failed(split, diagnosis)

    def _priced(self, diagnosis: Diagnosis) -> Diagnosis:
        """Of a loss that compares samples: how it can be accumulated all the same, and what that costs here."""
        objective = self._bench.objective
        if objective.coupled is not None:  # then it is the model that mixes samples
            return diagnosis
        how = 'reduction="coupled"' if objective.loss is not None else "step=autoaccum.Coupled(encode, loss)"
        text = (
            f"{diagnosis.text}.\nOr pass {how}: the loss is then computed over the whole window, exactly, and each "
            f"micro-batch runs forward twice: {self._bench.price_of_a_forward(self._pieces):.1f} × the time of a plain "
            "window here"
        )
        return diagnosis._replace(text=text)

    def _of_failure(self, failure: PartFailed) -> Diagnosis:
        """Of a part that could not be run, or has no finite loss."""
        if isinstance(failure, PartRaised):
            return Diagnosis(
                Cause.SIZE_BOUND,
                "the model or the loss reads the batch size (a fixed view or expand), or needs certain samples "
                f"together: {failure}.\nTake sizes from the tensors, or use a micro-batch as large as the target batch",
            )
        _, declare = declaration(self._bench.read())
        return Diagnosis(
            Cause.NOT_FINITE,
            "a part without targets, whose mean divides 0 by 0, or a loss that needs certain samples together: "
            f"{failure}.\n{declare}, which gives 0 there",
        )

    def _passed(self, split: Difference) -> VerifyReport:
        bench = self._bench
        text = (
            f"the accumulated gradient is the whole batch's: {self._split} differ by {split.error:.1g} of its norm "
            f"(tolerance {self._tolerance:.1g}, {bench.precision}); the loss {bench.objective.reason}"
        )
        if bench.fixed.normalises:
            text += "\nBatchNorm used its running statistics here; in training it normalises each micro-batch by itself"
        if bench.objective.coupled is not None:
            # A window of one micro-batch is the plain one.
            plain = torch.stack([own * len(p) / bench.samples for own, p in zip(self._alone, self._pieces)]).sum(0)
            whole = bench.sampled(self._reference)
            if float((plain - whole).norm()) <= self._tolerance * float(whole.norm()):
                text += (
                    "\nthe loss compares no samples: it is a mean over them, so that the second forward is for "
                    'nothing: take the declaration away (reduction="sample_mean")'
                )
        unseen = bench.objective.reading.unseen
        if unseen is not None:
            text += f"\nwhat the loss divides by was not seen, and these samples need not show it: {unseen}"
        return VerifyReport(True, True, split.error, split.ratio, None, None, text)

    def _failed(self, split: Difference, diagnosis: Diagnosis) -> VerifyReport:
        text = (
            f"the accumulated gradient is not the whole batch's: {self._split} differ by {split.error:.2g} of its norm "
            f"(tolerance {self._tolerance:.1g}), ratio {split.ratio:.3g}, most in {split.worst!r}.\n"
            f"Likely cause: {diagnosis.text}"
        )
        return VerifyReport(False, True, split.error, split.ratio, diagnosis.cause, split.worst, text)

    def _refused(self, what: str, diagnosis: Diagnosis) -> VerifyReport:
        text = f"{self._split}: {what}.\nLikely cause: {diagnosis.text}"
        return VerifyReport(False, True, None, None, diagnosis.cause, None, text)

    def _random(self, noise: float) -> VerifyReport:
        return _unverifiable(
            f"not verifiable: the same {self._bench.samples} samples give gradients that differ by {noise:.2g} of "
            "their norm, through randomness that cannot be switched off; torch's own functions could be fixed",
            Cause.RANDOM,
        )


def _unverifiable(text: str, cause: str | None = None) -> VerifyReport:
    return VerifyReport(True, False, None, None, cause, None, text)
