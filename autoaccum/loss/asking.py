"""A loss run on a few sets of samples, to see what it does with more of them.

The samples are chosen unlike in what may count. Plain values are kept of each run: no graph outlives it.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoaccum.data import tree
from autoaccum.data.structure import Reading
from autoaccum.loss.graph import PLAINLY, Values, Way, divided_elements, part_of, read
from autoaccum.memory.oom import Verdict, out_of_memory

__all__ = ["RAISED", "SAMPLES", "WAYS", "Evaluate", "Rows", "Seen", "SeenTerm", "device_of", "look", "ragged", "unlike"]

SAMPLES = 8  # show what a loss divides by
WAYS = (PLAINLY, Way(deep=True), Way(split=False))

Rows = tuple[int, ...]
Evaluate = Callable[[Rows, Any, int], Tensor]
"""(places of samples, these samples on the host, a number: another one draws other random numbers) -> their loss."""

# What the user's own code raises, TorchScript's among it.
RAISED = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError, torch.jit.Error)


class Seen(NamedTuple):
    """One set of samples, run once. Plain values: no graph outlives its run."""

    rows: Rows
    batch: Any
    value: float
    again: float  # its value with other random numbers
    ways: tuple[tuple["SeenTerm", ...], ...]
    took: bool  # whether it was multiplied with, or divided by, a number that some tensor gave
    rounding: float  # what its value may be off by, relative, in the formats of its graph, if that was looked at


class SeenTerm(NamedTuple):
    """A term as it was read: its reduction, numbers above 0, its part of the loss, the shapes in its graph."""

    name: str
    divisor: float | None
    factor: float
    divided: bool
    bent: bool
    quotients: int | None  # numbers that were divided one by one before they were reduced
    value: float | None
    shapes: frozenset[Any] | None


def ragged(samples: int) -> tuple[int, int]:
    """Two micro-batches of together `samples` samples, 2 or more, unequal where that can be: 8 is 5 + 3."""
    first = samples // 2 + 1 if samples > 2 else 1
    return first, samples - first


def look(evaluate: Evaluate, batches: Sequence[Any], most: int) -> list[Seen]:
    """Runs single samples, two unequal parts, and all, which come last; what cannot be cut is run whole.

    `most` samples are chosen of the `batches`, which lie on the host.
    """
    sizes = [tree.batch_size(batch) for batch in batches]
    largest = batches[sizes.index(max(sizes))]
    if sum(sizes) == 1 or any(Reading(largest, max(sizes)).uncut()):
        return [_run(evaluate, tuple(range(max(sizes))), largest)]
    singles = _alike([single for batch, size in zip(batches, sizes) for single in tree.split(batch, [1] * size)])
    chosen = [singles[row] for row in unlike(singles, most)]
    number = len(chosen)
    if number == 1:
        return [_run(evaluate, (0,), chosen[0])]
    sets: list[Rows] = [(row,) for row in range(number)]
    if number > 2:
        first, _ = ragged(number)
        sets += [tuple(range(first)), tuple(range(first, number))]
    whole = _run(evaluate, tuple(range(number)), tree.join(chosen), shapes=True)
    seen = []
    for rows in sets:
        try:
            seen.append(_run(evaluate, rows, tree.join([chosen[row] for row in rows]), shapes=rows == sets[-1]))
        except RAISED as error:  # BatchNorm, say, takes no single sample: such a set shows nothing
            if out_of_memory(error) is not Verdict.NO:
                raise
    return [*seen, whole]


def _alike(singles: Sequence[Any]) -> list[Any]:
    """Those of the commonest shape, which can be joined: windows that are cut by length have pieces of several."""
    shapes = [[tuple(leaf.shape[1:]) for _, leaf in tree.tensors(single)] for single in singles]
    common = max(shapes, key=shapes.count)
    return [single for single, own in zip(singles, shapes) if own == common]


def unlike(singles: Sequence[Any], most: int) -> list[int]:
    """Places of samples unlike in what may count: of each flag, mask or label those with the most and the least."""
    if len(singles) <= most:
        return list(range(len(singles)))
    columns: dict[str, list[float]] = {}
    for single in singles:
        for path, leaf in tree.tensors(single):
            if leaf.dim() and leaf.dim() <= _DIMS and not leaf.is_complex() and not leaf.is_nested:
                columns.setdefault(path, []).append(float((leaf > 0).sum()))
                if not leaf.is_floating_point() and leaf.dtype != torch.bool:  # the class 0 counts, -100 does not
                    columns.setdefault(f"{path} below 0", []).append(float((leaf < 0).sum()))
    orders = []
    for marks in sorted(columns.values(), key=lambda marks: len(set(marks))):
        if len(set(marks)) > 1:
            order = sorted(range(len(singles)), key=marks.__getitem__)
            orders.append([order[-1], order[0], order[-2], order[len(order) // 2], order[1], *order[-3:-2]])
    picked = dict.fromkeys(row for ranks in itertools.zip_longest(*orders) for row in ranks if row is not None)
    picked.update(dict.fromkeys(range(len(singles))))
    return sorted(itertools.islice(picked, most))


_DIMS = 2


def _run(evaluate: Evaluate, rows: Rows, batch: Any, *, shapes: bool = False) -> Seen:
    with _Watched() as values:
        loss = evaluate(rows, batch, 0)
    ways = tuple(
        tuple(
            SeenTerm(
                term.name,
                None if term.divisor is None else abs(float(term.divisor)),
                abs(float(term.factor)),
                term.divided,
                term.bent,
                divided_elements(term),
                None if (value := part_of(term, values.by_node)) is None else float(value),
                _shapes(term.node) if shapes else None,
            )
            for term in read(loss, way)
        )
        for way in WAYS
    )
    whole, took = float(loss.detach()), values.took
    if not shapes:
        return Seen(rows, batch, whole, whole, ways, took, math.inf)
    formats = {data.dtype for node in _nodes(loss.grad_fn) for data in getattr(node, "_input_metadata", ())}
    rounding = max((_rounding(dtype, loss.device) for dtype in formats), default=0.0)
    del loss, values
    return Seen(rows, batch, whole, float(evaluate(rows, batch, 1).detach()), ways, took, rounding)


class _Watched(Values):
    """Notes as well whether numbers were taken out of tensors: what is divided by may then be any function of them."""

    def __init__(self) -> None:
        super().__init__()
        self.took = False

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


_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def _rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Ten times and more what right losses differ by when their samples are split; TF32 is coarser than float32."""
    coarse = 1e-2 if dtype == torch.float32 and device.type != "cpu" else 0.0
    return max(coarse, _ROUNDING.get(dtype, _ROUNDING[torch.float32]))


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
