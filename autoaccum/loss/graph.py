"""What a loss divides by, read off its autograd graph, whoever wrote it.

From the loss down through scalar nodes (sums, differences, products and quotients with numbers) to the first node that
reduces many numbers to one. What that node divides by (the elements of a mean, the total weight of a negative log
likelihood), times what is divided by on the way, is the divisor of that term:

    (losses * mask).sum() / mask.sum()          one term, a sum; divisor Σ mask
    cross_entropy(x, y) + 0.1 * z.mean()        two terms; divisors: total weight, elements of z; factors 1, 0.1

There are three ways to read one, and which is right is settled once (settle.py): "plain"; "deep", where a reduction
over dimension 0 that stands below another one is the reduction over samples, as in `losses.mean(0).sum()`; and
"joined", where a sum or a list of losses is one term.

A few attributes are read, microseconds at each micro-batch, and nothing waits for a device: a divisor that lies on one
stays there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["WAYS", "Number", "Term", "Values", "apportioned", "part_of", "read", "weigh"]

Number = float | Tensor  # a tensor of shape () where it lies on a device

WAYS = ("plain", "deep", "joined")


@dataclass(slots=True, eq=False)
class Term:
    """Where the reading stands in a graph; at a reduction, one summand of the loss.

    Attributes:
        node: the node that was reached.
        parent, place: the edge above it: the node, and which of its inputs; no parent at the loss itself.
        over: what is divided by above `node`.
        factor: what it is multiplied by.
        divided: whether something was divided by on the way.
        divisor: what the summand is divided by; None on the way, and where the reading stopped before a reduction.
        top: the node whose value, times `factor` over `over`, is the term's part of the loss.
        tied: the edge above a product with parameters, which needs the term's share as well.
    """

    node: Any
    parent: Any = None
    place: int = 0
    over: Number = 1.0
    factor: Number = 1.0
    divided: bool = False
    divisor: Number | None = None
    top: Any = None
    tied: tuple[Any, int] | None = None

    def down(self, place: int, below: Any) -> "Term":
        """Itself, gone on to `below`, one of the node's inputs."""
        self.parent, self.place, self.node = self.node, place, below
        return self

    def copy(self) -> "Term":
        """Another one that stands where this one does, on its way."""
        return Term(self.node, self.parent, self.place, self.over, self.factor, self.divided)

    def ends(self, divisor: Number | None) -> "Term":
        """Itself, at its end."""
        self.divisor, self.top = divisor, self.node
        return self

    @property
    def name(self) -> str:
        """The reduction's name in PyTorch, without its version: "Mean"; "NllLoss", of a chunked loss too."""
        name = str(self.node.name()).rstrip("0123456789").removesuffix("Backward")
        return "NllLoss" if name == "ChunkedCrossEntropy" else name

    @property
    def is_sum(self) -> bool:
        """Whether one of torch's own losses with reduction="sum" ends it, and nothing scales that."""
        scaled = self.divided or not isinstance(self.factor, float) or self.factor != 1.0
        return not scaled and getattr(self.node, "_saved_reduction", 0) == 2


def read(loss: Tensor, way: str = "plain") -> list[Term]:
    """The terms of a scalar loss, one element with its graph; in the order in which the graph has them."""
    return [] if loss.grad_fn is None else _walk(Term(loss.grad_fn), way)


def weigh(term: Term, share: Number) -> None:
    """Multiplies a term's gradient by `share` in the backward pass to come.

    Put in below the division, where a share of 0 stops the 0 / 0 of a term in which nothing counts.
    """
    if term.tied is not None:  # the share comes in above the product; below the division only what is NaN goes
        _on_edge(*term.tied, share)
    _on_edge(term.parent, term.place, share, scales=term.tied is None)


