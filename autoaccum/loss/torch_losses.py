"""torch's losses, and what each divides by.

One row a loss: its module, its function, what its mean runs over, and how it takes what the model returned. Modules,
subclasses, compiled modules, functions and `functools.partial` of functions are recognised. Settings are read at each
call, as a module's attributes may change. The rows were found by experiment: for each, the tests hold that ragged
micro-batches so weighted give the whole batch's gradient.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from autoaccum.errors import DataError, SetupError, shown
from autoaccum.loss.counting import IGNORED, ClassWeights, elements, holds_indices, tokens

__all__ = ["TorchLoss"]


@dataclass(frozen=True)
class _Row:
    """One of torch's losses.

    Attributes:
        module, function: the two forms it has.
        over: what its mean runs over: "classes" (targets that are not ignored, by class weight), "elements", "rows"
            (elements, less the last dimension), "samples".
        takes: how outputs and targets become its arguments: "pair", or one of `_LAYOUTS`.
    """

    module: type[nn.Module]
    function: Callable[..., Any] | None
    over: str
    takes: str = "pair"


_ROWS = [
    _Row(nn.CrossEntropyLoss, functional.cross_entropy, "classes"),
    _Row(nn.NLLLoss, functional.nll_loss, "classes"),
    _Row(nn.MSELoss, functional.mse_loss, "elements"),
    _Row(nn.L1Loss, functional.l1_loss, "elements"),
    _Row(nn.SmoothL1Loss, functional.smooth_l1_loss, "elements"),
    _Row(nn.HuberLoss, functional.huber_loss, "elements"),
    _Row(nn.BCELoss, functional.binary_cross_entropy, "elements"),
    _Row(nn.BCEWithLogitsLoss, functional.binary_cross_entropy_with_logits, "elements"),
    _Row(nn.PoissonNLLLoss, functional.poisson_nll_loss, "elements"),
    _Row(nn.SoftMarginLoss, functional.soft_margin_loss, "elements"),
    _Row(nn.HingeEmbeddingLoss, functional.hinge_embedding_loss, "elements"),
    _Row(nn.KLDivLoss, functional.kl_div, "elements"),  # "batchmean": samples
    _Row(nn.GaussianNLLLoss, functional.gaussian_nll_loss, "elements", "variance"),
    _Row(nn.MarginRankingLoss, functional.margin_ranking_loss, "elements", "inputs and target"),
    _Row(nn.CosineEmbeddingLoss, functional.cosine_embedding_loss, "elements", "inputs and target"),
    _Row(nn.MultiMarginLoss, functional.multi_margin_loss, "elements"),  # class weights do not enter its denominator
    _Row(nn.MultiLabelMarginLoss, functional.multilabel_margin_loss, "rows"),
    _Row(nn.MultiLabelSoftMarginLoss, functional.multilabel_soft_margin_loss, "rows"),
    _Row(nn.TripletMarginLoss, functional.triplet_margin_loss, "samples", "inputs"),
    _Row(nn.TripletMarginWithDistanceLoss, functional.triplet_margin_with_distance_loss, "samples", "inputs"),
    _Row(nn.CTCLoss, functional.ctc_loss, "samples", "lengths"),  # mean over samples of loss / target length
]
if hasattr(nn, "LinearCrossEntropyLoss"):  # newer than the oldest torch that is supported
    _ROWS.append(_Row(nn.LinearCrossEntropyLoss, None, "classes"))

_BY_MODULE: Mapping[type, _Row] = {row.module: row for row in _ROWS}
_BY_FUNCTION: Mapping[Any, _Row] = {row.function: row for row in _ROWS if row.function is not None}

_OVER = {"elements": "the elements of the targets", "rows": "the samples", "samples": "the samples"}


class TorchLoss:
    """One of torch's losses as the user passed it."""

    def __init__(self, row: _Row, module: nn.Module | None, settings: Mapping[str, Any]) -> None:
        self._row, self._module, self._settings = row, module, settings
        self._weights = ClassWeights()
        self.plain = module is None or type(module).forward is row.module.forward
        """Whether torch's own code runs: a subclass with a forward of its own may shift or mask the targets first."""

    @classmethod
    def recognise(cls, loss: Any) -> "TorchLoss | None":
        """The loss as one of torch's, or None.

        Raises:
            SetupError: settings that torch has deprecated hide the reduction.
        """
        loss = getattr(loss, "_orig_mod", loss)  # torch.compile
        settings: Mapping[str, Any] = {}
        if isinstance(loss, functools.partial):
            if loss.args:  # the outputs or the targets are fixed beforehand: not a loss of (outputs, targets)
                return None
            loss, settings = loss.func, loss.keywords
        for name in ("size_average", "reduce"):
            if settings.get(name) is not None:
                raise SetupError(
                    f"{name}={shown(settings[name])} is deprecated in torch: pass reduction='mean' or 'sum'"
                )
        if isinstance(loss, nn.Module):
            row = next((_BY_MODULE[base] for base in type(loss).__mro__ if base in _BY_MODULE), None)
            return None if row is None else cls(row, loss, settings)
        if not callable(loss) or getattr(loss, "__hash__", None) is None:
            return None
        row = _BY_FUNCTION.get(loss)
        return None if row is None else cls(row, None, settings)

    def _setting(self, name: str, default: Any) -> Any:
        return self._settings.get(name, default) if self._module is None else getattr(self._module, name, default)

    @property
    def reduction(self) -> str:
        """ "mean", "sum", "none" or "batchmean", as it stands now."""
        reduction: str = self._setting("reduction", "mean")
        return reduction

    @property
    def ignore_index(self) -> int:
        """The class index that is not counted."""
        index = self._setting("ignore_index", None)
        return IGNORED if index is None else int(index)

    @property
    def over_classes(self) -> bool:
        """Whether it is a mean over targets that are classes."""
        return self._row.over == "classes"

    @property
    def of_logits(self) -> bool:
        """Whether it compares classes with outputs that have one figure a class, along dimension 1."""
        return self.over_classes and self.plain and self._row.function is not None

    @property
    def weights(self) -> Tensor | None:
        """The class weights, of a loss whose mean they enter."""
        weights = self._setting("weight", None) if self.over_classes else None
        return weights if isinstance(weights, Tensor) else None

    @property
    def name(self) -> str:
        """The name in torch, with the reduction where it is not the mean."""
        kind = type(self._module) if self._module is not None else self._row.function
        name = getattr(kind, "__name__", self._row.module.__name__)
        return name if self.reduction == "mean" else f"{name}(reduction={shown(self.reduction)})"

    @property
    def divides_by(self) -> str:
        """In words, what its mean is divided by."""
        if self.reduction == "none":
            return "the elements of the loss"
        if self.reduction == "batchmean":
            return "the samples"
        if self._row.over != "classes":
            return _OVER[self._row.over]
        counted = f"the targets other than {self.ignore_index}"
        return counted if self.weights is None else f"the class weights of {counted}"

    def arguments(self, outputs: Any, targets: Any) -> tuple[Any, ...]:
        """The loss's own arguments, made of what the model returned and the targets.

        Most losses take (outputs, targets). Of the others, where the model returns a tuple:
        GaussianNLL: outputs (mean, variance); CosineEmbedding, MarginRanking: outputs (x1, x2);
        Triplet: outputs (anchor, positive, negative), whatever the targets; CTC: targets (targets, input_lengths,
        target_lengths), or outputs (log_probs, input_lengths) with targets (targets, target_lengths).
        """
        if self._row.takes == "pair" or not self.plain:
            return (outputs, targets)
        return _LAYOUTS[self._row.takes](outputs, targets)

    def denominator(self, targets: Any, samples: Callable[[], float]) -> float:
        """What this loss's mean over a batch with these targets was divided by.

        Args:
            targets: of the batch, as the loss gets them.
            samples: the batch's samples, asked for where they matter.

        Raises:
            DataError: the targets are no tensor, and the mean runs over their elements.
        """
        over = self._row.over
        if over == "samples" or self.reduction == "batchmean":
            return samples()
        if over == "elements":
            return elements(targets)
        if over == "rows":
            return elements(targets) / int(targets.shape[-1])
        return self._classes(targets)

    def _classes(self, targets: Any) -> float:
        count = elements(targets)
        if not holds_indices(targets):
            # Class probabilities, shaped (samples, classes, ...): torch divides by samples × places, even with weights.
            if not self.plain:
                return count
            if targets.dim() < 2:
                raise DataError(
                    f"the targets are {targets.dtype} of shape {tuple(targets.shape)}: {self.name} takes class indices "
                    "as integers (targets.long()), or class probabilities of shape (samples, classes, ...)"
                )
            return count / int(targets.shape[1])
        if self.reduction == "none":
            return count  # ignored targets are zeros in the mean of the elements
        if self.weights is None:
            return tokens(targets, self.ignore_index)
        return self._weights.total(targets, self.weights, self.ignore_index)


def _apart(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _variance(outputs: Any, targets: Any) -> tuple[Any, ...]:
    pair = isinstance(outputs, (tuple, list)) and len(outputs) == 2
    return (outputs[0], targets, outputs[1]) if pair else (outputs, targets)


def _lengths(outputs: Any, targets: Any) -> tuple[Any, ...]:
    if isinstance(targets, (tuple, list)) and isinstance(outputs, (tuple, list)):
        return (outputs[0], targets[0], outputs[1], *targets[1:])
    return (outputs, *_apart(targets))


_LAYOUTS: Mapping[str, Callable[[Any, Any], tuple[Any, ...]]] = {
    "inputs": lambda outputs, targets: tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs, targets),
    "inputs and target": lambda outputs, targets: (*_apart(outputs), targets),
    "variance": _variance,
    "lengths": _lengths,
}
