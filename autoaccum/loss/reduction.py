"""What a loss is divided by where the settings say it: declared, or as torch's own loss does.

A declared reduction says what the loss's mean runs over, whatever the loss is. Settings that contradict each other are
refused here, before anything runs.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from autoaccum.checks import check_call
from autoaccum.errors import DataError, SetupError, shown
from autoaccum.loss.call import TARGET_KEYS, arrange, targets_in
from autoaccum.loss.counts import (
    CUTS,
    IGNORED,
    ClassWeights,
    Count,
    as_denominator,
    elements,
    holds_indices,
    labels_counted,
    samples,
    tokens,
)
from autoaccum.loss.divisor import TRUSTED, Divisor
from autoaccum.loss.reading import Reading
from autoaccum.loss.torch_losses import TorchLoss

__all__ = ["declared", "name_of"]

_NAMED = ("auto", "coupled", "sample_mean", "token_mean", "weighted_mean", "element_mean", "sum")


def declared(loss: Any, step: Any, reduction: Any, torch_loss: TorchLoss | None) -> Reading:
    """What each term is divided by, as far as the settings say it: the same on every rank.

    A loss that nobody declared, and that is none of torch's, is left to be read; its labels or samples are a guess.

    Raises:
        SetupError: the settings are unknown, or contradict each other.
    """
    _check_callables(loss, step)
    _check_declared(reduction, step)
    for name, given, arguments in (("loss", loss, ("outputs", "targets")), ("step", step, ("model", "batch"))):
        if given is not None and (name == "step" or torch_loss is None):
            check_call(name, given, arguments)
    counts = _Counts(loss, step, torch_loss)
    if isinstance(reduction, str) and reduction == "auto":
        if torch_loss is None:
            why = "nothing counts in the samples that were tried, or too little"
            how = "divides by what its graph says, read at each micro-batch"
            return Reading({"loss": Divisor(rules=[counts.guess])}, "unsettled", how, unseen=why)
        kind = "constant" if torch_loss.reduction == "sum" else "count"
        own = Divisor(kind, [Count(torch_loss.divides_by, "", counts.of_torch)], TRUSTED)
        return Reading({"loss": own}, "declared", f"as {torch_loss.name} does")
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
    labels = torch_loss is None and reduction in ("token_mean", "weighted_mean")
    return Reading(
        {name: counts.divisor(how) for name, how in terms.items()},
        "declared",
        f"as declared by reduction={shown(reduction)}" if isinstance(reduction, str) else "as declared",
        gives_sums=torch_loss is not None and torch_loss.reduction in ("sum", "none"),
        cuts=[counts.labels(reduction, cut) for cut in CUTS] if labels else (),
    )


class _Counts:
    """What a declared reduction counts in a batch; the settings of the loss are read at each count."""

    def __init__(self, loss: Any, step: Any, torch_loss: TorchLoss | None) -> None:
        self._loss, self._step, self._torch, self._weights = loss, step, torch_loss, ClassWeights()

    def divisor(self, how: Any) -> Divisor:
        """Of one term, as it was declared."""
        if isinstance(how, str) and how == "sum":
            return Divisor("constant")
        if callable(how):
            name = name_of(how)
            of: Callable[[Any], float] = lambda batch: as_denominator(how(batch), f"reduction={name}")  # noqa: E731
            return Divisor(rules=[Count(f"{name}(batch)", "", of)], confirmed=TRUSTED)
        if how == "sample_mean":
            count = Count("the samples", how, samples)
        elif how == "element_mean":
            count = Count("the elements of the targets", how, lambda batch: elements(self._targets(batch, how)))
        else:
            count = self.labels(how, "")
        return Divisor(rules=[count], confirmed=TRUSTED)

    def labels(self, how: str, cut: str) -> Count:
        """Of the labels that count, or their class weights; without those that a head shifts away."""
        name = labels_counted(cut, self._ignore_index)

        def of(batch: Any) -> float:
            targets = self._targets(batch, how)
            if not holds_indices(targets):
                kind = f"{targets.dtype}" if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
                raise DataError(
                    f"reduction={shown(how)} counts targets that are integers, and these are {kind}: "
                    "use 'element_mean' or 'sample_mean', or declare reduction=f(batch)"
                )
            counted = CUTS[cut](targets) if targets.dim() == 2 else targets
            weights = self.class_weights if how == "weighted_mean" else None
            return self._weights.total(counted, weights, self._ignore_index)

        return Count(name if how == "token_mean" else f"the class weights of {name}", how, of)

    def of_torch(self, batch: Any) -> float:
        """As torch's own loss divides."""
        assert self._torch is not None
        return self._torch.denominator(arrange(batch, apart=True).targets, lambda: samples(batch))

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
        targets = targets_in(batch, apart=self._loss is not None or self._step is not None)
        if targets is None:
            raise DataError(
                f"reduction={shown(how)} counts the batch's targets, and a {type(batch).__name__} does not say which "
                f"they are: name one of {', '.join(map(repr, TARGET_KEYS))} in a mapping, or declare reduction=f(batch)"
            )
        return targets

    @property
    def _ignore_index(self) -> int:
        return self._torch.ignore_index if self._torch else int(getattr(self._loss, "ignore_index", IGNORED))

    @property
    def class_weights(self) -> Tensor | None:
        """The loss's own."""
        weights = self._torch.weights if self._torch is not None else getattr(self._loss, "weight", None)
        return weights if isinstance(weights, Tensor) and weights.dim() == 1 else None


def name_of(f: Any) -> str:
    """A callable's name, for messages."""
    return getattr(f, "__qualname__", None) or type(f).__name__


def _check_callables(loss: Any, step: Any) -> None:
    if loss is not None and step is not None:
        raise SetupError(
            "loss and step are both given: step=f(model, batch) calls the model and computes the loss itself, so pass "
            "one of them"
        )
    for name, given, example in (
        ("loss", loss, "torch.nn.functional.cross_entropy or nn.CrossEntropyLoss()"),
        ("step", step, "f(model, batch) -> Tensor"),
    ):
        if given is not None and not callable(given):
            raise SetupError(f"{name}={shown(given)} is a {type(given).__name__}, not a function: pass {example}")
        if isinstance(given, type):
            raise SetupError(f"{name}={given.__name__} is a class: pass an instance, {given.__name__}()")


def _check_declared(declared: Any, step: Any) -> None:
    several = isinstance(declared, Mapping)
    named = _NAMED[2:] if several else _NAMED  # a dict that leaves a term to be read declares nothing of it
    choices = f"choose {', '.join(map(repr, named))}, or declare f(batch) -> float"
    if several and step is None:
        raise SetupError(
            f"reduction is a dict of {len(declared)} terms, and only a step returns several: pass step=f(model, batch) "
            f"-> dict[str, Mean]; without one, {choices}"
        )
    if several and not declared:
        raise SetupError("reduction={} names no term: give {name: f(batch)} for each that the step returns")
    for name, how in declared.items() if several else [("", declared)]:
        known = how in named if isinstance(how, str) else callable(how) and not isinstance(how, nn.Module)
        if not known or not isinstance(name, str):
            what = f"[{name!r}]={shown(how)} declares nothing" if several else f"={shown(how)} is not known"
            raise SetupError(f"reduction{what}: {choices}")
        if callable(how):
            check_call("reduction", how, ("batch",))
