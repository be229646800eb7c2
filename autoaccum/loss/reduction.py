"""What a loss is divided by, decided from the settings: one counter a term, and the reason in words.

Choices: torch's losses know themselves; of any other loss the divisor is read off its graph (graph.py, settle.py), and
where that cannot be, labels or samples are counted, and verification tells whether that was right. A declared reduction
says what the loss's mean runs over, whatever the loss is. Settings that contradict each other are refused here, before
anything runs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from autoaccum.checks import check_call
from autoaccum.data import tree
from autoaccum.errors import DataError, SetupError, shown
from autoaccum.loss.call import TARGET_KEYS, arrange, targets_in
from autoaccum.loss.counting import IGNORED, ClassWeights, as_denominator, elements, holds_indices, tokens
from autoaccum.loss.counts import CUTS, Count
from autoaccum.loss.divisor import Settled, Unread
from autoaccum.loss.torch_losses import TorchLoss

__all__ = ["Reduction", "name_of"]

_NAMED = ("auto", "coupled", "sample_mean", "token_mean", "weighted_mean", "element_mean", "sum")
_CHOICES = f"choose {', '.join(map(repr, _NAMED))}, or declare f(batch) -> float"

Counter = Callable[[Any], float]


class Reduction:
    """What each term is divided by.

    Attributes:
        names: the terms, the same on every rank.
        reads: nobody declared what the loss divides by, and it is none of torch's: its graph says it.
        torch: the loss as one of torch's, or None.
        apart: whether a tuple's last element is the target.
    """

    def __init__(self, loss: Any, step: Any, declared: Any) -> None:
        """Checks the settings.

        Raises:
            SetupError: settings that are unknown, or that contradict each other.
        """
        _check_callables(loss, step)
        _check_declared(declared, step)
        self._loss, self._step, self._declared = loss, step, declared
        self.torch = TorchLoss.recognise(loss) if loss is not None else None
        if loss is not None and self.torch is None:
            check_call("loss", loss, ("outputs", "targets"))
        if step is not None:
            check_call("step", step, ("model", "batch"))
        self._cut = ""
        self._weights = ClassWeights()
        terms: Mapping[str, Any] = declared if isinstance(declared, Mapping) else {"loss": declared}
        self.names: tuple[str, ...] = tuple(terms)
        self.apart = loss is not None or step is not None
        own_code = self.torch is None or not self.torch.plain
        self.reads = own_code and isinstance(declared, str) and declared == "auto"
        self.wants_cut = own_code and isinstance(declared, str) and declared in ("token_mean", "weighted_mean")
        self._counters: Sequence[tuple[str, Counter]] = [(name, self._counter(how)) for name, how in terms.items()]
        if self.torch is not None and declared == "sum" and self.torch.reduction in ("mean", "batchmean"):
            raise SetupError(
                f"reduction='sum' and a loss that averages ({self.torch.name}) contradict each other: give the loss "
                "reduction='sum', or leave reduction='auto'"
            )
        if "weighted_mean" in terms.values() and self._class_weights() is None:
            raise SetupError(
                "reduction='weighted_mean' sums class weights, and the loss has none: pass a loss such as "
                "nn.CrossEntropyLoss(weight=...), or declare reduction=f(batch)"
            )

    def count(self, batch: Any) -> dict[str, float]:
        """The denominator of each term's mean over `batch`.

        Raises:
            DataError: the batch does not hold what is counted.
            LossError: a declared f(batch) gave no denominator.
        """
        return {name: counter(batch) for name, counter in self._counters}

    def of(self, name: str) -> Any:
        """The declared reduction of a term."""
        return self._declared[name] if isinstance(self._declared, Mapping) else self._declared

    def adds_up(self, name: str) -> bool:
        """Whether the term is a sum, which is never divided."""
        how = self.of(name)
        if how != "auto":
            return bool(how == "sum")
        if self.torch is not None:
            return self.torch.reduction == "sum"
        return False

    @property
    def takes_sums(self) -> bool:
        """Whether what the loss gives is a numerator already: a sum or single elements, with a declared denominator."""
        return self.torch is not None and self._declared != "auto" and self.torch.reduction in ("sum", "none")

    def declared_counts(self) -> list[Count]:
        """What a declared mean over labels may mean: all columns of them, or less those that the head shifts away."""
        if not self.wants_cut:
            return []
        weights = self._class_weights() if self._declared == "weighted_mean" else None

        def counting(cut: str) -> Callable[[Any], float]:
            return lambda batch: self._indices(batch, self._declared, weights, cut)

        return [Count(cut, f"reduction={self._declared!r}", counting(cut)) for cut in CUTS]

    def take_cut(self, found: Any) -> None:
        """Takes the columns which a declared mean over labels was seen to leave out."""
        self.wants_cut = found is None
        rules = found.divisors[0].rules if isinstance(found, Settled) and len(found.divisors) == 1 else []
        self._cut = next((rule.counted.name for rule in rules if rule.counted.name in CUTS), "")

    @property
    def ignore_index(self) -> int:
        """The index that the loss says it ignores."""
        return self.torch.ignore_index if self.torch is not None else int(getattr(self._loss, "ignore_index", IGNORED))

    # Counting.

    def _counter(self, how: Any) -> Counter:
        if callable(how):
            return lambda batch: as_denominator(how(batch), f"reduction={name_of(how)}")
        counters: Mapping[str, Counter] = {
            "auto": self._torch if self.torch is not None else self._own if self._loss is None else _samples,
            "sample_mean": _samples,
            "token_mean": self._tokens,
            "weighted_mean": self._weighted,
            "element_mean": lambda batch: elements(self._targets(batch, "element_mean")),
            "sum": _samples,
        }
        return counters[how]

    def _torch(self, batch: Any) -> float:
        assert self.torch is not None
        return self.torch.denominator(arrange(batch, apart=True).targets, lambda: _samples(batch))

    def _own(self, batch: Any) -> float:
        labels = targets_in(batch, apart=False)
        if not isinstance(labels, Tensor):
            return _samples(batch)
        return tokens(labels, IGNORED) if holds_indices(labels) else elements(labels)

    def _tokens(self, batch: Any) -> float:
        return self._indices(batch, "token_mean", None, self._cut)

    def _weighted(self, batch: Any) -> float:
        return self._indices(batch, "weighted_mean", self._class_weights(), self._cut)

    def _indices(self, batch: Any, how: str, weights: Tensor | None, cut: str) -> float:
        targets = self._targets(batch, how)
        if not holds_indices(targets):
            kind = f"{targets.dtype}" if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
            raise DataError(
                f"reduction={shown(how)} counts targets that are integers, and these are {kind}: "
                "use 'element_mean' or 'sample_mean', or declare reduction=f(batch)"
            )
        counted = CUTS[cut](targets) if targets.dim() == 2 else targets
        if weights is not None:
            return self._weights.total(counted, weights, self.ignore_index)
        return tokens(counted, self.ignore_index)

    def _targets(self, batch: Any, how: str) -> Any:
        targets = targets_in(batch, apart=self.apart)
        if targets is None:
            raise DataError(
                f"reduction={shown(how)} counts the batch's targets, and a {type(batch).__name__} does not say which "
                "they "
                f"are: name one of {', '.join(map(repr, TARGET_KEYS))} in a mapping, or declare reduction=f(batch)"
            )
        return targets

    def _class_weights(self) -> Tensor | None:
        weights = self.torch.weights if self.torch is not None else getattr(self._loss, "weight", None)
        return weights if isinstance(weights, Tensor) and weights.dim() == 1 else None

    # Words.

    @property
    def reason(self) -> str:
        """One line: the denominator, and why it is that."""
        if isinstance(self._declared, Mapping):
            return "; ".join(f"{name} {self.words(name)}" for name in self._declared)
        return self.words("loss")

    def words(self, name: str) -> str:
        """What one of the terms is divided by, and why it is that."""
        how = self.of(name)
        if callable(how):
            return f"divides by {name_of(how)}(batch), as declared"
        if how != "auto":
            return self._declared_reason(how)
        if self.torch is None or not self.torch.plain:
            return "divides by what its graph says, read at each micro-batch"
        does = "adds up" if self.torch.reduction == "sum" else f"divides by {self.torch.divides_by}"
        return f"{does}, as {self.torch.name} does"

    def assumed_reason(self, found: Unread) -> str:
        """One line, of a loss whose graph does not say what it divides by."""
        if found.rule is not None:
            return f"divides by {found.rule.name}, by which its values add up ({found.why})"
        by = "the labels that count" if self._loss is None and self._step is None else "the samples"
        return f"divides by {by}, assumed since {found.why}: reduction= declares another denominator"

    def _declared_reason(self, how: str) -> str:
        if how == "sum":
            return "adds up, as declared by reduction='sum'"
        labels = f"the labels other than {self.ignore_index}" + (f" in batch{self._cut}" if self._cut else "")
        by = {
            "sample_mean": "the samples",
            "token_mean": labels,
            "weighted_mean": f"the class weights of {labels}",
            "element_mean": "the elements of the targets",
        }[how]
        return f"divides by {by}, as declared by reduction={shown(how)}"


def name_of(f: Any) -> str:
    """A callable's name, for messages."""
    return getattr(f, "__qualname__", None) or type(f).__name__


def _samples(batch: Any) -> float:
    return float(tree.batch_size(batch))


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
    if isinstance(declared, Mapping):
        if step is None:
            raise SetupError(
                f"reduction is a dict of {len(declared)} terms, and only a step returns several: pass "
                f"step=f(model, batch) -> dict[str, Mean]; without one, {_CHOICES}"
            )
        if not declared:
            raise SetupError("reduction={} names no term: give {name: f(batch)} for each that the step returns")
        for name, how in declared.items():
            if not isinstance(name, str) or how == "auto" or not (callable(how) or _is_named(how)):
                raise SetupError(
                    f"reduction[{name!r}]={shown(how)} declares nothing: {_CHOICES.replace(repr('auto') + ', ', '')}"
                )
    elif not (callable(declared) or _is_named(declared)) or isinstance(declared, nn.Module):
        raise SetupError(f"reduction={shown(declared)} is not known: {_CHOICES}")
    for how in declared.values() if isinstance(declared, Mapping) else [declared]:
        if callable(how):
            check_call("reduction", how, ("batch",))


def _is_named(how: Any) -> bool:
    return isinstance(how, str) and how in _NAMED
