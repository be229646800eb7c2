"""What a loss is divided by where the settings say it: declared, or as torch's own loss does.

A declared reduction says what the loss's mean runs over, whatever the loss is. Of torch's losses modules, subclasses,
compiled modules, functions and `functools.partial` of functions are recognised; what each runs over was found by
experiment: the tests hold, for each of them, that ragged micro-batches so weighted give the whole batch's gradient.
Settings that contradict each other are refused here, before anything runs.
"""

import functools
from collections.abc import Callable, Mapping
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoaccum.checks import check_call
from autoaccum.errors import DataError, SetupError, shown
from autoaccum.loss.call import TARGET_KEYS, arrange, name_of, targets_in
from autoaccum.loss.counts import (
    CUTS,
    Count,
    as_denominator,
    elements,
    holds_indices,
    ignored_by,
    other_than,
    samples,
    tokens,
)
from autoaccum.loss.divisor import TRUSTED, Divisor
from autoaccum.loss.reading import Reading

__all__ = ["GivenLoss", "declared"]

_NAMED = ("auto", "coupled", "sample_mean", "token_mean", "weighted_mean", "element_mean", "sum")
_OVER_BY_NAME = {
    "sample_mean": "samples", "token_mean": "classes", "weighted_mean": "classes", "element_mean": "elements"
}  # fmt: skip
# What a mean of torch's runs over, by the name that a module and its function share: targets that are not ignored, by
# class weight; elements; elements, less the last dimension; samples.
_OVER = {
    **dict.fromkeys(["crossentropy", "linearcrossentropy", "nll"], "classes"),
    **dict.fromkeys(["bce", "bcewithlogits", "cosineembedding", "gaussiannll", "hingeembedding", "huber"], "elements"),
    **dict.fromkeys(["kldiv", "l1", "marginranking", "mse", "multimargin", "poissonnll", "smoothl1"], "elements"),
    **dict.fromkeys(["softmargin"], "elements"),
    **dict.fromkeys(["multilabelmargin", "multilabelsoftmargin"], "rows"),
    **dict.fromkeys(["ctc", "tripletmargin", "tripletmarginwithdistance"], "samples"),
}


def declared(given: "GivenLoss", reduction: Any) -> Reading:
    """What each term is divided by, as far as the settings say it: the same on every rank.

    A loss that nobody declared, and that is none of torch's, is left to be read; its labels or samples are a guess.

    Raises:
        SetupError: the settings are unknown, or contradict each other.
    """
    _check(given, reduction)
    how, auto = "as declared", isinstance(reduction, str) and reduction == "auto"
    if auto and not given.kind:
        why = "nothing counts in the samples that were tried, or too little"
        how = "divides by what its graph says, read at each micro-batch"
        return Reading({"loss": Divisor(rules=[given.guess])}, "unsettled", how, unseen=why)
    if isinstance(reduction, str):
        how = f"as {given.name} does" if auto else f"as declared by reduction={shown(reduction)}"
    if given.reduction in ("mean", "batchmean") and reduction == "sum":
        raise SetupError(
            f"reduction='sum' and a loss that averages ({given.name}) contradict each other: give the loss "
            "reduction='sum', or leave reduction='auto'"
        )
    terms = reduction if isinstance(reduction, Mapping) else {"loss": reduction}
    if "weighted_mean" in terms.values() and given.class_weights is None:
        raise SetupError(
            "reduction='weighted_mean' sums class weights, and the loss has none: pass a loss such as "
            "nn.CrossEntropyLoss(weight=...), or declare reduction=f(batch)"
        )
    finds_out = not given.kind and reduction in ("token_mean", "weighted_mean")
    return Reading(
        {name: given.divisor(how) for name, how in terms.items()},
        "declared",
        how,
        gives_sums=not auto and given.reduction in ("sum", "none"),
        cuts=[given.count(reduction, cut=cut) for cut in CUTS] if finds_out else (),
    )


