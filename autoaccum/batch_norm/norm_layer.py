"""One normalisation layer and its hooks: which of its calls count, and with how many elements.

Choices:

- A forward that runs while a backward pass does is a recomputation (activation checkpointing, of both kinds), and
  does not count. What it writes to the buffers vanishes, as a window's update starts from what they held before.
- A call's statistics rest in the layer's own buffers, uncopied, until the owner collects them: before the layer's
  next call at the latest.
- A compiled graph cannot call Python, but it can call an operator that does. It names the layer's module by a number
  of its own, so that a graph compiled for one owner serves the next owner of the same model.
"""

import itertools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from autoaccum.planning.bn_momentum import bn_momentum

__all__ = ["NormLayer", "end_window_of", "has_running_statistics", "sharers"]


class NormLayer:
    """One layer: its last call, and how it is set up.

    Its methods are hooks, so a model that is pickled or deep-copied takes it along. A copy of it is an empty one, whose
    hooks do nothing: an averaged copy of a model must not feed this model's statistics.

    Attributes:
        owner, pool: the PooledStatistics that it belongs to, and the Pool in it.
        call: elements, mean and variance of a call that is not pooled yet.
        momentum: the layer's own, while a window has set another.
        dirty: the buffers hold a micro-batch's statistics, not running ones.
    """

    def __init__(self, owner: Any = None, name: str = "", module: Any = None) -> None:
        self.owner, self.name, self.module = owner, name, module
        self.pool: Any = None
        self.call: tuple[int, Tensor, Tensor] | None = None
        self.momentum: float | None = None
        self._small: float | None = None  # what a micro-batch updates with
        self.dirty, self.per_instance = False, isinstance(module, _InstanceNorm)
        self._key = -1 if module is None else _KEYS.setdefault(module, next(_COUNTER))

    def __reduce__(self) -> tuple[type["NormLayer"], tuple[()]]:
        return (NormLayer, ())

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The running mean, the running variance, the batches tracked."""
        held = self.module._buffers  # a plain look-up: getattr on a module costs more than all the rest of the hook
        return held["running_mean"], held["running_var"], held["num_batches_tracked"]

    @property
    def counts_batches(self) -> bool:
        """Whether torch counts this layer's batches; it does not for InstanceNorm, which has the counter."""
        return not self.per_instance and self.buffers[2] is not None

    def prepare(self, mode: str, k: int) -> None:
        """Reads the layer's own momentum, and finds the one for a window of `k` micro-batches."""
        self.momentum = self.module.momentum
        self._small = bn_momentum(self.momentum, k) if mode == "momentum" else 1.0

    def open(self) -> None:
        """Sets that momentum."""
        _OPEN[self._key] = self
        self._set_momentum(self._small)

    def end(self) -> None:
        """Gives the layer its own momentum."""
        _OPEN.pop(self._key, None)
        self._set_momentum(self.momentum)
        self.call, self.dirty = None, False

    # Hooks.

    def before(self, module: nn.Module, args: Any) -> None:
        """Makes way for another call."""
        if torch.compiler.is_compiling() or module is not self.module or not self.owner.is_open:
            return
        if self.call is not None:
            self.owner.collect()
        if self.owner.mode == "momentum":
            self._repeat_nothing()
        elif self.dirty and not module.training:  # evaluation inside a window has the running statistics of its start
            self.pool.put_back(self.pool.layers.index(self))
            self.dirty = False

    def after(self, module: Any, args: Any, output: Any) -> None:
        """Notes a call in training mode."""
        if module is not self.module or not (module.training and module.track_running_stats):
            return
        mean, variance, _ = self.buffers
        elements = self._elements(args[0] if args else output, mean.numel())
        if torch.compiler.is_compiling():
            _captured(_TOKEN, mean, variance, elements, self._key)
        elif self.owner.is_open:
            self.note(elements, mean, variance)

    def after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        """Pools what the model's forward left behind, before anyone else writes to its buffers (as DDP may)."""
        if not torch.compiler.is_compiling() and self.module is not None and self.owner.is_open:
            self.owner.collect()

    def note(self, elements: int, mean: Tensor, variance: Tensor) -> None:
        """Enters one call; `mean` and `variance` must hold until the owner collects."""
        self.dirty = True
        if not _recomputing():
            self.call = elements, mean, variance

    def _elements(self, batch: Tensor, channels: int) -> int:
        """What one call counts: elements per channel; instances, where statistics are averaged over these."""
        if self.per_instance:
            return batch.shape[0] if batch.dim() > self.module._get_no_batch_dim() else 1
        return batch.numel() // channels

    def _set_momentum(self, momentum: float | None) -> None:
        # Module's own __setattr__ first looks among parameters, buffers and modules, ten times the cost of this.
        object.__setattr__(self.module, "momentum", momentum)

    def _repeat_nothing(self) -> None:
        """Mode "momentum": a recomputed forward must not move the buffers a second time."""
        again = self.module.training and _recomputing()
        self._set_momentum(0.0 if again else self._small)
        if again and self.counts_batches:
            self.module.num_batches_tracked.sub_(1)


_COUNTER = itertools.count()
_KEYS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_OPEN: dict[int, NormLayer] = {}
_TOKEN = torch.zeros(())


def _run_captured(token: Tensor, mean: Tensor, variance: Tensor, elements: int, key: int) -> None:
    layer = _OPEN.get(key)
    if layer is not None and layer.owner.is_open:
        if layer.call is not None:
            layer.owner.collect()
        layer.note(elements, mean.clone(), variance.clone())


# An operator that changes nothing would be removed as useless, hence the token; one that changed the buffers would
# spoil the backward pass, which has saved them. Replaying a CUDA graph would not run it, hence the tag.
_TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
_captured = torch.library.custom_op("autoaccum::batch_norm_called", _run_captured, mutates_args=("token",), **_TAGS)


def end_window_of(module: nn.Module) -> None:
    """Discards a window that another owner has left open over `module`: it would be read as the layer's own state."""
    layer = _OPEN.get(_KEYS.get(module, -1))
    if layer is not None:
        layer.owner.discard()


def _recomputing() -> bool:
    """Whether a backward pass is running on this thread: a forward inside one is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def has_running_statistics(module: nn.Module) -> bool:
    """Whether `module` is a BatchNorm, SyncBatchNorm or InstanceNorm layer that keeps running statistics."""
    return isinstance(module, (_BatchNorm, _InstanceNorm)) and module.running_mean is not None


def sharers(module: nn.Module) -> int:
    """How many ranks share the statistics of one call of `module`."""
    if isinstance(module, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
        return dist.get_world_size(module.process_group)
    return 1
