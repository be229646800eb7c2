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
from autoaccum.data.structure import AsSamples
from autoaccum.loss.graph import WAYS, Term, Values, part_of, read
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
    """A term as it was read: its reduction, numbers above 0, its part of the loss, what is in its graph."""

    name: str
    divisor: float | None
    factor: float
    divided: bool
    value: float | None
    graph: frozenset[Any] | None


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
    if sum(sizes) == 1 or any(AsSamples(largest, max(sizes)).uncut()):
        sets = {tuple(range(max(sizes))): largest}
    else:
        singles = _alike([single for batch, size in zip(batches, sizes) for single in tree.split(batch, [1] * size)])
        chosen = [singles[row] for row in unlike(singles, SAMPLES)]
        rows, size = tuple(range(len(chosen))), min(most, len(chosen))
        groups = [rows[end - size : end] for end in (*range(size, len(rows), size), len(rows))]
        parts = [groups[-1][: ragged(size)[0]], groups[-1][ragged(size)[0] :]] if size > 2 else []
        cuts = dict.fromkeys([*((row,) for row in rows), *groups[:-1], *parts, groups[-1]])
        sets = {own: tree.join([chosen[row] for row in own]) for own in cuts}
    whole = max(sets, key=lambda own: (len(own), own))
    other = next((own for own in reversed(sets) if len(own) < len(whole)), None)  # shows what grows with the samples
    last = _run(evaluate, whole, sets[whole], graph=True)
    seen = []
    for own, batch in sets.items():
        try:
            seen += [_run(evaluate, own, batch, graph=own == other)] if own != whole else []
        except RAISED as error:  # BatchNorm, say, takes no single sample: such a set shows nothing
            if out_of_memory(error) is not Verdict.NO:
                raise
    again = float(evaluate(whole, sets[whole], 1).detach())
    return [*seen, last], again == last.value or math.isnan(last.value)


def _alike(singles: Sequence[Any]) -> list[Any]:
    """Those of the commonest shape, which can be joined: windows that are cut by length have pieces of several."""
    # Items of lists, one a sample, join as they are.
    leaves = ([leaf for _, leaf in AsSamples(single, 1).leaves()] for single in singles)
    shapes = [[tuple(leaf.shape[1:]) for leaf in own if isinstance(leaf, Tensor)] for own in leaves]
    common = max(shapes, key=shapes.count)
    return [single for single, own in zip(singles, shapes) if own == common]


def unlike(singles: Sequence[Any], most: int) -> list[int]:
    """Places of samples unlike in what may count: of each flag, mask or label those with the most and the least.

    Those with the most of what differs least among them (a flag) are last.
    """
    columns: dict[str, list[float]] = {}
    for single in singles:
        for path, leaf in tree.tensors(single):
            if 0 < leaf.dim() <= 2 and not leaf.is_complex() and not leaf.is_nested and leaf.layout == torch.strided:
                columns.setdefault(path, []).append(float((leaf > 0).sum()))
                if not leaf.is_floating_point() and leaf.dtype != torch.bool:  # the class 0 counts, -100 does not
                    columns.setdefault(f"{path} below 0", []).append(float((leaf < 0).sum()))
    seen_in_all = [marks for marks in columns.values() if len(marks) == len(singles)]
    differing = [marks for marks in sorted(seen_in_all, key=lambda marks: len(set(marks))) if len(set(marks)) > 1]
    orders = []
    for marks in differing:
        order = sorted(range(len(singles)), key=marks.__getitem__)
        orders.append([order[-1], order[0], order[-2], order[len(order) // 2], order[1], *order[-3:-2]])
    ranked = (row for ranks in itertools.zip_longest(*orders) for row in ranks if row is not None)
    chosen = sorted(list(dict.fromkeys([*ranked, *range(len(singles))]))[:most])
    return sorted(chosen, key=differing[0].__getitem__) if differing else chosen


def _run(evaluate: Evaluate, rows: Rows, batch: Any, *, graph: bool) -> Seen:
    """`graph`: the formats and shapes in it are looked at as well."""
    with Values() as values:
        loss = evaluate(rows, batch, 0)

    def seen(term: Term) -> SeenTerm:
        divisor, value = term.divisor, part_of(term, values.by_node)
        return SeenTerm(
            term.name,
            None if divisor is None else abs(float(divisor)),
            abs(float(term.factor)),
            term.divided,
            None if value is None else float(value),
            _graph(term.node) if graph else None,
        )

    ways = {way: [seen(term) for term in read(loss, way)] for way in WAYS}
    formats = {dtype for _, dtype, _ in _graph(loss.grad_fn)} if graph else ()
    return Seen(rows, batch, float(loss.detach()), ways, values.took, rounding(formats, loss.device) if graph else 0.0)


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


def _graph(node: Any) -> frozenset[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(operation, format, shape) of each result in the graph from a node on."""
    met, waiting = {node}, [node]
    while waiting:
        below = {each for each, _ in waiting.pop().next_functions if each is not None} - met
        met |= below
        waiting += below
    found = ((each.name(), data) for each in met for data in getattr(each, "_input_metadata", ()))
    return frozenset((name, data.dtype, tuple(data.shape)) for name, data in found)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