class GivenLoss:
    """The loss or step as the user passed it: which of torch's it is, how it is called, and what its means count.

    Attributes:
        loss, step: as passed; one of them, or none for a model that computes its own.
        kind: which of torch's losses it is, such as "crossentropy"; "" for any other.
        settings: what has the loss's settings as attributes, which are read as they stand at each call.
        reduction: of one of torch's: "mean", "sum", "none" or "batchmean", which has to stay; "" for any other.
        name: in torch, with the reduction where it is not the mean.
        takes_classes: whether it is one of torch's whose targets are classes.
        of_logits: whether it compares them with outputs that have one figure a class, along dimension 1.
    """

    def __init__(self, loss: Any, step: Any) -> None:
        """Calls nothing; a SetupError where deprecated settings hide the loss's reduction."""
        self.loss, self.step = loss, step
        self.kind, name, self.settings = _torchs(loss)
        self.reduction = str(getattr(self.settings, "reduction", "mean")) if self.kind else ""
        self.name = name if self.reduction == "mean" else f"{name}(reduction={shown(self.reduction)})"
        over = _OVER.get(self.kind, "")
        self.takes_classes = over == "classes"
        self.of_logits = self.takes_classes and self.kind != "linearcrossentropy"
        if self.reduction == "none" and self.takes_classes:
            over = "elements"  # ignored targets are zeros among them
        self._over = "samples" if self.reduction == "batchmean" else over
        self._on_host: tuple[Tensor, int, Tensor] | None = None  # class weights, their version, a copy

    def arguments(self, outputs: Any, targets: Any) -> tuple[Any, ...]:
        """The loss's own arguments, made of what the model returned and the targets.

        Most losses take (outputs, targets). Of torch's others, where the model returns a tuple:
        GaussianNLL: outputs (mean, variance); CosineEmbedding, MarginRanking: outputs (x1, x2);
        Triplet: outputs (anchor, positive, negative), whatever the targets; CTC: targets (targets, input_lengths,
        target_lengths), or outputs (log_probs, input_lengths) with targets (targets, target_lengths).

        Raises:
            SetupError: the loss was given another reduction since its training was set up.
        """
        now = str(getattr(self.settings, "reduction", "mean"))
        if self.kind and now != self.reduction:
            had = f"had {self.reduction!r} when its training was set up"
            raise SetupError(f"{self.name} has reduction={now!r} now, and {had}: set it before")
        if self.kind in ("ctc", "gaussiannll"):
            in_turn = zip_longest(_apart(outputs), _apart(targets))
            return tuple(each for pair in in_turn for each in pair if each is not None)
        if self.kind in ("cosineembedding", "marginranking"):
            return (*_apart(outputs), targets)
        inputs_only = self.kind.startswith("triplet") and isinstance(outputs, (tuple, list))
        return tuple(outputs) if inputs_only else (outputs, targets)

    def divisor(self, how: Any) -> Divisor:
        """Of one term, as it was declared, or torch's own loss has it."""
        if callable(how):
            name = name_of(how)
            of: Callable[[Any], float] = lambda batch: as_denominator(how(batch), f"reduction={name}")  # noqa: E731
            return Divisor(rules=[Count(f"{name}(batch)", "", of)], confirmed=TRUSTED)
        if how == "sum":
            return Divisor("constant")
        kind = "constant" if how == "auto" and self.reduction == "sum" else "count"
        made = Divisor(kind, [self.count(how, _OVER_BY_NAME.get(how, self._over))], TRUSTED)
        if how == "auto":
            made.compared = TRUSTED  # micro-batches show it of torch's own losses, whose rules are known
        return made

    def count(self, how: str, over: str = "classes", cut: str = "") -> Count:
        """Of a mean over "samples", "elements" of the targets, their "rows" or "classes", without what is shifted away.

        Classes that are ignored do not count; others by their weight, where the loss has weights.
        """
        name = "the elements of the targets" if over == "elements" else "the samples"
        if over == "classes":
            name = other_than(ignored_by(self.settings), cut)
            weighted = how == "weighted_mean" or (how == "auto" and self.class_weights is not None)
            name = f"the class weights of {name}" if weighted else name
        return Count(name, how, lambda batch: self._amount(batch, how, over, cut))

    def _amount(self, batch: Any, how: str, over: str, cut: str) -> float:
        if over == "samples":
            return samples(batch)
        targets = self._targets(batch, how)
        if over == "classes" and holds_indices(targets):
            return self._classes(CUTS[cut](targets) if targets.dim() == 2 else targets, how)
        if over != "classes":
            return elements(targets) / (1 if over == "elements" else int(targets.shape[-1]))
        if how == "auto" and isinstance(targets, Tensor) and targets.dim() > 1:
            # Class probabilities, (samples, classes, ...): torch divides by samples × places, even with weights.
            return elements(targets) / int(targets.shape[1])
        kind = f"of {targets.dtype}" if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
        raise DataError(
            f"the targets are {kind}, and {'the loss' if how == 'auto' else f'reduction={how!r}'} counts class "
            "indices, which are integers (targets.long()), or class probabilities of shape (samples, classes, "
            "...): for others use 'element_mean' or 'sample_mean', or declare reduction=f(batch)"
        )

    def _classes(self, targets: Tensor, how: str) -> float:
        """The targets that are not ignored, or their class weights, of which a copy lies on the host."""
        ignored, weights = ignored_by(self.settings), self.class_weights
        if weights is None or how == "token_mean":
            return tokens(targets, ignored)
        version, kept = -1 if weights.is_inference() else weights._version, self._on_host
        if kept is None or kept[0] is not weights or kept[1] != version:
            # A copy to the host waits for the device: done again only where the weights were changed.
            kept = self._on_host = weights, version, weights.detach().to("cpu", torch.float64)
        return float(kept[2][targets[targets != ignored].to("cpu", torch.long)].sum())

    @property
    def guess(self) -> Count:
        """Of a loss that cannot be read: the labels of a model that computes its own, else the samples."""

        def of(batch: Any) -> float:
            labels = targets_in(batch, apart=False) if self.loss is None else None
            if not isinstance(labels, Tensor):
                return samples(batch)
            return tokens(labels) if holds_indices(labels) else elements(labels)

        name = "the labels that count" if self.loss is None and self.step is None else "the samples"
        return Count(name, "", of)

    def _targets(self, batch: Any, how: str) -> Any:
        if self.loss is not None:
            return arrange(batch, apart=True).targets
        targets = targets_in(batch, apart=self.step is not None)
        if targets is None:
            raise DataError(
                f"reduction={shown(how)} counts the batch's targets, and a {type(batch).__name__} does not say which "
                f"they are: name one of {', '.join(map(repr, TARGET_KEYS))} in a mapping, or declare reduction=f(batch)"
            )
        return targets

    @property
    def class_weights(self) -> Tensor | None:
        """The loss's own, where its mean has them."""
        weights = getattr(self.settings, "weight", None) if self.takes_classes or not self.kind else None
        return weights if isinstance(weights, Tensor) and weights.dim() == 1 else None


