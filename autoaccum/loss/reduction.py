"""What a loss is divided by where the settings say it: declared, or as torch's own loss does; each term, in words.

Of any other loss the divisor is read off its graph (reading.py); where that cannot be, labels or samples are counted,
and verification tells whether that was right. A declared reduction says what the loss's mean runs over, whatever the
loss is. Settings that contradict each other are refused here, before anything runs.
"""

from collections.abc import Mapping
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
    samples,
    tokens,
)
from autoaccum.loss.reading import Reading
from autoaccum.loss.settle import Unread
from autoaccum.loss.torch_losses import TorchLoss

__all__ = ["Reduction", "name_of"]

_NAMED = ("auto", "coupled", "sample_mean", "token_mean", "weighted_mean", "element_mean", "sum")


class Reduction:
    """What each term is divided by.

    Attributes:
        terms: what was declared of each, by name; the same on every rank.
        reads: nobody declared what the loss divides by, and it is none of torch's: its graph says it.
        torch: the loss as one of torch's, or None.
        unread: why the graph cannot be read, where that was tried.
        wants_cut: a mean over labels was declared, and it was not seen which columns of them count.
    """

    def __init__(self, loss: Any, step: Any, declared: Any) -> None:
        """Checks the settings; a SetupError where they are unknown, or contradict each other."""
        _check_callables(loss, step)
        _check_declared(declared, step)
        self._loss, self._step, self._declared = loss, step, declared
        self.torch = TorchLoss.recognise(loss)
        if loss is not None and self.torch is None:
            check_call("loss", loss, ("outputs", "targets"))
        if step is not None:
            check_call("step", step, ("model", "batch"))
        self.terms: Mapping[str, Any] = declared if isinstance(declared, Mapping) else {"loss": declared}
        self.unread: Unread | None = None
        self._cut, self._weights = "", ClassWeights()
        named = declared if isinstance(declared, str) and self.torch is None else ""
        self.reads, self.wants_cut = named == "auto", named in ("token_mean", "weighted_mean")
        if self.torch is not None and declared == "sum" and self.torch.reduction in ("mean", "batchmean"):
            raise SetupError(
                f"reduction='sum' and a loss that averages ({self.torch.name}) contradict each other: give the loss "
                "reduction='sum', or leave reduction='auto'"
            )
        if "weighted_mean" in self.terms.values() and self._class_weights is None:
            raise SetupError(
                "reduction='weighted_mean' sums class weights, and the loss has none: pass a loss such as "
                "nn.CrossEntropyLoss(weight=...), or declare reduction=f(batch)"
            )

    def adds_up(self, name: str) -> bool:
        """Whether the term is a sum, which is never divided."""
        how = self.terms.get(name, "auto")
        return bool(how == "sum" or (how == "auto" and self.torch is not None and self.torch.reduction == "sum"))

    @property
    def takes_sums(self) -> bool:
        """Whether what the loss gives is a numerator already: a sum or single elements, with a declared denominator."""
        return self.torch is not None and self._declared != "auto" and self.torch.reduction in ("sum", "none")

    def cuts(self) -> list[Count]:
        """What a declared mean over labels may mean: all columns of them, or less those that the head shifts away."""
        how = self._declared
        return [
            Count(cut, how, lambda batch, cut=cut: self._labels(batch, how, cut))  # type: ignore[misc]
            for cut in (CUTS if self.wants_cut else ())
        ]

    def take_cut(self, found: Reading | Unread | None) -> None:
        """Takes the columns which a declared mean over labels was seen to leave out."""
        self.wants_cut = found is None
        rules = found.divisors[0].rules if isinstance(found, Reading) and len(found.divisors) == 1 else []
        self._cut = next((rule.name for rule in rules if rule.name in CUTS), "")

    @property
    def ignore_index(self) -> int:
        """The index that the loss says it ignores."""
        return self.torch.ignore_index if self.torch is not None else int(getattr(self._loss, "ignore_index", IGNORED))

    # Counting.

    def count(self, batch: Any) -> dict[str, float]:
        """The denominator of each term's mean over `batch`.

        Raises:
            DataError: the batch does not hold what is counted.
            LossError: a declared f(batch) gave no denominator.
        """
        return {name: self._count(how, batch) for name, how in self.terms.items()}

    def _count(self, how: Any, batch: Any) -> float:
        if callable(how):
            return as_denominator(how(batch), f"reduction={name_of(how)}")
        if how == "element_mean":
            return elements(self._targets(batch, how))
        if how in ("token_mean", "weighted_mean"):
            return self._labels(batch, how, self._cut)
        return self._undeclared(batch) if how == "auto" else samples(batch)

    def _undeclared(self, batch: Any) -> float:
        """As torch's own loss divides; of one that could not be read by its labels or samples."""
        if self.torch is not None:
            return self.torch.denominator(arrange(batch, apart=True).targets, lambda: samples(batch))
        labels = targets_in(batch, apart=False) if self._loss is None else None
        if not isinstance(labels, Tensor):
            return samples(batch)
        return tokens(labels) if holds_indices(labels) else elements(labels)

    def _labels(self, batch: Any, how: str, cut: str) -> float:
        """The labels that count, or their class weights."""
        targets = self._targets(batch, how)
        if not holds_indices(targets):
            kind = f"{targets.dtype}" if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
            raise DataError(
                f"reduction={shown(how)} counts targets that are integers, and these are {kind}: "
                "use 'element_mean' or 'sample_mean', or declare reduction=f(batch)"
            )
        counted = CUTS[cut](targets) if targets.dim() == 2 else targets
        if how == "token_mean":
            return tokens(counted, self.ignore_index)
        assert self._class_weights is not None
        return self._weights.total(counted, self._class_weights, self.ignore_index)

    def _targets(self, batch: Any, how: str) -> Any:
        targets = targets_in(batch, apart=self._loss is not None or self._step is not None)
        if targets is None:
            raise DataError(
                f"reduction={shown(how)} counts the batch's targets, and a {type(batch).__name__} does not say which "
                f"they are: name one of {', '.join(map(repr, TARGET_KEYS))} in a mapping, or declare reduction=f(batch)"
            )
        return targets

    @property
    def _class_weights(self) -> Tensor | None:
        weights = self.torch.weights if self.torch is not None else getattr(self._loss, "weight", None)
        return weights if isinstance(weights, Tensor) and weights.dim() == 1 else None

    # Words.

    @property
    def reason(self) -> str:
        """One line: the denominator, and why it is that."""
        if isinstance(self._declared, Mapping):
            return "; ".join(f"{name} {self.words(name)}" for name in self.terms)
        return self.words("loss")

    def words(self, name: str) -> str:
        """What one of the terms is divided by, and why it is that."""
        how, unread = self.terms[name], self.unread
        if callable(how):
            return f"divides by {name_of(how)}(batch), as declared"
        if how == "sum":
            return "adds up, as declared by reduction='sum'"
        if how != "auto":
            labels = f"the labels other than {self.ignore_index}" + (f" in batch{self._cut}" if self._cut else "")
            by = {
                "sample_mean": "the samples",
                "token_mean": labels,
                "weighted_mean": f"the class weights of {labels}",
                "element_mean": "the elements of the targets",
            }[how]
            return f"divides by {by}, as declared by reduction={shown(how)}"
        if unread is None:
            assert self.torch is not None  # else the loss is read, and has words of its own
            does = "adds up" if self.torch.reduction == "sum" else f"divides by {self.torch.divides_by}"
            return f"{does}, as {self.torch.name} does"
        by = "the labels that count" if self._loss is None and self._step is None else "the samples"
        return f"divides by {by}, assumed since {unread.why}: reduction= declares another denominator"


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
    named = _NAMED[1:] if several else _NAMED  # a dict that leaves a term to be read declares nothing of it
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
