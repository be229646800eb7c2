"""The arithmetic of pooled running statistics: many layers laid end to end in one tensor.

Per channel, call j of a window has n_j elements, mean μ_j and unbiased variance s_j²; N = Σ n_j. One update with the
whole batch would see

    μ = Σ n_j μ_j / N
    variance = [Σ (n_j − 1) s_j² + Σ n_j (μ_j − μ)²] / (N − 1)            the law of total variance

Four sums hold all that is needed, however long the window is:

    mean     μ so far
    within   Σ n_j s_j² / N
    between  Σ n_j (μ_j − μ)² / N, by the update of Chan, Golub and LeVeque (1979), which does not cancel
    unit     Σ s_j², what the "− 1" takes away

so that variance = (within + between)·N/(N − 1) − unit/(N − 1). Kept apart, they serve the other layers too:

- InstanceNorm's own update averages over instances: n_j counts instances, and variance = within.
- A call of SyncBatchNorm on g ranks has the statistics of all g. Summed over the ranks, each with its own n_j, `within`
  and `between` are right as they are, and `unit` has come in g times: it is taken away 1/g times on each.

A window's micro-batches weigh the same in every layer (n_j / N), as a rule, so that a handful of operators with plain
numbers serves all layers; where layers differ, the numbers are expanded to a tensor, which is kept for the next time.
"""

from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor

from autoaccum.batch_norm.norm_layer import NormLayer, sharers
from autoaccum.errors import SetupError
from autoaccum.ranks import Ranks

__all__ = ["Pool"]

_KEPT_FACTORS = 64
_WHAT = "BatchNorm's statistics"


