"""BatchNorm over a window: running statistics as one update with the whole batch would leave them.

A layer that sees k micro-batches updates its running mean and variance k times, each time from a part of the batch.
Here the k updates become one. While a window is open each layer's momentum is 1, so that its running buffers hold
exactly the last call's mean and unbiased variance; hooks collect these (norm_layer.py), they are pooled (pooling.py),
and the pool is committed once, with the layer's own momentum.

Choices:

- Momentum is 1 only between `begin` and `commit` or `discard`: evaluation, checkpoints, exports, copies and a schedule
  of the momentum see nothing of this, and a compiled model has no more graphs than it has anyway.
- The hooks stay from the first `begin` to `close`: torch.compile does not guard hooks, and might not see later ones.
- All layers are pooled together when the model's forward ends, sooner only if a layer is called a second time. One that
  is used twice counts twice, and is still updated once; one in eval mode or without running statistics is left alone.
- Over ranks the pools are summed, SyncBatchNorm's among them: each rank brings its own elements, so none counts twice.
- Buffers in bfloat16 or half are pooled in float32; what a call left in them was rounded to their type by torch.
- Mode "momentum" lets each micro-batch update with 1 − (1 − m)^(1/k), and counts one batch a window; with momentum None
  the average is kept over windows of k. Over ranks the buffers are averaged. Mode "keep" touches nothing.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autoaccum.batch_norm.norm_layer import NormLayer, end_window_of, has_running_statistics, sharers
from autoaccum.batch_norm.pooling import Pool, wide
from autoaccum.errors import PlanError, SetupError, shown
from autoaccum.planning.bn_momentum import MODES
from autoaccum.planning.plan import Plan
from autoaccum.planning.split import counts
from autoaccum.ranks import Ranks

__all__ = ["PooledStatistics", "expect_equal_counts", "needs_two", "unequal"]


class PooledStatistics:
    """The running statistics of a model's normalisation layers, updated once a window.

    Attributes:
        layers: name and module of each BatchNorm, SyncBatchNorm and InstanceNorm layer with running statistics.
        is_open: whether a window is.
    """

    def __init__(self, model: nn.Module, mode: str) -> None:
        """Looks the layers up; the model is untouched until `begin`.

        Of a model that is compiled best before its first compiled call. `mode`: "pooled", "momentum" or "keep".
        """
        if mode not in MODES:
            raise SetupError(f"batch_norm={shown(mode)} is not known: give one of {', '.join(map(repr, MODES))}")
        self.mode, self.is_open = mode, False
        self.layers: list[tuple[str, nn.Module]] = [
            (name, module) for name, module in model.named_modules() if has_running_statistics(module)
        ]
        self._end_windows()
        hooked = [] if mode == "keep" else self.layers
        self._layers = [NormLayer(self, name, module) for name, module in hooked]
        self._pools: list[Pool] = []
        self._pooled_buffers: list[Tensor | None] = []
        self._model = model
        self._hooks: list[Any] = []

    @property
    def synchronised(self) -> bool:
        """Whether a layer talks to other ranks in its forward (SyncBatchNorm): then all ranks need the same k."""
        return any(sharers(module) > 1 for _, module in self.layers)

    def begin(self, k: int) -> None:
        """Opens a window of `k` micro-batches.

        One that is still open over a layer, of this owner or another, is discarded first. A PlanError in mode
        "momentum" where a layer's own momentum is not between 0 and 1.
        """
        self._end_windows()
        if self._layers:
            self._attach()
            self._regroup()
        for pool in self._pools:
            pool.begin()
        for layer in self._layers:
            layer.prepare(self.mode, k)
        self.is_open = True
        for layer in self._layers:
            layer.open()
        if self.mode == "momentum":  # with a cumulative average, call i after w windows of k gets 1 / (k·w + i)
            for layer in self._layers:
                if layer.momentum is None and layer.counts_batches:
                    layer.module.num_batches_tracked.data.mul_(k)

    def commit(self, ranks: Ranks) -> None:
        """Closes the window: one update of each layer that was called, on this rank or another of `ranks`, which all
        must call this.

        A SetupError where no window is open, or a layer's calls cannot be pooled: the window can be discarded then.
        """
        if not self.is_open:
            raise SetupError("there are no statistics to commit: call begin() before the window's first micro-batch")
        self.collect()
        totals = [pool.totals(ranks) for pool in self._pools]
        for pool, own in zip(self._pools, totals):
            pool.commit(own, ranks, averages=self.mode == "momentum")
        self._end()

    def discard(self) -> None:
        """Puts back, bit for bit, what the buffers held at `begin`, and each momentum. Does nothing between windows."""
        if self.is_open:
            for pool in self._pools:
                pool.put_back()
                pool.put_back_batches()
            self._end()

    def close(self) -> None:
        """Discards an open window and removes every hook; the next `begin` would put them back."""
        self.discard()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # For the layers' hooks.

    def collect(self) -> None:
        """Pools the calls whose statistics still rest in the layers' buffers."""
        for pool in self._pools:
            pool.collect(counts_only=self.mode == "momentum")

    # Parts.

    def _attach(self) -> None:
        """Puts the hooks on, unless they are: before the model is first compiled, which would not see them later."""
        if not self._hooks:
            for layer in self._layers:
                self._hooks.append(layer.module.register_forward_pre_hook(layer.before))
                self._hooks.append(layer.module.register_forward_hook(layer.after))
            self._hooks.append(self._model.register_forward_hook(self._layers[0].after_model))

    def _end_windows(self) -> None:
        self.discard()
        for _, module in self.layers:
            end_window_of(module)

    def _regroup(self) -> None:
        """Lays the layers' sums end to end, unless they lie so already for these very buffers.

        Raises:
            SetupError: a lazy layer has no buffers yet.
        """
        buffers = [buffer for layer in self._layers for buffer in layer.buffers]
        if len(buffers) == len(self._pooled_buffers) and all(map(operator.is_, buffers, self._pooled_buffers)):
            return
        alike: dict[tuple[torch.device, torch.dtype], list[NormLayer]] = {}
        for layer in self._layers:
            mean = layer.buffers[0]
            if is_lazy(mean):
                raise SetupError(
                    f"layer {layer.name!r} has no shape yet: run one batch through the model before training, so that "
                    "its lazy layers find theirs"
                )
            alike.setdefault((mean.device, wide(mean.dtype)), []).append(layer)
        self._pools = [Pool(layers) for layers in alike.values()]
        self._pooled_buffers = buffers

    def _end(self) -> None:
        for layer in self._layers:
            layer.end()
        self.is_open = False


