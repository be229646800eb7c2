"""A mean kept as numerator and denominator, so that a window can add it up exactly.

Loss = Σ numerators / Σ denominators, over the window and all ranks. Where only a mean is at hand (torch's losses, a
model's own loss) it enters as mean × (its denominator / the sum of all): no raw sum is formed, which could overflow in
half precision, and a mean over nothing (NaN) never enters at all. What a step returns, a tensor, a Mean or a dict of
them, is taken apart here as well.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autoaccum.errors import LossError, shown
from autoaccum.loss.call import scalar
from autoaccum.loss.counts import as_denominator, as_number
from autoaccum.loss.graph import Term, weigh

__all__ = ["Mean", "OwnMeans", "Several", "Sum", "named_terms", "summed"]


class Mean:
    """A mean kept as its two parts: what a step returns when it owns its denominator.

    ```python
    def step(model, batch):
        losses = cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        return autoaccum.Mean((losses * batch["mask"]).sum(), batch["mask"].sum())
    ```

    Attributes:
        denominator: a float, or a tensor of shape () where it lies on a device, which is then not waited for.
    """

    __slots__ = ("_divided", "_divisor", "_tensor", "denominator")

    def __init__(self, numerator: Tensor | float, denominator: float | Tensor) -> None:
        """Takes the sum of the losses and what it is divided by, one element each; 0 where nothing counts.

        Raises:
            LossError: a part that is not one number, or a denominator that is negative or not finite.
        """
        if not isinstance(numerator, Tensor):
            # A metric's count; no graph.
            numerator = torch.tensor(
                as_number(numerator, "Mean's numerator", "the sum of the losses"), dtype=torch.float64
            )
        self._tensor = scalar(numerator, "Mean(numerator, denominator)", graph=False)
        self._divided: float | Tensor = 1.0  # what the tensor was divided by already
        self.denominator = self._divisor = _denominator(denominator)

    @classmethod
    def of(cls, mean: Tensor, denominator: float | Tensor, divisor: float | Tensor | None = None) -> "Mean":
        """Where only the mean is at hand, of one element, and what it adds to the denominator of a mean over more.

        `divisor` is what it was divided by itself, where that is another number: a floor, say.
        """
        made = cls.__new__(cls)
        made._tensor, made.denominator = mean, _denominator(denominator)
        made._divided = made._divisor = made.denominator if divisor is None else divisor
        return made

    @property
    def numerator(self) -> Tensor:
        """The sum, shape (); with its graph."""
        tensor, divided = self._tensor, self._divided
        if isinstance(divided, float) and divided in (0, 1):
            return tensor if divided else tensor.new_zeros(())
        return (tensor.float() if tensor.dtype.itemsize == 2 else tensor) * divided

    @property
    def value(self) -> Tensor:
        """The mean itself, shape (), detached; NaN where nothing counts."""
        own = self._tensor.detach()
        return own if self._divided is self._divisor else own / self._divisor

    def part(self, total: float) -> tuple[Tensor, float]:
        """(a tensor of shape (), what it is multiplied by) to be this part's share of a mean over `total`.

        The factor is for the backward pass to begin with, which is cheaper than one more multiplication in the graph.
        """
        share = self.share(total)
        if isinstance(share, float) and share:
            return self._tensor, share
        share = torch.as_tensor(share)
        return torch.where(share > 0, self._tensor * share, self._tensor.new_zeros(())), 1.0

    def share(self, total: float) -> float | Tensor:
        """What the tensor is multiplied by to be this part's share of a mean over `total`."""
        return self._divided / total

    @property
    def is_empty(self) -> bool:
        """Whether it is divided by 0, as far as that is known without waiting for a device."""
        return isinstance(self._divisor, float) and self._divisor == 0

    def __repr__(self) -> str:
        return f"Mean(numerator={shown(self.numerator)}, denominator={shown(self.denominator)})"


class Sum(Mean):
    """A term that is added up and never divided; its denominator only says whether anything counts."""

    __slots__ = ()

    @property
    def value(self) -> Tensor:
        """The sum, shape (), detached."""
        return self._tensor.detach()

    def share(self, total: float) -> float | Tensor:
        """1: a sum's parts are added up."""
        return 1.0


class Several(dict[str, Mean]):
    """The terms of one loss that was read off its graph: they are weighed there, each at its own node.

    Attributes:
        loss: all of them together, one element.
        nodes: where each term is weighed.
    """

    def __init__(self, loss: Tensor, terms: Mapping[str, Mean], nodes: Mapping[str, Term]) -> None:
        super().__init__(terms)
        self.loss, self.nodes = loss, nodes

    def parts(self, totals: Mapping[str, float]) -> tuple[list[tuple[Tensor, float]], Tensor]:
        """([the loss, and what its backward pass begins with], the value it enters the window's loss with).

        `totals`: each term's denominator, over the window and all ranks.
        """
        shares = {name: term.share(totals[name]) if totals[name] else 0.0 for name, term in self.items()}
        first, *others = (float(share) for share in shares.values())
        if all(math.isclose(share, first, rel_tol=1e-12) for share in others):
            return [(self.loss, first)], self.loss.detach() * first
        value = self.loss.new_zeros(())
        for name, share in shares.items():
            weigh(self.nodes[name], share)
            if not isinstance(share, float) or share:
                value = value + share * self[name].value
        return [(self.loss, 1.0)], value


def _denominator(value: Any) -> float | Tensor:
    if isinstance(value, float) and 0 <= value < float("inf"):
        return value
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type != "cpu":
        return value.detach().reshape(())
    return as_denominator(value, "Mean(numerator, denominator)")


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