def _on_edge(parent: Any, place: int, share: Number, *, scales: bool = True) -> None:
    def change(gradient: Tensor) -> Tensor:
        weighed = gradient * share if scales else gradient
        if isinstance(share, Tensor):
            return torch.where(share > 0, weighed, torch.zeros_like(gradient))
        return weighed if share > 0 else torch.zeros_like(gradient)

    def hook(inputs: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
        return tuple(each if each is None or number != place else change(each) for number, each in enumerate(inputs))

    if parent is not None:
        parent.register_hook(hook)


class Values(TorchFunctionMode):
    """While it is entered, keeps what torch's functions give that is one element: the graph does not keep values.

    Attributes:
        by_node: each by the node of the graph that made it.
        took: whether numbers were taken out of tensors: what is divided by may then be any function of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_node: dict[Any, Tensor] = {}
        self.took = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == 1 and result.grad_fn is not None:
            self.by_node[result.grad_fn] = result.detach()
            with_number = (isinstance(each, Tensor) and each.numel() == 1 and not each.requires_grad for each in args)
            self.took = self.took or any(with_number)
        elif getattr(func, "__name__", "") in _TAKE:
            self.took = True
        return result


_TAKE = ("item", "tolist", "numpy", "__int__", "__float__", "__bool__", "__index__")


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
    divisor = over if term.divisor is None else torch.as_tensor(term.divisor, device=value.device)
    return torch.where(divisor == 0, torch.zeros_like(value), value * term.factor / over).reshape(())


# The walk. Nodes of one element only: below a sum, a difference, a product or a quotient of one element are others of
# one element.

_SAME = frozenset(
    f"{name}Backward{number}"
    for name in ["View", "UnsafeView", "ReshapeAlias", "Alias", "Squeeze", "Unsqueeze", "ToCopy", "Clone", "NanToNum",
                 "Stack", "Cat"]
    for number in range(4)
)  # fmt: skip
_SUMS = frozenset(["AddBackward0", "AddBackward1", "SubBackward0", "SubBackward1", "RsubBackward0", "RsubBackward1"])
_PRODUCTS = frozenset(("MulBackward0", "MulBackward1"))
_QUOTIENTS = frozenset(("DivBackward0", "DivBackward1"))
_LISTS = frozenset(("StackBackward0", "CatBackward0"))
_OVER_SOME = frozenset(("MeanBackward1", "SumBackward1"))


def _walk(start: Term, way: str) -> list[Term]:
    """Down to each term's end."""
    found: list[Term] = []
    waiting = [start]  # a list and no recursion: a loss may be added up over thousands of steps
    while waiting:
        at = waiting.pop()
        name = at.node.name()
        if name in _REDUCTIONS:
            found += _reduced(at, name, way)
            continue
        inputs = [(place, node) for place, (node, _) in enumerate(at.node.next_functions) if node is not None]
        if len(inputs) > 1 and ((name in _SUMS and way != "joined") or name in _LISTS):
            sides = [at, *(at.copy() for _ in inputs[1:])]
            for side, (place, node) in zip(sides, inputs):
                _passed(side, name, place, node)
            waiting += reversed(sides)
        elif len(inputs) == 1 and _passed(at, name, *inputs[0]):
            waiting.append(at)
        elif len(inputs) > 1 and name in _SUMS:
            found.append(at.ends(at.over))
        else:
            tied = _tied(at, inputs, way) if len(inputs) > 1 and name in _PRODUCTS | _QUOTIENTS else None
            found.append(tied or at.ends(None))
    return found


def _passed(at: Term, name: str, place: int, below: Any) -> bool:
    """Goes on to an input, with what it is multiplied with or divided by; False where the node does something else."""
    node = at.node
    if name in _SUMS:
        if place != (name[0] == "R"):  # rsub is other - alpha × self
            alpha = getattr(node, "_saved_alpha", 1)
            at.factor = at.factor * (alpha if name[0] == "A" else -alpha)
    elif name in _PRODUCTS:
        at.factor = at.factor * _number(node._saved_self if place else node._saved_other)
    elif name in _QUOTIENTS and place == 0:
        at.over, at.divided = at.over * _number(node._saved_other), True
    elif name == "NegBackward0":
        at.factor = -at.factor
    elif name == "WhereBackward0":
        at.over = at.over * _number(node._saved_condition if place == 0 else ~node._saved_condition)
    elif name not in _SAME:
        return False
    at.parent, at.place, at.node = node, place, below
    return True


def _reduced(at: Term, name: str, way: str) -> list[Term]:
    """The term that ends in a reduction, or the terms below it: in another reduction, or of a list."""
    own = _REDUCTIONS[name](at.node)
    if own is None:
        return [at.ends(None)]
    inner: Any = at.node.next_functions[0][0] if name in _PLAIN else None
    within = "" if inner is None else inner.name()
    is_list = within in _LISTS and math.prod(at.node._saved_self_sym_sizes) == len(inner.next_functions)
    if (way != "joined" and is_list) or (way == "deep" and _of_samples(inner, within)):
        at.over = at.over * own
        return _walk(at.down(0, inner), way)
    return [at.ends(at.over * own)]


def _of_samples(node: Any, name: str) -> bool:
    """Whether a node reduces over dimension 0, or divides all that it is given by one and the same number."""
    if name in _OVER_SOME:
        return 0 in _along(node)
    return name == "DivBackward0" and node.next_functions[1:] == ((None, 0),) and node._saved_other.numel() == 1


def _tied(at: Term, inputs: list[tuple[int, Any]], way: str) -> Term | None:
    """The one term under a product, where all else in it is made of parameters; None where two terms are multiplied."""
    sides = [_walk(at.copy().down(place, node), way) for place, node in inputs]
    known = [term for side in sides if any(each.divisor is not None for each in side) for term in side]
    if len(known) != 1:
        return None
    (term,) = known
    term.tied = None if at.parent is None else (at.parent, at.place)
    term.top, term.over, term.factor = at.node, at.over, at.factor
    return term


def _number(value: Any) -> Number:
    """A number that a node has kept. What lies on a device stays there."""
    if isinstance(value, Tensor):
        return value.item() if value.is_cpu else value.detach().reshape(())
    return float(value)


def _along(node: Any) -> list[int]:
    """The dimensions that a sum or a mean over some goes over; nodes keep negative ones added to 2**64."""
    dims = len(node._saved_self_sym_sizes)
    return [dim - 2**64 + dims if dim >= 2**63 else dim for dim in node._saved_dim or range(dims)] if dims else []


def _averages(count: Callable[[Any], Number]) -> Callable[[Any], Number | None]:
    """What one of torch's losses divides by itself, by its reduction: 1 mean, 2 sum."""
    return lambda node: count(node) if node._saved_reduction == 1 else 1.0 if node._saved_reduction == 2 else None


_PLAIN = frozenset(["MeanBackward0", "MeanBackward1", "SumBackward0", "SumBackward1"])
_BY_ELEMENT = ["MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits",
               "SoftMarginLoss"]  # fmt: skip
_REDUCTIONS: dict[str, Callable[[Any], Number | None]] = {
    "MeanBackward0": lambda node: int(node._saved_self_sym_numel),
    "MeanBackward1": lambda node: math.prod(node._saved_self_sym_sizes[dim] for dim in _along(node)),
    **dict.fromkeys(["SumBackward0", "SumBackward1", "NansumBackward0", "DotBackward0"], lambda node: 1.0),
    **dict.fromkeys(
        ["NllLossBackward0", "NllLoss2DBackward0"], _averages(lambda node: _number(node._saved_total_weight))
    ),
    **{f"{name}Backward0": _averages(lambda node: node._saved_self.numel()) for name in _BY_ELEMENT},
    "ChunkedCrossEntropyBackward": lambda node: _number(node.divisor),
}
"""What each node that reduces divides by itself; None where it reduces nothing."""
