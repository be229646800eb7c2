"""What a step returned, as the terms of its loss: a tensor, a Mean, or a dict of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from autoaccum.errors import LossError
from autoaccum.loss.call import scalar
from autoaccum.loss.mean import Mean

__all__ = ["OwnMeans", "named_terms", "summed"]


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
        kinds = ", ".join(f"{name!r}: {type(value).__name__}" for name, value in terms.items())
        raise LossError(
            f"the step returned {{{kinds}}}: return the one loss, and detach what is only to be looked at "
            f"(.detach()); or a Mean for each term; or declare each term's denominator, as reduction={_remedy(terms)}"
        )
    return sum(scalar(value, f"the step's term {name!r}") for name, value in terms.items())


def named_terms(result: Any, names: Sequence[str]) -> dict[str, Any]:
    """What a step returned of each term that is known by name; one term goes by whatever name.

    Raises:
        LossError: it returned others.
    """
    terms = _terms_in(result, names)
    if len(terms) == 1 and list(names) == ["loss"]:
        return {"loss": next(iter(terms.values()))}
    if set(terms) != set(names):
        found, known = (", ".join(map(repr, each)) for each in (terms, names))
        raise LossError(
            f"the step returned the terms {found}, and {known} are declared, or were returned before: return the same "
            f"terms each time, with a denominator of 0 where nothing counts, or declare each, as "
            f"reduction={_remedy(terms)}"
        )
    return {name: terms[name] for name in names}


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


def _remedy(terms: Iterable[Any]) -> str:
    return "{" + ", ".join(f"{name!r}: f(batch)" for name in terms) + "}"
