"""What a loss is divided by where the settings say it: declared, or as torch's own loss does.

A declared reduction says what the loss's mean runs over, whatever the loss is. Settings that contradict each other are
refused here, before anything runs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
from autoaccum.loss.torch_losses import TorchLoss

__all__ = ["declared"]

_NAMED = ("auto", "coupled", "sample_mean", "token_mean", "weighted_mean", "element_mean", "sum")


def declared(loss: Any, step: Any, reduction: Any, torch_loss: TorchLoss | None) -> Reading:
    """What each term is divided by, as far as the settings say it: the same on every rank.

    A loss that nobody declared, and that is none of torch's, is left to be read; its labels or samples are a guess.

    Raises:
        SetupError: the settings are unknown, or contradict each other.
    """
    _check(loss, step, reduction, torch_loss)
    counts = _Counts(loss, step, torch_loss)
    how, auto = "as declared", isinstance(reduction, str) and reduction == "auto"
    if auto and torch_loss is None:
        why = "nothing counts in the samples that were tried, or too little"
        how = "divides by what its graph says, read at each micro-batch"
        return Reading({"loss": Divisor(rules=[counts.guess])}, "unsettled", how, unseen=why)
    if isinstance(reduction, str):
        how = f"as {torch_loss.name} does" if auto and torch_loss else f"as declared by reduction={shown(reduction)}"
    if torch_loss is not None and reduction == "sum" and torch_loss.reduction in ("mean", "batchmean"):
        raise SetupError(
            f"reduction='sum' and a loss that averages ({torch_loss.name}) contradict each other: give the loss "
            "reduction='sum', or leave reduction='auto'"
        )
    terms = reduction if isinstance(reduction, Mapping) else {"loss": reduction}
    if "weighted_mean" in terms.values() and counts.class_weights is None:
        raise SetupError(
            "reduction='weighted_mean' sums class weights, and the loss has none: pass a loss such as "
            "nn.CrossEntropyLoss(weight=...), or declare reduction=f(batch)"
        )
    finds_out = torch_loss is None and reduction in ("token_mean", "weighted_mean")
    return Reading(
        {name: counts.divisor(how) for name, how in terms.items()},
        "declared",
        how,
        gives_sums=not auto and torch_loss is not None and torch_loss.reduction in ("sum", "none"),
        cuts=[counts.count(reduction, cut=cut) for cut in CUTS] if finds_out else (),
    )


_OVER = {"sample_mean": "samples", "token_mean": "classes", "weighted_mean": "classes", "element_mean": "elements"}


class _Counts:
    """What a reduction counts in a batch; the settings of the loss are read at each count."""

    def __init__(self, loss: Any, step: Any, torch_loss: TorchLoss | None) -> None:
        self._loss, self._step, self._torch = loss, step, torch_loss
        self._settings = loss if torch_loss is None else torch_loss.settings
        self._on_host: tuple[Tensor, int, Tensor] | None = None  # class weights, their version, a copy

    def divisor(self, how: Any) -> Divisor:
        """Of one term, as it was declared, or torch's own loss has it."""
        if callable(how):
            name = name_of(how)
            of: Callable[[Any], float] = lambda batch: as_denominator(how(batch), f"reduction={name}")  # noqa: E731
            return Divisor(rules=[Count(f"{name}(batch)", "", of)], confirmed=TRUSTED)
        if how == "sum":
            return Divisor("constant")
        if how != "auto" or self._torch is None:
            return Divisor(rules=[self.count(how, _OVER[how])], confirmed=TRUSTED)
        return Divisor(
            "constant" if self._torch.reduction == "sum" else "count", [self.count(how, self._torch.over)], TRUSTED
        )

    def count(self, how: str, over: str = "classes", cut: str = "") -> Count:
        """Of a mean over "samples", "elements" of the targets, their "rows" or "classes", without what is shifted away.

        Classes that are ignored do not count; others by their weight, where the loss has weights.
        """
        name = "the elements of the targets" if over == "elements" else "the samples"
        if over == "classes":
            name = other_than(ignored_by(self._settings), cut)
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
        ignored, weights = ignored_by(self._settings), self.class_weights
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
            labels = targets_in(batch, apart=False) if self._loss is None else None
            if not isinstance(labels, Tensor):
                return samples(batch)
            return tokens(labels) if holds_indices(labels) else elements(labels)

        name = "the labels that count" if self._loss is None and self._step is None else "the samples"
        return Count(name, "", of)

    def _targets(self, batch: Any, how: str) -> Any:
        if self._loss is not None:
            return arrange(batch, apart=True).targets
        targets = targets_in(batch, apart=self._step is not None)
        if targets is None:
            raise DataError(
                f"reduction={shown(how)} counts the batch's targets, and a {type(batch).__name__} does not say which "
                f"they are: name one of {', '.join(map(repr, TARGET_KEYS))} in a mapping, or declare reduction=f(batch)"
            )
        return targets

    @property
    def class_weights(self) -> Tensor | None:
        """The loss's own, where its mean has them."""
        averages = self._torch is None or self._torch.takes_classes
        weights = getattr(self._settings, "weight", None) if averages else None
        return weights if isinstance(weights, Tensor) and weights.dim() == 1 else None


def _check(loss: Any, step: Any, reduction: Any, torch_loss: TorchLoss | None) -> None:
    """Refuses what cannot be called, or declares nothing."""
    if loss is not None and step is not None:
        raise SetupError(
            "loss and step are both given: step=f(model, batch) calls the model and computes the loss itself, so pass "
            "one of them"
        )
    for name, given, example, arguments in (
        ("loss", loss, "torch.nn.functional.cross_entropy or nn.CrossEntropyLoss()", ("outputs", "targets")),
        ("step", step, "f(model, batch) -> Tensor", ("model", "batch")),
    ):
        if given is not None and not callable(given):
            raise SetupError(f"{name}={shown(given)} is a {type(given).__name__}, not a function: pass {example}")
        if isinstance(given, type):
            raise SetupError(f"{name}={given.__name__} is a class: pass an instance, {given.__name__}()")
        if given is not None and (given is step or torch_loss is None):
            check_call(name, given, arguments)
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