def needs_two(error: BaseException) -> bool:
    """Whether `error` is a BatchNorm layer's refusal of one value per channel: a micro-batch of 2 may pass then."""
    return "Expected more than 1 value per channel" in str(error) or (
        error.__cause__ is not None and needs_two(error.__cause__)
    )


def expect_equal_counts(model: nn.Module, made: Plan) -> None:
    """Where SyncBatchNorm meets the other ranks in each micro-batch: that all have as many, in every window."""
    if not any(sharers(module) > 1 for module in model.modules()):
        return
    runs = () if made.samples is None else made.windows.runs(made.samples)
    for size in sorted({made.target_batch, *(size for size, _ in runs)}, reverse=True):
        found = counts(size, made.limits, minimum=made.minimum)
        if len(set(found)) > 1:
            raise PlanError(unequal(f"a window of {size} samples", found))


def unequal(what: str, micro_batches: Sequence[int]) -> str:
    """Why a window cannot be run in which a SyncBatchNorm layer would wait for micro-batches that do not come."""
    counts = ", ".join(f"{count} on rank {rank}" for rank, count in enumerate(micro_batches))
    return (
        f"{what} has unequally many micro-batches on the ranks ({counts}), and SyncBatchNorm meets the other ranks in "
        'each of them: choose a target batch or micro-batch by which all have as many, tail="drop" for what is left at '
        "an epoch's end, or BatchNorm, whose running statistics are pooled over the ranks as well"
    )