def _torchs(loss: Any) -> tuple[str, str, Any]:
    """(which of torch's losses it is, its name in torch, what has its settings); the first "" for any other.

    A subclass with a forward of its own is another: it may shift or mask the targets first.
    """
    inner: Any = getattr(loss, "_orig_mod", loss)  # torch.compile
    settings = inner
    if isinstance(inner, functools.partial):
        if inner.args:  # the outputs or the targets are fixed beforehand: not a loss of (outputs, targets)
            return "", "", loss
        for old in ("size_average", "reduce"):
            if inner.keywords.get(old) is not None:
                value = shown(inner.keywords[old])
                raise SetupError(f"{old}={value} is deprecated in torch: pass reduction='mean' or 'sum'")
        inner, settings = inner.func, SimpleNamespace(**inner.keywords)
    name = getattr(inner, "__name__", "")
    owner, is_torchs = name, bool(name) and getattr(functional, name, None) is inner
    if isinstance(inner, nn.Module):
        settings = inner
        defines = next(each for each in type(inner).__mro__ if "forward" in vars(each))
        owner, is_torchs = defines.__name__, defines.__module__ == nn.modules.loss.__name__
        name = type(inner).__name__
    kind = owner.lower().replace("_", "").replace("binarycrossentropy", "bce").removesuffix("loss")
    return (kind, name, settings) if is_torchs and kind in _OVER else ("", "", loss)


def _apart(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _check(given: GivenLoss, reduction: Any) -> None:
    """Refuses what cannot be called, or declares nothing."""
    step = given.step
    if given.loss is not None and step is not None:
        raise SetupError(
            "loss and step are both given: step=f(model, batch) calls the model and computes the loss itself, so pass "
            "one of them"
        )
    for name, function, example, arguments in (
        ("loss", given.loss, "torch.nn.functional.cross_entropy or nn.CrossEntropyLoss()", ("outputs", "targets")),
        ("step", step, "f(model, batch) -> Tensor", ("model", "batch")),
    ):
        if function is not None and not callable(function):
            raise SetupError(f"{name}={shown(function)} is a {type(function).__name__}, not a function: pass {example}")
        if isinstance(function, type):
            raise SetupError(f"{name}={function.__name__} is a class: pass an instance, {function.__name__}()")
        if function is not None and (function is step or not given.kind):
            check_call(name, function, arguments)
    several = isinstance(reduction, Mapping)
    named = _NAMED[2:] if several else _NAMED  # a dict that leaves a term to be read declares nothing of it
    choices = f"choose {', '.join(map(repr, named))}, or declare f(batch) -> float"
    if several and (step is None or not reduction):
        what = "names no term" if step is not None else "only a step returns several: pass step=f(model, batch)"
        raise SetupError(f"reduction={shown(reduction)} is a dict of terms, and {what}; for one loss {choices}")
    for name, how in reduction.items() if several else [("", reduction)]:
        known = how in named if isinstance(how, str) else callable(how) and not isinstance(how, nn.Module)
        if not known or not isinstance(name, str):
            what = f"[{name!r}]={shown(how)} declares nothing" if several else f"={shown(how)} is not known"
            raise SetupError(f"reduction{what}: {choices}")
        if callable(how):
            check_call("reduction", how, ("batch",))
