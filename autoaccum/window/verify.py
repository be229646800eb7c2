"""Is the accumulated gradient the large batch's? Asked of the user's own model, before it is trained.

The whole batch is run at once, twice: what differs between the two cannot be held against accumulation. Then it is
cut raggedly, so that the parts have unequal denominators, and accumulated by the very code that trains: an Accumulator
whose optimizer takes the gradient where another would step. Only where the two disagree is more run: the whole batch
in another order, for what rounding alone may do, and parts of it, for the cause (diagnosis.py).

The gradient of the reference is that of the loss as the user wrote it. What a loss is divided by within one batch is
never doubted; doubted is what the parts' losses are weighted with.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoaccum.data import tree
from autoaccum.data.structure import Reading
from autoaccum.errors import LossError
from autoaccum.memory.oom import Verdict, out_of_memory
from autoaccum.planning.plan import plan
from autoaccum.ranks import Ranks
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.call import targets_in
from autoaccum.window.counting import holds_indices
from autoaccum.window.determinism import Determinism
from autoaccum.window.diagnosis import (
    COUPLED,
    NOT_FINITE,
    RANDOM,
    SIZE_BOUND,
    Diagnosis,
    Evidence,
    Rows,
    diagnose,
    ragged,
)
from autoaccum.window.loss import Objective
from autoaccum.window.optimizer import trained_parameters
from autoaccum.window.snapshot import Snapshot

__all__ = ["VERIFIED_SAMPLES", "VerifyReport", "verify_gradient"]

VERIFIED_SAMPLES = 8

# Relative errors that rounding alone may make, by the coarsest number format that the gradient goes through. A fault
# in a denominator makes 1e-2 and more.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_ROUNDING_TF32 = 2e-3  # matrix kernels of accelerators, at their defaults
_NOISE_FACTOR = 10  # by which the error may exceed what two runs of the whole batch differ by
_HOPELESS = 0.05  # above this much noise there is nothing to compare
_CANCELLED = 1e3  # parts' gradients that are this much larger than the whole's: it is rounding
_FP16_ATTEMPTS = 24  # the loss scale is halved each time
_DIAGNOSED_ELEMENTS = 2**16  # of each parameter, looked at for the cause


@dataclass(frozen=True)
class VerifyReport:
    """Whether the accumulated gradient is the large batch's.

    Attributes:
        ok: nothing is wrong as far as could be seen.
        verifiable: there was something to compare; False for a single sample, a gradient of 0, and a random loss.
        relative_error: ‖g − ref‖ / ‖ref‖ over all parameters; g accumulated, ref of the whole batch at once.
        ratio: ⟨g, ref⟩ / ⟨ref, ref⟩; k where the loss is not divided.
        cause: the likely cause in short, where not ok: one of the names in diagnosis.py.
        worst_parameter: the one whose gradient is off by most, in absolute terms; where not ok.
        text: all of it for a reader, with what to declare; one to three lines.
    """

    ok: bool
    verifiable: bool
    relative_error: float | None
    ratio: float | None
    cause: str | None
    worst_parameter: str | None
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def verify_gradient(
    model: nn.Module,
    objective: Objective,
    batch: Any,
    *,
    device: torch.device | str,
    optimizer: Optimizer | None = None,
    precision: str | None = None,
    sizes: Sequence[int] | None = None,
) -> VerifyReport:
    """Compares the gradient of a batch at once with the same accumulated over ragged micro-batches; about four steps.

    Model, optimizer and random generators are left bit for bit as they were; no step is taken.

    Args:
        model: on `device`; it is run in training mode, without dropout, BatchNorm by its running statistics.
        objective: the loss as declared, whose weighting is examined.
        batch: on the host; at most 8 of its samples are used, those with the most unequal denominators.
        device: where the model is.
        optimizer: where given, only what it trains is compared.
        precision: as in `fit`; None: "auto".
        sizes: of the micro-batches, summing to the samples used; None: two ragged ones.

    Raises:
        LossError: the loss of the whole batch is not a scalar with a graph.
        DataError: the batch has no samples, or does not fit the calls.
        SetupError: the model cannot be trained.
    """
    place = torch.device(device)
    available = tree.batch_size(batch)
    samples = sum(sizes) if sizes is not None else min(available, VERIFIED_SAMPLES)
    if samples < 2 or available < samples or (sizes is not None and len(sizes) < 2):
        return _unverifiable(
            f"not verifiable: {min(samples, available)} sample at once cannot be cut into micro-batches, so there is "
            "nothing to compare. With one sample in each micro-batch make sure that the loss is a mean over samples, or "
            "declare its reduction."
        )
    with _Bench(model, objective, batch, samples, place, optimizer, precision or "auto") as bench:
        return _Examination(bench, tuple(sizes) if sizes is not None else ragged(samples)).report()


class _Difference(NamedTuple):
    """Of a gradient g from the reference: relative error, ratio, the parameter that is off by most, both norms."""

    error: float
    ratio: float
    worst: str
    norm: float
    reference: float


Gradient = list[Tensor | None]


class _PartFailed(Exception):
    """A micro-batch could not be run where the whole batch could."""


class _Bench:
    """The model made deterministic, and windows of chosen samples run on it."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        batch: Any,
        samples: int,
        device: torch.device,
        optimizer: Optimizer | None,
        precision: str,
    ) -> None:
        self.model, self.objective, self._device, self._precision = model, objective, device, precision
        self._batch, self.samples = batch, samples
        self._modules = [module for module in (model, objective.loss) if isinstance(module, nn.Module)]
        trained = trained_parameters(model, objective.loss)
        if optimizer is not None:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            trained = [parameter for parameter in trained if id(parameter) in held] or trained
        self._parameters = list(dict.fromkeys(trained))
        self._stack = ExitStack()

    def __enter__(self) -> "_Bench":
        with ExitStack() as stack:
            self._capture = _Capture(self._parameters)
            stack.enter_context(Snapshot(self.model, self._capture, *self._modules[1:], device=self._device))
            for module in self._modules:
                for parameter in module.parameters():
                    parameter.grad = None
            self.fixed = stack.enter_context(Determinism(self._modules, samples=self.samples, device=self._device))
            self._accumulator = Accumulator(
                self.model,
                self._capture,
                plan(self.samples, self.samples, batch_norm="keep"),
                objective=self.objective,
                precision=self._precision,
                on_nonfinite="skip",
                device=self._device,
                ranks=Ranks(),
            )
            stack.callback(self._accumulator.close)
            self.precision = self._accumulator.precision.name
            self.objective.measure(self._batch)
            self._batch = _arranged(self.objective, self._batch, self.samples)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def batch(self, rows: Sequence[int]) -> Any:
        """The samples at these places, on the host."""
        return _take(self._batch, rows)

    def window(self, pieces: Sequence[Sequence[int]], *, seed: int | None = None) -> Gradient | str:
        """The gradient of a window of these micro-batches, each a list of rows; or why there is none.

        The gradient is empty where no target counts.
        """
        accumulator = self._accumulator
        batches = [self.batch(rows) for rows in pieces]
        for _ in range(_FP16_ATTEMPTS):
            self._capture.gradients = None
            accumulator.open(batches)
            try:
                for rows, batch in zip(pieces, batches, strict=True):
                    self.fixed.begin(rows, seed=seed)
                    accumulator.run([batch])
            except BaseException:
                accumulator.discard()
                raise
            record = accumulator.finish()
            if self._capture.gradients is not None:
                return self._capture.gradients
            if not math.isfinite(record.loss):
                return f"the loss is {record.loss}"
            if not accumulator.precision.scaler.is_enabled():
                return []
        return "its fp16 gradients overflow at every loss scale"

    def part(self, pieces: Sequence[Sequence[int]]) -> Gradient:
        """`window`, of micro-batches where the whole batch could be run.

        Raises:
            _PartFailed: the model or the loss raised, or gave a loss that is not finite.
        """
        shown = " + ".join(str(len(piece)) for piece in pieces)
        try:
            found = self.window(pieces)
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError) as error:
            if out_of_memory(error) is not Verdict.NO:
                raise
            raise _PartFailed(SIZE_BOUND, f"{type(error).__name__} at {shown}: {error}") from error
        if isinstance(found, str):
            raise _PartFailed(NOT_FINITE, f"{found} at {shown}")
        return found

    def difference(self, gradient: Gradient, reference: Gradient) -> _Difference:
        """Compares, a parameter at a time; an empty gradient is 0."""
        names = {id(p): name for module in reversed(self._modules) for name, p in module.named_parameters()}
        own = error = product = 0.0
        whole, worst, name = 0.0, -1.0, ""
        for index, parameter in enumerate(self._parameters):
            g = _wide(gradient[index] if gradient else None, parameter)
            r = _wide(reference[index] if reference else None, parameter).to(g.device)
            off = float((g - r).norm()) ** 2
            own, error = own + float(g.norm()) ** 2, error + off
            product, whole = product + float(torch.dot(g, r)), whole + float(r.norm()) ** 2
            if not off <= worst:  # NaN is worst of all
                worst, name = off, names[id(parameter)]
        size = math.sqrt(whole) if whole > 0 else whole
        return _Difference(
            math.sqrt(error) / size if size else math.inf, product / whole if whole else math.inf, name, own**0.5, size
        )

    def sampled(self, gradient: Gradient) -> Tensor:
        """A vector of at most 65536 elements of each parameter, in double precision on the host."""
        chosen = []
        for index, parameter in enumerate(self._parameters):
            flat = _wide(gradient[index] if gradient else None, parameter)
            chosen.append(flat[:: math.ceil(flat.numel() / _DIAGNOSED_ELEMENTS) or 1].double().cpu())
        return torch.cat(chosen)

    @property
    def rounding(self) -> float:
        """The relative error that rounding alone may make."""
        formats = {p.dtype for p in self._parameters}
        formats |= {"bf16": {torch.bfloat16}, "fp16": {torch.float16}}.get(self.precision, set())
        coarsest = max(_ROUNDING.get(dtype, _ROUNDING[torch.float32]) for dtype in formats)
        if self._device.type != "cpu" and formats != {torch.float64}:
            coarsest = max(coarsest, _ROUNDING_TF32)
        return coarsest


