"""What a step returned, as the terms of its loss: a tensor, a Mean, or a dict of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from autoaccum.errors import LossError
from autoaccum.loss.call import scalar
from autoaccum.loss.mean import Mean

__all__ = ["OwnMeans", "declared_terms", "own_means", "summed"]


class OwnMeans(LossError):
    """A step returned Means, of which nothing has to be read; an error where it returned tensors before.

    Attributes:
        names: of its terms.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__("the step returned a Mean, and a tensor before: return a Mean each time, or never")
        self.names = names


def summed(result: Any, *, means: bool = False) -> Any:
    """What a step returned, as one loss. With `means` Means are added up as well, each divided by its own denominator.

    Raises:
        OwnMeans: it is made of Means.
        LossError: some of its terms are Means and some are not; or a loss stands beside terms that may be in it.
    """
    terms = _terms_in(result)
    owned = [isinstance(value, Mean) for value in terms.values()]
    if owned and all(owned):
        if means:
            return sum(mean.numerator / mean.denominator for mean in terms.values())
        raise OwnMeans(tuple(terms) if len(terms) > 1 else ("loss",))
    if len(terms) == 1:
        return next(iter(terms.values()))
    if any(owned) or "loss" in terms or not terms:
        raise LossError(
            f"the step returned {_kinds(terms)}: return the one loss, and detach what is only to be looked at "
            f"(.detach()); or a Mean for each term; or declare each term's denominator, as reduction={_remedy(terms)}"
        )
    return sum(scalar(value, f"the step's term {name!r}") for name, value in terms.items())


def declared_terms(result: Any, names: Sequence[str]) -> dict[str, Any]:
    """What a step returned of each term that was declared; a LossError where it returned others."""
    terms = _named(_terms_in(result, names), names)
    if set(terms) != set(names):
        raise LossError(
            f"the step returned the terms {', '.join(map(repr, terms))}, and reduction declares "
            f"{', '.join(map(repr, names))}: declare each term, as reduction={_remedy(terms)}"
        )
    return {name: terms[name] for name in names}


def own_means(result: Any, names: Sequence[str], graph: bool) -> dict[str, Mean]:
    """What a step returned that owns its denominators, under the `names` it had before; a LossError for others."""
    terms = _named(_terms_in(result), names)
    if list(terms) != list(names) or not all(isinstance(value, Mean) for value in terms.values()):
        raise LossError(
            f"the step returned {_kinds(terms)}, and a Mean for each of {', '.join(map(repr, names))} before: return "
            "the same terms each time, with a denominator of 0 where nothing counts"
        )
    for value in terms.values():
        # A tensor on a device is not waited for; where it is 0 there may be no graph either.
        counts = isinstance(value.denominator, Tensor) or value.denominator > 0
        scalar(value.numerator, "the step's Mean", graph=graph and counts)
    return dict(terms)


def _named(terms: Mapping[Any, Any], names: Sequence[str]) -> Mapping[Any, Any]:
    """One term goes by whatever name."""
    return {"loss": next(iter(terms.values()))} if len(terms) == 1 and list(names) == ["loss"] else terms


def _terms_in(result: Any, declared: Sequence[str] = ()) -> Mapping[Any, Any]:
    """The terms of the loss in what a step returned, by name.

    Beside "loss" a step may return what is no term: outputs, which are larger than one number, and figures without a
    graph. What is called a loss is one, so that a term whose mean was forgotten is refused and not left out.
    """
    if not isinstance(result, Mapping):
        return {"loss": result}
    if "loss" not in result:
        return result
    return {
        name: value
        for name, value in result.items()
        if name == "loss" or name in declared or isinstance(value, Mean)
        or (isinstance(value, Tensor) and value.requires_grad and (value.numel() == 1 or "loss" in str(name)))
    }  # fmt: skip


def _kinds(terms: Mapping[Any, Any]) -> str:
    return "{" + ", ".join(f"{name!r}: {type(value).__name__}" for name, value in terms.items()) + "}"


def _remedy(terms: Iterable[Any]) -> str:
    return "{" + ", ".join(f"{name!r}: f(batch)" for name in terms) + "}"
