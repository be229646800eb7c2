"""Windows of chosen samples, run on a model that is held still, by the very code that trains.

The Accumulator is the one that trains; in the optimizer's place stands one that takes the gradient where another would
step. So scaling, side buffers, weighting and the late correction of denominators are all in what is looked at. When the
bench is left, model and random generators are bit for bit as they were.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoaccum.data import tree
from autoaccum.interrupts import interruptible
from autoaccum.loss.asking import RAISED, rounding, unlike
from autoaccum.loss.counts import holds_indices
from autoaccum.loss.objective import Objective
from autoaccum.loss.reading import Reading
from autoaccum.memory.oom import Verdict, out_of_memory
from autoaccum.model.optimizer import optimizer_parameters, trained_parameters
from autoaccum.model.shards import is_sharded, local
from autoaccum.model.snapshot import Snapshot
from autoaccum.planning.plan import plan
from autoaccum.ranks import Ranks, bytes_of, here
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.determinism import Determinism

__all__ = ["Bench", "Difference", "Gradient", "PartFailed", "PartRaised"]

_LEAST_ROUNDING = 1e-8  # of a gradient in float64
_FP16_ATTEMPTS = 24  # the loss scale starts at 65536, and is halved each time
_WHERE = "verify"  # ranks of a sharded model that exchange something
_SAMPLED_ELEMENTS = 2**14  # of each parameter, for the cause

Gradient = list[Tensor]  # of each parameter; one dimension, dense, real, 32 bits or more; zeros where there is none


class Difference(NamedTuple):
    """How a gradient differs from the reference.

    Attributes:
        error: ‖g − ref‖ / ‖ref‖.
        ratio: ⟨g, ref⟩ / ⟨ref, ref⟩.
        worst: the parameter with the largest ‖g − ref‖.
        reference: ‖ref‖.
    """

    error: float
    ratio: float
    worst: str
    reference: float


class PartFailed(Exception):
    """The loss of a micro-batch is not a finite number where the whole batch's is."""


class PartRaised(PartFailed):
    """The model or the loss raised at a micro-batch where it could run the whole batch."""


