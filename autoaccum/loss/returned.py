"""What a step returned, as the terms of its loss: a tensor, a Mean, or a dict of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from autoaccum.errors import LossError
from autoaccum.loss.call import scalar
from autoaccum.loss.divisor import near
from autoaccum.loss.mean import Mean

__all__ = ["OwnMeans", "declared_terms", "own_means", "summed"]


class OwnMeans(Exception):
    """A step returned Means: nothing has to be read.

    Attributes:
        names: of its terms.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
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


def declared_terms(
    result: Any, denominators: Mapping[str, float], adds_up: Callable[[str], bool], graph: bool
) -> dict[str, Any]:
    """The terms whose denominators were known before the step ran: a Mean checked against them, or what was returned.

    Where something counts, `graph` asks for one.

    Raises:
        LossError: other terms than declared; a Mean that says another denominator, or whose term is a sum.
    """
    terms = _named(_terms_in(result, tuple(denominators)), tuple(denominators))
    if set(terms) != set(denominators):
        raise LossError(
            f"the step returned the terms {', '.join(map(repr, terms))}, and reduction declares "
            f"{', '.join(map(repr, denominators))}: declare each term, as reduction={_remedy(terms)}"
        )
    found = {name: terms[name] for name in denominators}
    for name, mean in found.items():
        if not isinstance(mean, Mean):
            continue
        own, denominator = mean.denominator, denominators[name]
        if isinstance(own, float) and not near(own, denominator):
            raise LossError(
                f"the step's Mean for {name!r} says it was divided by {own:g}, and its declared reduction gives "
                f"{denominator:g} for the same batch: let both count the same, or declare none"
            )
        if adds_up(name):
            raise LossError(
                f"the step returned a Mean for {name!r}, and reduction='sum' says that it is added up: return the sum"
            )
        found[name] = Mean(scalar(mean.numerator, "the step's Mean", graph=graph and denominator > 0), denominator)
    return found


def own_means(result: Any, names: tuple[str, ...], graph: bool) -> dict[str, Mean]:
    """What a step returned that owns its denominators, under the `names` it had before; a LossError for others."""
    terms = _named(_terms_in(result), names)
    if tuple(terms) != names or not all(isinstance(value, Mean) for value in terms.values()):
        raise LossError(
            f"the step returned {_kinds(terms)}, and a Mean for each of {', '.join(map(repr, names))} before: return "
            "the same terms each time, with a denominator of 0 where nothing counts"
        )
    for value in terms.values():
        # A tensor on a device is not waited for; where it is 0 there may be no graph either.
        counts = isinstance(value.denominator, Tensor) or value.denominator > 0
        scalar(value.numerator, "the step's Mean", graph=graph and counts)
    return dict(terms)


def _named(terms: Mapping[Any, Any], names: tuple[str, ...]) -> Mapping[Any, Any]:
    """One term goes by whatever name."""
    return {"loss": next(iter(terms.values()))} if len(terms) == 1 and names == ("loss",) else terms


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