class _Capture(Optimizer):
    """Stands where the user's optimizer stands, and takes the window's gradient where that would step."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.gradients: Gradient | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Takes no step."""
        self.gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]


class _Examination:
    """The runs in turn, and what is said of them."""

    def __init__(self, bench: _Bench, sizes: tuple[int, ...]) -> None:
        self._bench = bench
        self._whole: Rows = tuple(range(bench.samples))
        stops = [sum(sizes[: count + 1]) for count in range(len(sizes))]
        self._pieces = [self._whole[stop - size : stop] for stop, size in zip(stops, sizes, strict=True)]
        self._split = f"{bench.samples} samples at once against {' + '.join(map(str, sizes))}"
        self._tolerance = bench.rounding

    def report(self) -> VerifyReport:
        bench = self._bench
        found = bench.window([self._whole])
        if isinstance(found, str):
            return _unverifiable(f"not verifiable: {found} over {bench.samples} samples, before any training.")
        self._reference = [_host(gradient) for gradient in found]
        repeated = self._compare(bench.window([self._whole]))
        if repeated.reference == 0:
            return _unverifiable(
                f"not verifiable: the gradient of {bench.samples} samples is 0, so there is nothing to compare. See that "
                "their targets count and that the loss reaches a parameter that is trained."
            )
        if not math.isfinite(repeated.reference):
            return _unverifiable(f"not verifiable: the gradient of {bench.samples} samples is {repeated.reference}.")
        if not repeated.error <= _HOPELESS:
            return self._random(repeated.error)
        self._allow(repeated.error)
        try:
            split = self._compare(bench.part(self._pieces))
            return self._passed(split) if split.error <= self._tolerance else self._doubted(split)
        except _PartFailed as failure:
            return self._failed_part(*failure.args)

    def _compare(self, gradient: Gradient | str) -> _Difference:
        if isinstance(gradient, str):
            return _Difference(math.inf, math.inf, "", math.inf, self._norm())
        return self._bench.difference(gradient, self._reference)

    def _norm(self) -> float:
        return self._bench.difference(self._reference, self._reference).reference

    def _allow(self, noise: float) -> None:
        """Takes the noise of the whole batch itself for no fault of accumulation."""
        self._tolerance = min(max(self._tolerance, _NOISE_FACTOR * noise), _HOPELESS)

    def _doubted(self, split: _Difference) -> VerifyReport:
        """The split differs by more than rounding explains: is it the order, chance, or a fault?"""
        bench = self._bench
        order = self._compare(bench.window([self._whole[::-1]])).error
        evidence = Evidence(
            bench.samples, bench.batch, lambda pieces: bench.sampled(bench.part(pieces)), self._tolerance
        )
        parts = sum(float(evidence.of(part).norm()) * len(part) / bench.samples for part in evidence.parts)
        cancelled = parts / max(float(evidence.of(self._whole).norm()), 1e-300)
        if cancelled > _CANCELLED:
            return _unverifiable(
                f"not verifiable: the gradients of single parts are {cancelled:.0f} times larger than their mean, which is "
                "rounding alone: the model fits these samples already."
            )
        chance = bench.fixed.unexplained or order > _HOPELESS
        if chance and not self._compare(bench.window([self._whole], seed=1)).error <= self._tolerance:
            return self._random(order)
        if order <= _HOPELESS:
            self._allow(max(order, self._bench.rounding * cancelled / _NOISE_FACTOR))
            evidence.tolerance = self._tolerance
            if split.error <= self._tolerance:
                return self._passed(split)
            return self._failed(split, diagnose(bench.objective, evidence))
        return self._failed(
            split,
            Diagnosis(
                COUPLED,
                f"a batch-coupled loss: the same samples in another order give another gradient (by {order:.2g}), so the "
                "model or the loss mixes neighbouring samples, and accumulating cannot be right.\n"
                "See that dimension 0 is the samples everywhere (an RNN needs batch_first=True), or use a micro-batch as "
                "large as the target batch.",
            ),
        )

    def _passed(self, split: _Difference) -> VerifyReport:
        text = (
            f"the accumulated gradient is the whole batch's: {self._split} differ by {split.error:.1g} of its norm "
            f"(tolerance {self._tolerance:.1g}, {self._bench.precision}); the loss {self._bench.objective.reason}."
        )
        return VerifyReport(True, True, split.error, split.ratio, None, None, text + self._remarks())

    def _remarks(self) -> str:
        remark = ""
        if self._bench.fixed.normalises:
            remark += (
                "\nBatchNorm ran by its running statistics here; in training it normalises each micro-batch by itself."
            )
        if self._even():
            remark += "\nAll these samples have equally many labels that count, so unequal denominators were not seen."
        return remark

    def _even(self) -> bool:
        """Whether the loss is over tokens, and the samples could not show whether it is divided by tokens or samples."""
        objective, batch = self._bench.objective, self._bench.batch(self._whole)
        labels = targets_in(batch, apart=objective.loss is not None or objective.step is not None)
        if not holds_indices(labels) or labels.dim() < 2:
            return False
        counts = [objective.denominators(self._bench.batch([row])) for row in self._whole]
        return counts[0] is not None and all(count == counts[0] for count in counts)

    def _failed(self, split: _Difference, diagnosis: Diagnosis) -> VerifyReport:
        text = (
            f"the accumulated gradient is not the whole batch's: {self._split} differ by {split.error:.2g} of its norm "
            f"(tolerance {self._tolerance:.1g}), ratio {split.ratio:.3g}, most in {split.worst!r}.\n"
            f"Likely cause: {diagnosis.text}"
        )
        return VerifyReport(False, True, split.error, split.ratio, diagnosis.cause, split.worst, text)

    def _failed_part(self, cause: str, what: str) -> VerifyReport:
        if cause == NOT_FINITE:
            why = (
                "a part without targets, whose mean divides 0 by 0; or a loss that needs certain samples together.\n"
                "Return autoaccum.Mean(numerator, denominator) from step=, or declare reduction=f(batch) that gives 0 there."
            )
        else:
            why = (
                "the model or the loss reads the batch size (a fixed view or expand), or needs certain samples together "
                "(pairs, triplets).\nTake the size from the tensors, or use a micro-batch as large as the target batch."
            )
        text = f"{self._bench.samples} samples run at once, and fewer do not: {what}.\nLikely cause: {why}"
        return VerifyReport(False, True, None, None, cause, None, text)

    def _random(self, noise: float) -> VerifyReport:
        text = (
            f"not verifiable: the same {self._bench.samples} samples give gradients that differ by {noise:.2g} of their "
            "norm, through randomness that could not be fixed. To check the accumulation, draw with torch's functions or "
            "switch that part off."
        )
        return VerifyReport(True, False, None, None, RANDOM, None, text)


