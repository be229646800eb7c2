"""torch's losses, and what each divides by, which is so known before they run.

Modules, subclasses, compiled modules, functions and `functools.partial` of functions are recognised. Settings are read
at each call, as a module's attributes may change. What each runs over was found by experiment: the tests hold, for
each of torch's losses, that ragged micro-batches so weighted give the whole batch's gradient.
"""

import functools
from collections.abc import Callable
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from autoaccum.errors import DataError, SetupError, shown
from autoaccum.loss.counts import IGNORED, ClassWeights, elements, holds_indices

__all__ = ["TorchLoss"]

# What a mean runs over, by the name that a module and its function share: targets that are not ignored, by class
# weight; elements; elements, less the last dimension; samples.
_OVER = {
    **dict.fromkeys(["crossentropy", "linearcrossentropy", "nll"], "classes"),
    **dict.fromkeys(["bce", "bcewithlogits", "cosineembedding", "gaussiannll", "hingeembedding", "huber"], "elements"),
    **dict.fromkeys(["kldiv", "l1", "marginranking", "mse", "multimargin", "poissonnll", "smoothl1"], "elements"),
    **dict.fromkeys(["softmargin"], "elements"),
    **dict.fromkeys(["multilabelmargin", "multilabelsoftmargin"], "rows"),
    **dict.fromkeys(["ctc", "tripletmargin", "tripletmarginwithdistance"], "samples"),
}


class TorchLoss:
    """One of torch's losses as the user passed it."""

    def __init__(self, kind: str, name: str, settings: Any) -> None:
        self._kind, self._name, self._settings = kind, name, settings
        self._over, self._weights = _OVER[kind], ClassWeights()

    @classmethod
    def recognise(cls, loss: Any) -> "TorchLoss | None":
        """The loss as one of torch's, or None; a SetupError where deprecated settings hide its reduction.

        A subclass with a forward of its own is none: it may shift or mask the targets first.
        """
        loss = getattr(loss, "_orig_mod", loss)  # torch.compile
        settings: Any = loss
        if isinstance(loss, functools.partial):
            if loss.args:  # the outputs or the targets are fixed beforehand: not a loss of (outputs, targets)
                return None
            for old in ("size_average", "reduce"):
                if loss.keywords.get(old) is not None:
                    value = shown(loss.keywords[old])
                    raise SetupError(f"{old}={value} is deprecated in torch: pass reduction='mean' or 'sum'")
            loss, settings = loss.func, SimpleNamespace(**loss.keywords)
        name = getattr(loss, "__name__", "")
        owner, is_torchs = name, bool(name) and getattr(functional, name, None) is loss
        if isinstance(loss, nn.Module):
            defines = next(each for each in type(loss).__mro__ if "forward" in vars(each))
            owner, is_torchs = defines.__name__, defines.__module__ == nn.modules.loss.__name__
            name = type(loss).__name__
        kind = owner.lower().replace("_", "").replace("binarycrossentropy", "bce").removesuffix("loss")
        return cls(kind, name, settings) if is_torchs and kind in _OVER else None

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
        return self._over == "classes"

    @property
    def of_logits(self) -> bool:
        """Whether it compares classes with outputs that have one figure a class, along dimension 1."""
        return self.over_classes and self._kind != "linearcrossentropy"

    @property
    def weights(self) -> Tensor | None:
        """The class weights, of a loss whose mean they enter."""
        weights = getattr(self._settings, "weight", None) if self.over_classes else None
        return weights if isinstance(weights, Tensor) else None

    @property
    def name(self) -> str:
        """The name in torch, with the reduction where it is not the mean."""
        return self._name if self.reduction == "mean" else f"{self._name}(reduction={shown(self.reduction)})"

    @property
    def divides_by(self) -> str:
        """In words, what its mean is divided by."""
        if self.reduction == "none":
            return "the elements of the loss"
        if self.over_classes:
            counted = f"the targets other than {self.ignore_index}"
            return counted if self.weights is None else f"the class weights of {counted}"
        by_element = self._over == "elements" and self.reduction != "batchmean"
        return "the elements of the targets" if by_element else "the samples"

    def arguments(self, outputs: Any, targets: Any) -> tuple[Any, ...]:
        """The loss's own arguments, made of what the model returned and the targets.

        Most losses take (outputs, targets). Of the others, where the model returns a tuple:
        GaussianNLL: outputs (mean, variance); CosineEmbedding, MarginRanking: outputs (x1, x2);
        Triplet: outputs (anchor, positive, negative), whatever the targets; CTC: targets (targets, input_lengths,
        target_lengths), or outputs (log_probs, input_lengths) with targets (targets, target_lengths).
        """
        if self._kind in ("ctc", "gaussiannll"):
            in_turn = zip_longest(_apart(outputs), _apart(targets))
            return tuple(each for pair in in_turn for each in pair if each is not None)
        if self._kind in ("cosineembedding", "marginranking"):
            return (*_apart(outputs), targets)
        inputs_only = self._kind.startswith("triplet") and isinstance(outputs, (tuple, list))
        return tuple(outputs) if inputs_only else (outputs, targets)

    def denominator(self, targets: Any, samples: Callable[[], float]) -> float:
        """What this loss's mean over a batch with these targets, and so many samples, was divided by.

        Raises:
            DataError: the targets are no tensor, and the mean runs over their elements.
        """
        if self._over == "samples" or self.reduction == "batchmean":
            return samples()
        count = elements(targets)
        if not self.over_classes:
            return count / int(targets.shape[-1]) if self._over == "rows" else count
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
        return self._weights.total(targets, self.weights, self.ignore_index)


def _apart(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
