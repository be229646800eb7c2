"""torch's losses, and what each divides by, which is so known before they run.

Modules, subclasses, compiled modules, functions and `functools.partial` of functions are recognised. Settings are read
at each call, as a module's attributes may change. The rows were found by experiment: for each, the tests hold that
ragged micro-batches so weighted give the whole batch's gradient.
"""

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from autoaccum.errors import DataError, SetupError, shown
from autoaccum.loss.counts import IGNORED, ClassWeights, elements, holds_indices, tokens

__all__ = ["TorchLoss"]


class _Row(NamedTuple):
    """One of torch's losses.

    Attributes:
        function: its other form.
        over: what its mean runs over: "classes" (targets that are not ignored, by class weight), "elements", "rows"
            (elements, less the last dimension), "samples".
        takes: how outputs and targets become its arguments: "pair", or one of `_LAYOUTS`.
    """

    function: Callable[..., Any] | None
    over: str = "elements"
    takes: str = "pair"


_ROWS: dict[type[nn.Module], _Row] = {
    nn.CrossEntropyLoss: _Row(F.cross_entropy, "classes"),
    nn.NLLLoss: _Row(F.nll_loss, "classes"),
    nn.MSELoss: _Row(F.mse_loss),
    nn.L1Loss: _Row(F.l1_loss),
    nn.SmoothL1Loss: _Row(F.smooth_l1_loss),
    nn.HuberLoss: _Row(F.huber_loss),
    nn.BCELoss: _Row(F.binary_cross_entropy),
    nn.BCEWithLogitsLoss: _Row(F.binary_cross_entropy_with_logits),
    nn.PoissonNLLLoss: _Row(F.poisson_nll_loss),
    nn.SoftMarginLoss: _Row(F.soft_margin_loss),
    nn.HingeEmbeddingLoss: _Row(F.hinge_embedding_loss),
    nn.KLDivLoss: _Row(F.kl_div),  # "batchmean": samples
    nn.GaussianNLLLoss: _Row(F.gaussian_nll_loss, takes="variance"),
    nn.MarginRankingLoss: _Row(F.margin_ranking_loss, takes="inputs and target"),
    nn.CosineEmbeddingLoss: _Row(F.cosine_embedding_loss, takes="inputs and target"),
    nn.MultiMarginLoss: _Row(F.multi_margin_loss),  # class weights do not enter its denominator
    nn.MultiLabelMarginLoss: _Row(F.multilabel_margin_loss, "rows"),
    nn.MultiLabelSoftMarginLoss: _Row(F.multilabel_soft_margin_loss, "rows"),
    nn.TripletMarginLoss: _Row(F.triplet_margin_loss, "samples", "inputs"),
    nn.TripletMarginWithDistanceLoss: _Row(F.triplet_margin_with_distance_loss, "samples", "inputs"),
    nn.CTCLoss: _Row(F.ctc_loss, "samples", "lengths"),  # mean over samples of loss / target length
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # newer than the oldest torch that is supported
    _ROWS[nn.LinearCrossEntropyLoss] = _Row(None, "classes")

_BY_FUNCTION: Mapping[Any, _Row] = {row.function: row for row in _ROWS.values() if row.function is not None}


class TorchLoss:
    """One of torch's losses as the user passed it."""

    def __init__(self, row: _Row, loss: Any, settings: Any) -> None:
        self._row, self._loss, self._settings = row, loss, settings  # a module's stand in its attributes
        self._weights = ClassWeights()

    @classmethod
    def recognise(cls, loss: Any) -> "TorchLoss | None":
        """The loss as one of torch's, or None; a SetupError where deprecated settings hide its reduction.

        A subclass with a forward of its own is none: it may shift or mask the targets first.
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
            kind = next((base for base in type(loss).__mro__ if base in _ROWS), None)
            row = None if kind is None or type(loss).forward is not kind.forward else _ROWS[kind]
        else:
            row = _BY_FUNCTION.get(loss) if getattr(loss, "__hash__", None) else None
        if row is None:
            return None
        return cls(row, loss, loss if isinstance(loss, nn.Module) else SimpleNamespace(**settings))

    @property
    def reduction(self) -> str:
        """One of "mean", "sum", "none" and "batchmean", as it stands now."""
        return str(getattr(self._settings, "reduction", "mean"))

    @property
    def ignore_index(self) -> int:
        """The class index that is not counted."""
        index = getattr(self._settings, "ignore_index", None)
        return IGNORED if index is None else int(index)

    @property
    def over_classes(self) -> bool:
        """Whether it is a mean over targets that are classes."""
        return self._row.over == "classes"

    @property
    def of_logits(self) -> bool:
        """Whether it compares classes with outputs that have one figure a class, along dimension 1."""
        return self.over_classes and self._row.function is not None

    @property
    def weights(self) -> Tensor | None:
        """The class weights, of a loss whose mean they enter."""
        weights = getattr(self._settings, "weight", None) if self.over_classes else None
        return weights if isinstance(weights, Tensor) else None

    @property
    def name(self) -> str:
        """The name in torch, with the reduction where it is not the mean."""
        name = type(self._loss).__name__ if isinstance(self._loss, nn.Module) else self._loss.__name__
        return name if self.reduction == "mean" else f"{name}(reduction={shown(self.reduction)})"

    @property
    def divides_by(self) -> str:
        """In words, what its mean is divided by."""
        if self.reduction == "none":
            return "the elements of the loss"
        if self.over_classes:
            counted = f"the targets other than {self.ignore_index}"
            return counted if self.weights is None else f"the class weights of {counted}"
        by_element = self._row.over == "elements" and self.reduction != "batchmean"
        return "the elements of the targets" if by_element else "the samples"

    def arguments(self, outputs: Any, targets: Any) -> tuple[Any, ...]:
        """The loss's own arguments, made of what the model returned and the targets.

        Most losses take (outputs, targets). Of the others, where the model returns a tuple:
        GaussianNLL: outputs (mean, variance); CosineEmbedding, MarginRanking: outputs (x1, x2);
        Triplet: outputs (anchor, positive, negative), whatever the targets; CTC: targets (targets, input_lengths,
        target_lengths), or outputs (log_probs, input_lengths) with targets (targets, target_lengths).
        """
        return _LAYOUTS[self._row.takes](outputs, targets)

    def denominator(self, targets: Any, samples: Callable[[], float]) -> float:
        """What this loss's mean over a batch with these targets, and so many samples, was divided by.

        Raises:
            DataError: the targets are no tensor, and the mean runs over their elements.
        """
        if self._row.over == "samples" or self.reduction == "batchmean":
            return samples()
        count = elements(targets)
        if self._row.over != "classes":
            return count / int(targets.shape[-1]) if self._row.over == "rows" else count
        if not holds_indices(targets):
            # Class probabilities, shaped (samples, classes, ...): torch divides by samples × places, even with weights.
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
    "pair": lambda outputs, targets: (outputs, targets),
    "inputs": lambda outputs, targets: tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs, targets),
    "inputs and target": lambda outputs, targets: (*_apart(outputs), targets),
    "variance": _variance,
    "lengths": _lengths,
}
