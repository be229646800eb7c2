"""What each term of a loss came to: the graph keeps what a loss divides by, but not the values on the way.

Noted where they arise, at each of torch's functions that returns one element.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autoaccum.loss.graph import Term

__all__ = ["Values", "apportioned", "part_of"]


class Values(TorchFunctionMode):
    """Notes the results of one element while it is entered.

    Attributes:
        by_node: each by the node of the graph that made it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_node: dict[Any, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == 1 and result.grad_fn is not None:
            self.by_node[result.grad_fn] = result.detach()
        return result


def apportioned(loss: Tensor, terms: Sequence[Term], values: Mapping[Any, Tensor]) -> list[Tensor]:
    """Each term's part of the loss. What nobody saw is divided evenly among the terms that nobody saw.

    So parts are exact but for two terms made inside one function of torch's; those of label smoothing are such, and
    divide by the same number, so that their sum is all that matters.
    """
    parts = [part_of(term, values) for term in terms]
    left = loss.nan_to_num() - sum(part for part in parts if part is not None)
    unseen = parts.count(None) or 1
    return [left / unseen if part is None else part.to(loss.dtype) for part in parts]


def part_of(term: Term, values: Mapping[Any, Tensor]) -> Tensor | None:
    """One term's part of its loss, shape (); 0 where it divides by 0; None where nobody saw it."""
    value = values.get(term.top)
    if value is None and hasattr(term.top, "variable"):
        value = term.top.variable.detach()  # a parameter that is a term itself
    if value is None or value.numel() != 1:
        return None
    over = torch.as_tensor(term.over, device=value.device)
    nothing = over == 0 if term.divisor is None else torch.as_tensor(term.divisor, device=value.device) == 0
    return torch.where(nothing, torch.zeros_like(value), value * term.factor / over).reshape(())
