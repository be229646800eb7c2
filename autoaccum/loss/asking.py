"""A loss run on a few sets of samples, to see what it does with more of them.

The samples are chosen unlike in what may count. Plain values are kept of each run: no graph outlives it.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoaccum.data import tree
from autoaccum.data.structure import Reading
from autoaccum.loss.graph import WAYS, Values, part_of, read
from autoaccum.memory.oom import Verdict, out_of_memory

__all__ = ["RAISED", "SAMPLES", "Evaluate", "Rows", "Seen", "SeenTerm", "device_of", "look", "ragged",
           "rounding", "unlike"]  # fmt: skip

SAMPLES = 8  # show what a loss divides by

Rows = tuple[int, ...]
Evaluate = Callable[[Rows, Any, int], Tensor]
"""(places of samples, these samples on the host, a number: another one draws other random numbers) -> their loss."""

# What the user's own code raises, TorchScript's among it.
RAISED = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError, torch.jit.Error)


class SeenTerm(NamedTuple):
    """A term as it was read: its reduction, numbers above 0, its part of the loss, the shapes in its graph."""

    name: str
    divisor: float | None
    factor: float
    divided: bool
    value: float | None
    shapes: frozenset[Any] | None


class Seen(NamedTuple):
    """One set of samples, run once.

    Attributes:
        value: of the loss.
        ways: its terms, as each way reads them.
        took: whether numbers were taken out of tensors: what is divided by may then be any function of them.
        rounding: what the value may be off by, relative, in the formats of its graph; 0 where that was not looked at.
    """

    rows: Rows
    batch: Any
    value: float
    ways: dict[str, list[SeenTerm]]
    took: bool
    rounding: float


def ragged(samples: int) -> tuple[int, int]:
    """Two micro-batches of together `samples` samples, 2 or more, unequal where that can be: 8 is 5 + 3."""
    first = samples // 2 + 1 if samples > 2 else 1
    return first, samples - first


def look(evaluate: Evaluate, batches: Sequence[Any], most: int) -> tuple[list[Seen], bool]:
    """Runs single samples, groups of `most`, and the last of these in two unequal parts; what cannot be cut runs whole.

    Up to eight samples are chosen of the `batches`, which lie on the host; at most `most` run at once. Beside what was
    seen stands whether the value of the last group stays the same with other random numbers.
    """
    sizes = [tree.batch_size(batch) for batch in batches]
    largest = batches[sizes.index(max(sizes))]
    if sum(sizes) == 1 or any(Reading(largest, max(sizes)).uncut()):
        whole, parts = (tuple(range(max(sizes))), largest), list[tuple[Rows, Any]]()
    else:
        singles = _alike([single for batch, size in zip(batches, sizes) for single in tree.split(batch, [1] * size)])
        chosen = [singles[row] for row in unlike(singles, SAMPLES, sort=most < SAMPLES)]
        rows = tuple(range(len(chosen)))
        size = min(most, len(rows))
        groups = [rows[end - size : end] for end in (*range(size, len(rows), size), len(rows))]
        *cuts, last = dict.fromkeys([*((row,) for row in rows), *groups])
        if size > 2:
            first, _ = ragged(size)
            cuts += [last[:first], last[first:]]
        *parts, whole = [(rows, tree.join([chosen[row] for row in rows])) for rows in (*cuts, last)]
    other = next((rows for rows, _ in reversed(parts) if len(rows) < len(whole[0])), None)  # shows what grows
    all_of_them = _run(evaluate, *whole, graph=True)
    seen = []
    for rows, batch in parts:
        try:
            seen.append(_run(evaluate, rows, batch, graph=rows == other))
        except RAISED as error:  # BatchNorm, say, takes no single sample: such a set shows nothing
            if out_of_memory(error) is not Verdict.NO:
                raise
    again = float(evaluate(*whole, 1).detach())
    return [*seen, all_of_them], again == all_of_them.value or math.isnan(all_of_them.value)


def _alike(singles: Sequence[Any]) -> list[Any]:
    """Those of the commonest shape, which can be joined: windows that are cut by length have pieces of several."""
    shapes = [[tuple(leaf.shape[1:]) for _, leaf in tree.tensors(single)] for single in singles]
    common = max(shapes, key=shapes.count)
    return [single for single, own in zip(singles, shapes) if own == common]


def unlike(singles: Sequence[Any], most: int, *, sort: bool = False) -> list[int]:
    """Places of samples unlike in what may count: of each flag, mask or label those with the most and the least.

    In order; with `sort`, those with the most of what differs least among them (a flag) last.
    """
    if len(singles) <= most and not sort:
        return list(range(len(singles)))
    columns: dict[str, list[float]] = {}
    for single in singles:
        for path, leaf in tree.tensors(single):
            if 0 < leaf.dim() <= 2 and not leaf.is_complex() and not leaf.is_nested:
                columns.setdefault(path, []).append(float((leaf > 0).sum()))
                if not leaf.is_floating_point() and leaf.dtype != torch.bool:  # the class 0 counts, -100 does not
                    columns.setdefault(f"{path} below 0", []).append(float((leaf < 0).sum()))
    orders, marked = [], list[float]()
    for marks in sorted(columns.values(), key=lambda marks: len(set(marks))):
        if len(set(marks)) > 1:
            marked = marked or marks
            order = sorted(range(len(singles)), key=marks.__getitem__)
            orders.append([order[-1], order[0], order[-2], order[len(order) // 2], order[1], *order[-3:-2]])
    picked = dict.fromkeys(row for ranks in itertools.zip_longest(*orders) for row in ranks if row is not None)
    picked.update(dict.fromkeys(range(len(singles))))
    chosen = sorted(itertools.islice(picked, most))
    return sorted(chosen, key=marked.__getitem__) if sort and marked else chosen


def _run(evaluate: Evaluate, rows: Rows, batch: Any, *, graph: bool) -> Seen:
    """`graph`: the formats and shapes in it are looked at as well."""
    with _Watched() as values:
        loss = evaluate(rows, batch, 0)
    ways = {
        way: [
            SeenTerm(
                term.name,
                None if term.divisor is None else abs(float(term.divisor)),
                abs(float(term.factor)),
                term.divided,
                None if (value := part_of(term, values.by_node)) is None else float(value),
                _shapes(term.node) if graph else None,
            )
            for term in read(loss, way)
        ]
        for way in WAYS
    }
    nodes = _nodes(loss.grad_fn) if graph else ()
    formats = {data.dtype for node in nodes for data in getattr(node, "_input_metadata", ())}
    return Seen(rows, batch, float(loss.detach()), ways, values.took, rounding(formats, loss.device) if graph else 0.0)


class _Watched(Values):
    """Notes as well whether numbers were taken out of tensors."""

    took = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if getattr(func, "__name__", "") in _TAKE or (
            isinstance(result, Tensor)
            and result.requires_grad
            and result.numel() == 1
            and any(isinstance(each, Tensor) and each.numel() == 1 and not each.requires_grad for each in args)
        ):
            self.took = True
        return result


_TAKE = ("item", "tolist", "numpy", "__int__", "__float__", "__bool__", "__index__")

# Ten times and more what right losses and gradients differ by when their samples are split. A fault in a denominator
# makes 1e-2 and more.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_ROUNDING_TF32 = 2e-3  # convolutions of accelerators round to TF32 unless told otherwise
_ROUNDING_8_BITS = 5e-2


def rounding(formats: Iterable[torch.dtype], device: torch.device) -> float:
    """The relative error that rounding alone may make, by the coarsest number format that was computed in."""
    found = {_ROUNDING.get(each, _ROUNDING_8_BITS) for each in formats} or {_ROUNDING[torch.float32]}
    coarsest = max(found)
    return coarsest if device.type == "cpu" or coarsest == _ROUNDING[torch.float64] else max(coarsest, _ROUNDING_TF32)


def _nodes(node: Any) -> set[Any]:
    """The graph from a node on."""
    met, waiting = {node}, [node]
    while waiting:
        for below, _ in waiting.pop().next_functions:
            if below is not None and below not in met:
                met.add(below)
                waiting.append(below)
    return met


def _shapes(node: Any) -> frozenset[Any]:
    """The shapes in the graph from a node on."""
    return frozenset(
        (each.name(), tuple(tuple(data.shape) for data in getattr(each, "_input_metadata", ())))
        for each in _nodes(node)
    )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