class Bench:
    """A model held still while windows are run on it.

    Attributes:
        samples: of the whole batch.
        objective: whose weighting is looked at.
        precision: "fp32", "bf16" or "fp16".
        fixed: what holds the model still.
    """

    def __init__(
        self, stack: ExitStack, objective: Objective, batch: Any, samples: int, device: torch.device, precision: str
    ) -> None:
        """Holds the model still until `stack` is closed; `samples` are chosen from `batch`, on the host."""
        self.objective, self.samples, self._device, self._modules = objective, samples, device, objective.modules
        model = objective.model
        self._parameters = list(dict.fromkeys(trained_parameters(model, objective.loss)))
        self._taken = _Taken(self._parameters)
        # All ranks of a sharded model run the same windows of the same samples, and see the same of them.
        self._ranks = here(device) if is_sharded(model) else Ranks()
        size = self._ranks.size
        snapshot = interruptible(Snapshot, model, self._taken, *objective.owners, device=device)
        stack.enter_context(snapshot).set_gradients_aside()
        self.fixed = stack.enter_context(Determinism(*self._modules, samples=samples, device=device))
        self._accumulator = Accumulator(
            model,
            self._taken,
            plan(samples, samples * size, world_size=size, rank=self._ranks.rank, batch_norm="keep"),
            objective=objective,
            precision=precision,
            on_nonfinite="skip",
            device=device,
            ranks=self._ranks,
        )
        stack.callback(self._accumulator.close)
        stack.callback(setattr, objective, "compares", objective.compares)
        objective.compares = False
        self._accumulator.noise_scale.why_not = "nothing is trained"
        self.precision = self._accumulator.precision.name
        objective.settle([batch], samples, self.fixed.begin)
        self._batch = _arranged(objective, batch, samples)

    def batch(self, rows: Sequence[int]) -> Any:
        """The samples at these places, on the host."""
        return tree.choose(self._batch, rows)

    def window(self, pieces: Sequence[Sequence[int]], *, seed: int | None = None) -> Gradient | str:
        """The gradient of one window; or why there is none, in words.

        Args:
            pieces: the rows of each micro-batch.
            seed: draw other random numbers than the generators would give.
        """
        accumulator = self._accumulator
        batches = [self.batch(rows) for rows in pieces]
        accumulator.at_once = len(pieces) == 1
        for _ in range(_FP16_ATTEMPTS):
            self._taken.gradient = None
            order = cycle(pieces)  # a pass that reads, and a loss that compares samples, run them all once more
            accumulator.on_phase = partial(self._begin, order, seed)
            accumulator.open(batches)
            try:
                accumulator.run(batches)
            except BaseException:
                accumulator.discard()
                raise
            record = accumulator.finish()
            found = self._taken.gradient
            if found is not None:
                finite = all(math.isfinite(float(flat.norm())) for flat in found)
                return found if not self._ranks.any(_WHERE, not finite) else "the gradient is not finite"
            if not math.isfinite(record.loss):
                return f"the loss is {record.loss}"
            if not accumulator.precision.scaler.is_enabled():
                norm = record.grad_norm
                return self.nothing if norm is None or math.isfinite(norm) else "the gradient is not finite"
        return "its fp16 gradients overflow at every loss scale"

    def _begin(self, order: Iterator[Sequence[int]], seed: int | None, phase: str) -> None:
        if phase == "batch":
            self.fixed.begin(next(order), seed=seed)

    @property
    def nothing(self) -> Gradient:
        """Zeros, as where no target counts."""
        return [_flat(parameter, None) for parameter in self._parameters]

    def part(self, pieces: Sequence[Sequence[int]]) -> Gradient:
        """`window`, after the whole batch could be run.

        Raises:
            PartRaised, PartFailed: the model or the loss raised, or the loss is not finite.
        """
        sizes = " + ".join(str(len(piece)) for piece in pieces)
        try:
            found = self.window(pieces)
        except RAISED as error:
            if out_of_memory(error) is not Verdict.NO:
                raise
            raise PartRaised(f"{type(error).__name__} at {sizes}: {error}") from error
        if isinstance(found, str):
            raise PartFailed(f"{found} at {sizes}")
        return found

    def read(self) -> Reading | None:
        """What the loss of these samples divides by, whatever was declared."""
        return self.objective.look([self._batch], self.samples, self.fixed.begin, means=True)

    def price_of_a_forward(self, pieces: Sequence[Sequence[int]]) -> float:
        """The time of a window with one more forward for each micro-batch ÷ that of a plain one, measured in turn."""
        plain, forward = [], []
        batches = [tree.move(self.batch(rows), self._device) for rows in pieces]
        for _ in range(3):
            began = time.perf_counter()
            self.window(pieces)
            plain.append(time.perf_counter() - began)
            began = time.perf_counter()
            with torch.no_grad(), self._accumulator.precision.autocast():
                for rows, batch in zip(pieces, batches, strict=True):
                    self.fixed.begin(rows)
                    self.objective.forward(batch)
            if self._device.type != "cpu":
                torch.get_device_module(self._device).synchronize(self._device)
            forward.append(time.perf_counter() - began)
        return 1.0 + min(forward) / min(plain)

    def difference(self, gradient: Gradient, reference: Gradient) -> Difference:
        """Compares, a parameter at a time, where `gradient` lies."""
        rows = []
        for own, other in zip(gradient, reference, strict=True):
            expected = other.to(own.device)
            product = float((own * expected).sum())  # in pairs, which torch.dot does not
            rows.append((float((own - expected).norm()) ** 2, product, float(expected.norm()) ** 2))
        table = torch.tensor(rows, dtype=torch.float64)
        if self._ranks.size > 1:  # what is not sharded is the same on every rank
            alike = [local(parameter) is parameter for parameter in self._parameters]
            table /= torch.tensor([self._ranks.size if each else 1.0 for each in alike], dtype=torch.float64)[:, None]
            table = table.to(self._device)
            self._ranks.sum(_WHERE, [table])
        squares, product, whole = (math.fsum(column) for column in table.T.tolist())
        names = {id(p): name for module in reversed(self._modules) for name, p in module.named_parameters()}
        worst = names[id(self._parameters[int(table[:, 0].argmax())])]  # NaN is worst of all
        if whole == 0:
            return Difference(math.inf if squares else 0.0, math.nan, worst, 0.0)
        return Difference(math.sqrt(squares / whole), product / whole, worst, math.sqrt(whole))

    def sampled(self, gradient: Gradient) -> Tensor:
        """A vector on the host, in double precision: of each parameter evenly spaced elements, at most 16384."""
        own = torch.cat([flat[:: -(-flat.numel() // _SAMPLED_ELEMENTS) or 1].cpu().double() for flat in gradient])
        if self._ranks.size == 1:
            return own
        messages = self._ranks.collect(_WHERE, bytes_of(own))
        return torch.frombuffer(bytearray(b"".join(messages)), dtype=torch.float64)

    @property
    def rounding(self) -> float:
        """The relative error that rounding alone may make in the windows that were run."""
        return max(rounding(self.fixed.noise.formats, self._device), _LEAST_ROUNDING)


class _Taken(Optimizer):
    """Takes the window's gradient, where an optimizer would step."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.gradient: Gradient | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Changes no parameter."""
        self.gradient = [_flat(parameter, parameter.grad) for parameter in optimizer_parameters(self)]


def _flat(parameter: nn.Parameter, gradient: Tensor | None) -> Tensor:
    """What this rank has of a parameter's gradient, as an element of Gradient."""
    flat = torch.zeros_like(local(parameter)) if gradient is None else local(gradient)
    flat = flat.detach().to_dense()
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    return flat.reshape(-1) if flat.dtype == torch.float64 else flat.reshape(-1).float()


def _arranged(objective: Objective, batch: Any, samples: int) -> Any:
    """As many of the samples, so ordered that a cut leaves unequal denominators: light ones first, heavy ones last."""
    singles = [tree.choose(batch, [row]) for row in range(tree.batch_size(batch))]
    weights = [_weight(objective, single) for single in singles]
    order = sorted(unlike(singles, samples), key=lambda row: weights[row])
    if 0.0 in weights[order[0]]:
        order = [order[-1], *order[:-1]]  # something counts in the first part too
    return tree.choose(batch, order)


def _weight(objective: Objective, sample: Any) -> tuple[float, ...]:
    """What may count in a sample: its denominators as declared, its labels, its masks."""
    declared = objective.reading.count(sample) or {}
    labels = objective.targets(sample)
    tokens = float((labels >= 0).sum()) if holds_indices(labels) else 0.0  # whatever negative number marks the others
    masks = [
        float((leaf != 0).sum())
        for _, leaf in tree.tensors(sample)
        if 0 < leaf.dim() <= 2 and leaf is not labels and leaf.layout is torch.strided and not leaf.is_nested
    ]
    return (*declared.values(), tokens, *masks)