class Pool:
    """The statistics of layers whose buffers are on one device and of one type when widened to float32 at least.

    Layers are named by their place, 0 to n − 1. Tensors are [..., total channels], each layer's channels in turn.
    """

    def __init__(self, layers: Sequence[NormLayer]) -> None:
        """Takes the layers' running buffers, each [channels], and `num_batches_tracked` where there is one."""
        self.layers = layers
        for layer in layers:
            layer.pool = self
        buffers = [layer.buffers for layer in layers]
        self.means, self.variances = [mean for mean, _, _ in buffers], [variance for _, variance, _ in buffers]
        self.batches = {place: count for place, (_, _, count) in enumerate(buffers) if count is not None}
        self.sizes = [buffer.numel() for buffer in self.means]
        self.elements = [0] * len(self.sizes)
        first = self.means[0]
        self._sums = torch.zeros(4, sum(self.sizes), dtype=wide(first.dtype), device=first.device)
        self._mean, self._within, self._between, self._unit = self._sums.unbind()
        self._moments = self._sums[:2]
        self._factors: dict[tuple[float, ...], Tensor] = {}

    # Around a window.

    def begin(self) -> None:
        """Keeps what the buffers hold, and empties the sums."""
        self._start = self._flat(self.means, self.variances)
        if self.batches:
            self._start_batches = torch.stack(list(self.batches.values()))
        self._sums.zero_()
        self.elements = [0] * len(self.sizes)

    def put_back(self, *places: int) -> None:
        """Gives some layers' buffers of mean and variance what they held at `begin`, bit for bit; none named: all."""
        self._write(self._start, places or range(len(self.sizes)))

    def put_back_batches(self, plus_one: Container[int] = ()) -> None:
        """Puts `num_batches_tracked` back to what it was at `begin`, with one batch more for some layers."""
        if self.batches:
            more = [int(place in plus_one) for place in self.batches]
            counts = self._start_batches + 1 if all(more) else self._start_batches
            torch._foreach_copy_([count.data for count in self.batches.values()], list(counts.unbind()))
            if any(more) and not all(more):
                torch._foreach_add_([count.data for place, count in self.batches.items() if place in plus_one], 1)

    # In a window.

    def collect(self, *, counts_only: bool) -> None:
        """Enters the calls that rest in the layers; or their elements only."""
        calls = {place: layer.call for place, layer in enumerate(self.layers) if layer.call is not None}
        for place in calls:
            self.layers[place].call = None
            self.elements[place] += calls[place][0]
        if calls and not counts_only:
            self._add(calls)

    def _add(self, calls: Mapping[int, tuple[int, Tensor, Tensor]]) -> None:
        """Enters one call for each of some layers, already counted: place -> (elements, mean, unbiased variance)."""
        means, variances = [*self.means], [*self.variances]
        if len(calls) < len(self.sizes):  # a layer that was not called weighs 0, with its own sums for data
            means, variances = self._parts(self._mean), self._parts(self._within)
        weights, called = [0.0] * len(self.sizes), [0.0] * len(self.sizes)
        for place, (elements, mean, variance) in calls.items():
            weights[place], called[place] = elements / (self.elements[place] or 1), 1.0
            means[place], variances[place] = mean, variance
        weight, new = self._factor(weights), self._flat(means, variances)
        mean, variance = new.unbind()
        away = mean - self._mean
        self._between.addcmul_(away * weight, away).mul_(1.0 - weight)
        self._moments.lerp_(new, weight)
        _add(self._unit, variance, self._factor(called))

    # At a window's end.

    def totals(self, ranks: Ranks) -> list[int]:
        """For each layer, the elements of the window over all ranks, checked to be all there are."""
        silent = {place for place in self.batches if not self.elements[place] and self.layers[place].module.training}
        unseen = [0] * len(self.layers)
        if silent:  # in training mode, and not called: only then the device is asked which have counted a batch
            moved = (torch.stack(list(self.batches.values())) != self._start_batches).tolist()
            for place, odd in zip(self.batches, moved, strict=True):
                unseen[place] = int(odd and place in silent)
        elements = self.elements
        if ranks.size > 1:
            sums = torch.tensor([elements, unseen], device=self.means[0].device)
            ranks.sum(_WHAT, [sums])
            elements, unseen = sums.tolist()
        for layer, odd in zip(self.layers, unseen):
            if odd:
                raise SetupError(
                    f"layer {layer.name!r} ran in this window, but not through its hooks, so its statistics cannot be "
                    "pooled: the model was compiled before they were registered, or runs as copies (DataParallel). "
                    "Call torch.compiler.reset() after the training is prepared, use DistributedDataParallel, or "
                    'choose batch_norm="keep"'
                )
        return elements

    def commit(self, totals: Sequence[int], ranks: Ranks, *, averages: bool) -> None:
        """running ← (1 − m)·running + m·pooled, from what the buffers held at `begin`; all of `ranks` call this.

        Args:
            totals: each layer's elements over the window and all ranks; a layer with 0 is put back.
            ranks: whose sums, or buffers, become one.
            averages: each micro-batch has updated the buffers, which are averaged by the elements that a rank saw.
        """
        seen = [place for place, total in enumerate(totals) if total]
        if ranks.size > 1:
            share = self._factor([own / (total or 1) for own, total in zip(self.elements, totals, strict=True)])
            if averages:
                buffers = self._flat(self.means, self.variances) * share
                ranks.sum(_WHAT, [buffers])
                self._write(buffers, seen)
            else:
                own_mean = self._mean.clone()
                self._sums[:3] *= share
                ranks.sum(_WHAT, [self._mean, self._within, self._unit])
                self._between += (own_mean - self._mean).square_() * share
                ranks.sum(_WHAT, [self._between])
        if not averages:
            self._add_up(totals)
            self._write(torch.lerp(self._start, self._moments, self._momentum()), seen)
            self._write(self._start, [place for place, total in enumerate(totals) if not total])
        self.put_back_batches({place for place in seen if self.layers[place].counts_batches})

    def _add_up(self, totals: Sequence[int]) -> None:
        """Makes `within` the variance of the window."""
        whole, between, unit = [], [], []
        for total, layer in zip(totals, self.layers, strict=True):
            divisor, average = max(total - 1, 1), layer.per_instance
            whole.append(1.0 if average else total / divisor)
            between.append(0.0 if average else total / divisor)
            unit.append(0.0 if average else -(1.0 / sharers(layer.module)) / divisor)
        self._within.mul_(self._factor(whole))
        _add(self._within, self._between, self._factor(between))
        _add(self._within, self._unit, self._factor(unit))

    # Parts.

    def _momentum(self) -> float | Tensor:
        """Each layer's own. None is the average so far, 1 / (batches counted at `begin` + 1); 0 where none are."""
        factor = self._factor([layer.momentum or 0.0 for layer in self.layers])
        if all(layer.momentum is not None for layer in self.layers):
            return factor
        expanded = torch.zeros_like(self._mean) + factor
        parts = self._parts(expanded)
        for place, start in zip(self.batches, self._start_batches.unbind(), strict=True):
            if self.layers[place].momentum is None and self.layers[place].counts_batches:
                parts[place].copy_((start + 1).to(expanded.dtype).reciprocal())
        return expanded

    def _flat(self, means: Sequence[Tensor], variances: Sequence[Tensor]) -> Tensor:
        return torch.cat([*means, *variances]).to(self._sums.dtype).view(2, -1)

    def _parts(self, flat: Tensor) -> list[Tensor]:
        return list(torch.split_with_sizes(flat, self.sizes, -1))

    def _write(self, flat: Tensor, places: Sequence[int]) -> None:
        """Writes [mean, variance] to the buffers of some layers."""
        # Through `.data`: a graph that waits for its backward has saved the buffers, though in training mode it only
        # uses the batch's statistics, and would refuse them after a change that it can see. torch's update is unseen.
        if places:
            means, variances = self._parts(flat[0]), self._parts(flat[1])
            torch._foreach_copy_(
                [self.means[place].data for place in places] + [self.variances[place].data for place in places],
                [means[place] for place in places] + [variances[place] for place in places],
            )

    def _factor(self, values: Sequence[float]) -> float | Tensor:
        """A number for each layer, as what a tensor of all channels can be multiplied with."""
        key = tuple(values)
        if len(set(key)) == 1:
            return key[0]
        if key not in self._factors:
            if len(self._factors) >= _KEPT_FACTORS:
                self._factors.clear()
            each = torch.tensor(key, dtype=self._sums.dtype)
            self._factors[key] = each.repeat_interleave(torch.tensor(self.sizes)).to(self._sums.device)
        return self._factors[key]


def _add(into: Tensor, other: Tensor, factor: float | Tensor) -> None:
    if isinstance(factor, Tensor):
        into.addcmul_(other, factor)
    else:
        into.add_(other, alpha=factor)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics of buffers of type `dtype` are pooled: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
