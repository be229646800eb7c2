"""How a loss that is not torch's own counts its targets: found by running it once, not by reading a signature.

A language model's head may shift its labels, so that the first column is never compared with anything; it may ignore
another index than -100, weigh classes, or add up instead of averaging. One forward under watch answers all of it where
the head calls torch's cross-entropy: the targets which arrive there are compared with the labels that were given.
Heads that call something else are asked by their values: does the loss change with a column's labels? Only labels
that occur in the data are ever put in (on a GPU an index out of range would end the process).

The model is in evaluation mode meanwhile, on two samples; flags, buffers and random generators are put back.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from autoaccum.data import tree
from autoaccum.data.structure import Reading
from autoaccum.errors import LossError
from autoaccum.loss.call import relabelled, targets_in
from autoaccum.loss.counting import IGNORED, ClassWeights, tokens
from autoaccum.model.untouched import Untouched

__all__ = ["Head", "device_of", "measure"]

_LONGEST_SHIFT = 4  # columns left out at one end that are looked for
_SAMPLES = 2

Evaluate = Callable[[Any], Tensor]  # a batch on the model's device -> its loss, a scalar


@dataclass(frozen=True, eq=False)
class Head:
    """How a loss counts its labels.

    Attributes:
        ignore_index: the label that is not counted.
        first, last: columns at either end, of labels (samples, columns), that are not counted.
        weights: class weights, where its mean divides by their sum.
        over: "tokens"; or "samples" (CTC, whose labels are not what is averaged).
        adds_up: whether it is a sum, which is never divided.
        found: how this is known, in words.
    """

    ignore_index: int = IGNORED
    first: int = 0
    last: int = 0
    weights: Tensor | None = None
    over: str = "tokens"
    adds_up: bool = False
    found: str = "not measured"
    _sums: ClassWeights = field(default_factory=ClassWeights, repr=False)

    def count(self, labels: Tensor) -> float:
        """What of `labels`, integers of any shape, this head counts."""
        if self.weights is None:
            return self.tokens(labels)
        return self._sums.total(self.counted(labels), self.weights, self.ignore_index)

    def tokens(self, labels: Tensor) -> float:
        """The labels that count, without weights."""
        return tokens(self.counted(labels), self.ignore_index)

    def counted(self, labels: Tensor) -> Tensor:
        """`labels` without the columns that never count."""
        if labels.dim() != 2 or not (self.first or self.last):
            return labels
        return labels[:, self.first : labels.shape[1] - self.last]

    @property
    def divides_by(self) -> str:
        """In words, what its mean is divided by."""
        if self.over == "samples":
            return "the samples"
        ends = [f"the first {self.first}"] * (self.first > 0) + [f"the last {self.last}"] * (self.last > 0)
        shifted = f", without {' and '.join(ends)} of each row (the head shifts them)" if ends else ""
        weights = "the class weights of " if self.weights is not None else ""
        return f"{weights}the labels other than {self.ignore_index}{shifted}"


def measure(
    model: nn.Module, batch: Any, evaluate: Evaluate, *, apart: bool = False, ignore_index: int = IGNORED
) -> Head:
    """Runs the loss a few times on two samples, and says how it counts their labels; on all that cannot be cut.

    Args:
        model: left as it was: flags, buffers, random generators, gradients.
        batch: on the host, with integer labels; left as it was.
        evaluate: runs the model and the loss.
        apart: as for `call.targets_in`, which finds the labels.
        ignore_index: what is not counted where nothing else is found.

    Raises:
        LossError: the loss is not a scalar tensor.
    """
    labels = targets_in(batch, apart=apart)
    size = tree.batch_size(batch)
    few = size <= _SAMPLES or any(Reading(batch, size).uncut())  # what cannot be cut is run whole
    small = batch if few else tree.split(batch, [_SAMPLES, size - _SAMPLES])[0]
    bench = _Bench(model, tree.move(small, device_of(model)), evaluate, apart)
    return bench.watch(labels, ignore_index) or bench.ask(labels)


class _Bench:
    """A few samples on the device, and the loss run on them with other labels."""

    def __init__(self, model: nn.Module, batch: Any, evaluate: Evaluate, apart: bool) -> None:
        self._model, self._batch, self._evaluate = model, batch, evaluate
        self.labels: Tensor = targets_in(batch, apart=apart)
        self.ignore_index = IGNORED
        self._quiet = True

    def run(self, labels: Tensor) -> tuple[float, "_Call | None"]:
        """The loss with these labels, and the call of torch's loss it came from, where it was seen."""
        batch = relabelled(self._batch, labels)
        with Untouched(self._model, device=device_of(self._model)), _Watch() as watch:
            if self._quiet:
                self._model.eval()
            loss = self._evaluate(batch)
        return loss.item(), watch.main(loss)

    def watch(self, whole: Tensor, ignore_index: int) -> Head | None:
        """What can be said from the targets that arrive at torch's cross-entropy or CTC loss; None where they do not.

        Every label is made one that counts first: an ignored first column would hide whether it is shifted away.
        """
        self.ignore_index = ignore_index
        labels = _filled(self.labels, whole, ignore_index)
        try:
            _, call = self.run(labels)
        except LossError:
            self._quiet = False  # a model that has a loss in training only: its flags stay, its generators are fixed
            _, call = self.run(labels)
        if call is None:
            return None
        if call.over == "samples":
            return Head(over="samples", adds_up=call.adds_up, found="measured")
        self.ignore_index = call.ignore_index
        if bool((labels == call.ignore_index).any()):
            labels = _filled(self.labels, whole, call.ignore_index)
            _, again = self.run(labels)
            call = again if again is not None else call
        ends = _ends(labels, call)
        if ends is None:
            return None
        return Head(call.ignore_index, *ends, weights=call.weights, adds_up=call.adds_up, found="measured")

    def ask(self, whole: Tensor) -> Head:
        """What can be said from the loss's values: a column counts where other labels in it change the loss."""
        if self.labels.dim() != 2 or self.labels.shape[1] < 2:
            return Head(self.ignore_index, found="measured")
        try:
            first = self._uncounted(range(_LONGEST_SHIFT), whole)
            last = self._uncounted(range(-1, -1 - _LONGEST_SHIFT, -1), whole)
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:  # it ran with the labels as they are
            return Head(self.ignore_index, found=f"assumed, as the loss fails where one column counts: {error}")
        if first is None or last is None or first + last >= self.labels.shape[1]:
            return Head(self.ignore_index, found="assumed, as the loss does not tell its labels apart")
        return Head(self.ignore_index, first, last, found="measured")

    def _uncounted(self, columns: range, whole: Tensor) -> int | None:
        """How many of `columns`, in this order, do not count; None where none counts."""
        for number, column in enumerate(columns[: self.labels.shape[1]]):
            base, changed = self._pair(column, whole)
            if not _same(self.run(base)[0], self.run(changed)[0]):
                return number
        return None

    def _pair(self, column: int, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Labels that differ in one column only, made of labels that are in the data."""
        if bool((whole == self.ignore_index).any()):
            # Nothing counts, against this one column: decisive even where all classes are equally likely.
            base = torch.full_like(self.labels, self.ignore_index)
            changed = base.clone()
            changed[:, column] = _filled(self.labels, whole, self.ignore_index)[:, column]
            return base, changed
        changed = self.labels.clone()
        others = torch.unique(whole).to(changed.device)
        for row in range(changed.shape[0]):
            other = others[others != changed[row, column]]
            if len(other):
                changed[row, column] = other[0]
        return self.labels, changed


def _filled(labels: Tensor, whole: Tensor, ignore_index: int) -> Tensor:
    """`labels` with a real label in every ignored place."""
    ignored = (labels == ignore_index) | (labels < 0)
    real = whole[(whole != ignore_index) & (whole >= 0)]
    if not len(real):
        return labels
    return torch.where(ignored, real[0].to(labels), labels)


def _ends(labels: Tensor, call: "_Call") -> tuple[int, int] | None:
    """The columns left out at either end, so that the rest is what arrived; None where nothing fits."""
    arrived = call.targets[call.targets != call.ignore_index].reshape(-1)
    reach = min(_LONGEST_SHIFT, labels.shape[1]) if labels.dim() == 2 else 1
    pairs = [(first, total - first) for total in range(reach) for first in range(total, -1, -1)]
    for first, last in pairs:
        kept = labels[:, first : labels.shape[1] - last] if labels.dim() == 2 else labels
        kept = kept[kept != call.ignore_index].reshape(-1)
        if torch.equal(kept.to(arrived), arrived):
            return first, last
    return None


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6) or (math.isnan(one) and math.isnan(other))


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a torch loss inside a head."""

    targets: Tensor
    ignore_index: int
    weights: Tensor | None
    over: str
    reduction: str
    result: Any
    adds_up: bool = False


class _Watch(TorchFunctionMode):
    """Notes the calls of cross-entropy, NLL and CTC losses."""

    _WATCHED: Mapping[Any, str] = {
        functional.cross_entropy: "tokens",
        functional.nll_loss: "tokens",
        functional.ctc_loss: "samples",
    }

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        over = self._WATCHED.get(func)
        if over is not None:
            given = inspect.signature(func).bind(*args, **(kwargs or {}))
            given.apply_defaults()
            values = given.arguments
            targets = values["targets" if over == "samples" else "target"]
            index, weights = values.get("ignore_index", IGNORED), values.get("weight")
            if over == "samples" or not targets.is_floating_point():
                self._calls.append(_Call(targets, index, weights, over, values["reduction"], result))
        return result

    def main(self, loss: Tensor) -> _Call | None:
        """The call with the most targets: other terms (next sentence, routing) have one a sample."""
        if not self._calls:
            return None
        call = max(self._calls, key=lambda call: call.targets.numel())
        adds_up = call.reduction == "sum" and bool(torch.equal(call.result.reshape(()), loss.reshape(())))
        return replace(call, adds_up=adds_up)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
