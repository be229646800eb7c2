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

from collections.abc import Sequence

import torch
from torch import Tensor

from autoaccum.ranks import Ranks

__all__ = ["Pool"]

_KEPT_FACTORS = 64


class Pool:
    """The statistics of layers whose buffers are on one device and of one type when widened to float32 at least.

    Layers are named by their place, 0 to n − 1. All tensors are [total channels], each layer's channels in turn.
    """

    def __init__(self, means: Sequence[Tensor], variances: Sequence[Tensor], batches: Sequence[Tensor | None]) -> None:
        """Takes the layers' running buffers: each [channels], and `num_batches_tracked` where there is one."""
        self.means, self.variances = list(means), list(variances)
        self.batches = [count for count in batches if count is not None]
        self._count_at = [place for place, count in enumerate(batches) if count is not None]
        self.sizes = [buffer.numel() for buffer in self.means]
        self._device = self.means[0].device
        self._dtype = wide(self.means[0].dtype)
        self._sums = torch.zeros(4, sum(self.sizes), dtype=self._dtype, device=self._device)
        self._mean, self._within, self._between, self._unit = self._sums.unbind()
        self.elements = [0] * len(self.means)
        self._factors: dict[tuple[float, ...], Tensor] = {}

    # Around a window.

    def begin(self) -> None:
        """Keeps what the buffers hold, and empties the sums."""
        self._start_mean = self._flat(self.means)
        self._start_variance = self._flat(self.variances)
        if self.batches:
            self._start_batches = torch.stack(self.batches)
        self._sums.zero_()
        self.elements = [0] * len(self.means)

    def put_back(self) -> None:
        """Gives the buffers what they held at `begin`, bit for bit."""
        self._write(self._start_mean, self._start_variance, range(len(self.sizes)))
        self.put_back_batches()

    def put_back_one(self, place: int) -> None:
        """The same for one layer's mean and variance."""
        self._write(self._start_mean, self._start_variance, (place,))

    def put_back_batches(self) -> None:
        """The same for `num_batches_tracked` alone."""
        if self.batches:
            torch._foreach_copy_([count.data for count in self.batches], list(self._start_batches.unbind()))

    def counted(self, place: int) -> bool:
        """Whether a layer's `num_batches_tracked` has moved since `begin`. Waits for the device."""
        if place not in self._count_at:
            return False
        at = self._count_at.index(place)
        return not torch.equal(self.batches[at], self._start_batches[at])

    def count_batch(self, places: Sequence[int]) -> None:
        """Counts one batch for each of these layers."""
        wanted = set(places)
        batches = [count.data for place, count in zip(self._count_at, self.batches, strict=True) if place in wanted]
        if batches:
            torch._foreach_add_(batches, 1)

    # In a window.

    def add(self, calls: dict[int, tuple[int, Tensor, Tensor]]) -> None:
        """Enters one call for each of some layers: place -> (elements, mean, unbiased variance)."""
        if len(calls) == len(self.sizes):
            means, variances = ([calls[place][part] for place in range(len(calls))] for part in (1, 2))
        else:  # a layer that was not called weighs 0, with its own sums for data
            means, variances = list(self._mean.split(self.sizes)), list(self._within.split(self.sizes))
            for place, (_, mean, variance) in calls.items():
                means[place], variances[place] = mean, variance
        weights = [0.0] * len(self.sizes)
        for place, (elements, _, _) in calls.items():
            self.elements[place] += elements
            if elements:
                weights[place] = elements / self.elements[place]
        weight = self._factor(weights)
        called = self._factor([float(place in calls) for place in range(len(self.sizes))])
        variance = self._flat(variances)
        away = self._flat(means) - self._mean
        self._mean += away * weight
        self._between += away.square_().mul_(weight)
        self._between *= 1.0 - weight
        self._within += (variance - self._within) * weight
        self._unit += variance * called

    # At a window's end.

    def weigh(self, totals: Sequence[int]) -> list[Tensor]:
        """Weighs this rank's sums by its share of all ranks' elements; what is returned is to be summed over ranks."""
        self._own_mean = self._mean.clone()
        self._share = self._factor([own / total if total else 0.0 for own, total in zip(self.elements, totals)])
        self._sums[:3] *= self._share
        return [self._mean, self._within, self._unit]

    def spread(self) -> Tensor:
        """Second, with the mean of all ranks: the squares about it, to be summed over ranks."""
        self._between += (self._own_mean - self._mean).square_() * self._share
        return self._between

    def update(
        self,
        totals: Sequence[int],
        momenta: Sequence[float | None],
        instances: Sequence[bool],
        corrections: Sequence[float],
    ) -> None:
        """running ← (1 − m)·running + m·pooled, from what the buffers held at `begin`; None: their average so far.

        Args:
            totals: each layer's elements over the window and all ranks; a layer with 0 is left as it is.
            momenta: each layer's own. None takes 1 / (batches counted so far + 1).
            instances: whether a layer's statistics are averages over instances.
            corrections: what a call's "− 1" is on one rank (1/g where g ranks share a call's statistics).
        """
        divisors = [max(total - 1, 1) for total in totals]
        whole = [1.0 if average else total / divisor for total, divisor, average in zip(totals, divisors, instances)]
        between = [0.0 if average else factor for factor, average in zip(whole, instances)]
        unit = [
            0.0 if average else correction / divisor
            for correction, divisor, average in zip(corrections, divisors, instances)
        ]
        variance = self._within * self._factor(whole)
        variance += self._between * self._factor(between)
        variance -= self._unit * self._factor(unit)
        momentum = self._momentum(momenta)
        rest = 1.0 - momentum
        self._write(
            self._mean * momentum + self._start_mean * rest,
            variance * momentum + self._start_variance * rest,
            [place for place, total in enumerate(totals) if total],
        )

    def average(self, ranks: Ranks, totals: Sequence[int]) -> None:
        """Averages the buffers themselves over the ranks, by the elements that each of them saw."""
        share = self._factor([own / total if total else 0.0 for own, total in zip(self.elements, totals)])
        means, variances = self._flat(self.means) * share, self._flat(self.variances) * share
        ranks.sum_gradients([means, variances])
        self._write(means, variances, [place for place, total in enumerate(totals) if total])

    def scale_batches(self, k: int, places: Sequence[int]) -> None:
        """Multiplies the batches that some layers have counted."""
        for place, count in zip(self._count_at, self.batches, strict=True):
            if place in places:
                count.data.mul_(k)

    def _momentum(self, momenta: Sequence[float | None]) -> float | Tensor:
        factor = self._factor([0.0 if momentum is None else momentum for momentum in momenta])
        if None not in momenta:
            return factor
        expanded = torch.zeros_like(self._mean) + factor
        parts = expanded.split(self.sizes)
        for at, place in enumerate(self._count_at):
            if momenta[place] is None:
                parts[place].copy_((self._start_batches[at] + 1).to(self._dtype).reciprocal())
        return expanded

    def _flat(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)).to(self._dtype)

    def _write(self, means: Tensor, variances: Tensor, places: Sequence[int]) -> None:
        # Through `.data`: a graph that waits for its backward has saved the buffers, though in training mode it only
        # uses the batch's statistics, and would refuse them after a change that it can see. torch's update is unseen.
        if places:
            new_means, new_variances = means.split(self.sizes), variances.split(self.sizes)
            torch._foreach_copy_(
                [self.means[place].data for place in places] + [self.variances[place].data for place in places],
                [new_means[place] for place in places] + [new_variances[place] for place in places],
            )

    def _factor(self, values: Sequence[float]) -> float | Tensor:
        """A number for each layer, as what a tensor of all channels can be multiplied with."""
        if len(set(values)) == 1:
            return values[0]
        key = tuple(values)
        if key not in self._factors:
            if len(self._factors) >= _KEPT_FACTORS:
                self._factors.clear()
            each = torch.tensor(key, dtype=self._dtype)
            self._factors[key] = each.repeat_interleave(torch.tensor(self.sizes)).to(self._device)
        return self._factors[key]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics of buffers of type `dtype` are pooled: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
