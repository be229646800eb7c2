"""torch's losses, and what each divides by, which is so known before they run.

Modules, subclasses, compiled modules, functions and `functools.partial` of functions are recognised. Settings are read
at each call, as a module's attributes may change. What each runs over was found by experiment: the tests hold, for
each of torch's losses, that ragged micro-batches so weighted give the whole batch's gradient.
"""

import functools
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.nn import functional

from autoaccum.errors import SetupError, shown

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
    """One of torch's losses as the user passed it.

    Attributes:
        settings: what has them as attributes, as they stand now.
        reduction: one of "mean", "sum", "none" and "batchmean", which has to stay.
        name: in torch, with the reduction where it is not the mean.
        over: what its mean runs over: one of "classes", "elements", "rows" and "samples".
        takes_classes: whether its targets are classes.
        of_logits: whether it compares classes with outputs that have one figure a class, along dimension 1.
    """

    def __init__(self, kind: str, name: str, settings: Any) -> None:
        self._kind, self.settings, over = kind, settings, _OVER[kind]
        self.reduction = str(getattr(settings, "reduction", "mean"))
        self.name = name if self.reduction == "mean" else f"{name}(reduction={shown(self.reduction)})"
        self.takes_classes = over == "classes"
        self.of_logits = self.takes_classes and kind != "linearcrossentropy"
        if self.reduction == "none" and self.takes_classes:
            over = "elements"  # ignored targets are zeros among them
        self.over = "samples" if self.reduction == "batchmean" else over

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
            settings = loss
            defines = next(each for each in type(loss).__mro__ if "forward" in vars(each))
            owner, is_torchs = defines.__name__, defines.__module__ == nn.modules.loss.__name__
            name = type(loss).__name__
        kind = owner.lower().replace("_", "").replace("binarycrossentropy", "bce").removesuffix("loss")
        return cls(kind, name, settings) if is_torchs and kind in _OVER else None

    def arguments(self, outputs: Any, targets: Any) -> tuple[Any, ...]:
        """The loss's own arguments, made of what the model returned and the targets.

        Most losses take (outputs, targets). Of the others, where the model returns a tuple:
        GaussianNLL: outputs (mean, variance); CosineEmbedding, MarginRanking: outputs (x1, x2);
        Triplet: outputs (anchor, positive, negative), whatever the targets; CTC: targets (targets, input_lengths,
        target_lengths), or outputs (log_probs, input_lengths) with targets (targets, target_lengths).

        Raises:
            SetupError: the loss was given another reduction since its training was set up.
        """
        now = str(getattr(self.settings, "reduction", "mean"))
        if now != self.reduction:
            had = f"had {self.reduction!r} when its training was set up"
            raise SetupError(f"{self.name} has reduction={now!r} now, and {had}: set it before")
        if self._kind in ("ctc", "gaussiannll"):
            in_turn = zip_longest(_apart(outputs), _apart(targets))
            return tuple(each for pair in in_turn for each in pair if each is not None)
        if self._kind in ("cosineembedding", "marginranking"):
            return (*_apart(outputs), targets)
        inputs_only = self._kind.startswith("triplet") and isinstance(outputs, (tuple, list))
        return tuple(outputs) if inputs_only else (outputs, targets)


def _apart(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