def _unverifiable(text: str) -> VerifyReport:
    return VerifyReport(True, False, None, None, None, None, text)


# --- samples ----------------------------------------------------------------------------------------------------------


def _take(batch: Any, rows: Sequence[int]) -> Any:
    """The samples at `rows`, on the host."""
    size = tree.batch_size(batch)

    def pick(leaf: Any) -> list[Any]:
        if isinstance(leaf, Tensor):
            if leaf.layout is torch.strided and not leaf.is_nested:
                return [leaf.index_select(0, torch.tensor(rows, dtype=torch.int64, device=leaf.device))]
            single = tree.split(leaf, [1] * size)
            return [tree.join([single[row] for row in rows])]
        return [type(leaf)(leaf[row] for row in rows) if isinstance(leaf, (list, tuple)) else leaf[list(rows)]]

    return Reading(batch, size).checked().parts(batch, pick, 1)[0]


def _arranged(objective: Objective, batch: Any, samples: int) -> Any:
    """As many of the samples, so ordered that a cut leaves unequal denominators: light ones first, heavy ones last."""
    size = tree.batch_size(batch)
    weights = [_weight(objective, _take(batch, [row])) for row in range(size)]
    order = sorted(range(size), key=lambda row: weights[row])
    order = [order[round(place * (size - 1) / (samples - 1))] for place in range(samples)]
    if not any(weights[order[0]]):
        order = [order[-1], *order[:-1]]  # the first part has something that counts too
    return _take(batch, order)


def _weight(objective: Objective, sample: Any) -> tuple[float, ...]:
    """What may count in a sample: its denominators as declared, its labels, its masks."""
    declared = objective.denominators(sample) or {}
    labels = targets_in(sample, apart=objective.loss is not None or objective.step is not None)
    tokens = float((labels >= 0).sum()) if holds_indices(labels) else 0.0
    masks = [
        float((leaf != 0).sum())
        for _, leaf in tree.tensors(sample)
        if leaf.dim() == 2 and leaf is not labels and not leaf.is_floating_point()
    ]
    return (*declared.values(), tokens, *masks)


# --- gradients --------------------------------------------------------------------------------------------------------


def _host(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.detach().cpu()


def _wide(gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
    """Flat, dense, real, and in 32 bits at least; zeros where there is none."""
    if gradient is None:
        gradient = torch.zeros_like(parameter)
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    gradient = gradient.detach()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
    return (gradient if gradient.dtype in (torch.float32, torch.float64) else gradient.float()).reshape(-1)
