"""Repeated blocks that keep their inputs only, and run again in the backward pass, for the same gradients.

Choices made here:

- Random generators are put back for a block's second run, and BatchNorm's statistics count its first (norm_layer.py).
- Other buffers that a block writes to (a codebook, a power iteration, a counter) are in its second run what they were
  before the first, and afterwards what the first left. Which these are shows when a block first runs.
- Repeated blocks are the children of one class that a ModuleList or a Sequential has two or more of, the outermost
  such. A Transformers model checkpoints by its own switch, which knows that its caches must not be filled twice.
- Every n-th block alone can be checkpointed: the others keep what they keep, and do not run again.
- Selectively, blocks also keep what their matrix products and attention made: all else is cheap to run again.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoaccum.batch_norm.norm_layer import has_running_statistics
from autoaccum.model.forward import StandIn, standing

__all__ = ["Checkpointed", "How", "all_blocks", "checkpointed", "why_not"]

_CONTAINERS = (nn.ModuleList, nn.Sequential)
_SWITCH, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"  # Transformers'
_SELECTED: Any = getattr(torch.utils.checkpoint, "create_selective_checkpoint_contexts", None)  # since torch 2.5
_KEPT = (
    "mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip


class How(NamedTuple):
    """Which blocks run again, and what of them.

    Attributes:
        every: each so many-th block.
        selective: but for their matrix products and attention.
    """

    every: int = 1
    selective: bool = False

    @classmethod
    def named(cls, name: str) -> "How":
        """By a saver's name: "checkpointing", "checkpointing/2", "selective_checkpointing"."""
        every = name.partition("/")[2]
        return cls(int(every) if every else 1, name.startswith("selective"))

    @property
    def run(self) -> Callable[..., Any]:
        """f(function, *arguments), which runs the function again in the backward pass."""
        if not self.selective:
            return functools.partial(checkpoint, use_reentrant=False)
        kept = [getattr(torch.ops.aten, name).default for name in _KEPT if hasattr(torch.ops.aten, name)]
        return functools.partial(checkpoint, use_reentrant=False, context_fn=functools.partial(_SELECTED, kept))


def why_not(model: nn.Module, how: How) -> str | None:
    """Why the model's blocks cannot be checkpointed so, in a few words; None where they can."""
    blocks, switched = _found(model)
    if any(getattr(layer, _SWITCH, False) for part in switched for layer in part.modules()):
        return "the model's own checkpointing is on already"
    if not blocks and not switched:
        return "no repeated blocks were found: a ModuleList or Sequential with two or more children of one class"
    if how.selective and _SELECTED is None:
        return f"torch {torch.__version__} has no selective checkpointing"
    number = len(blocks) + sum(len(_layers(part)) for part in switched)
    if how.every > max(1, number):
        return f"there are but {number} blocks that can be checkpointed one by one"
    return None


class Checkpointed(StandIn):
    """A block that keeps its inputs only, and runs again in the backward pass."""

    def __init__(self, module: nn.Module, how: How = How()) -> None:  # noqa: B008 - immutable
        super().__init__(module)
        self._run = how.run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward, of which nothing is kept where it will run again."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        compiling = torch.compiler.is_compiling()
        return self._run(self.forward if compiling else _Twice(self.module, self.forward), *args, **kwargs)


class _Twice:
    """A block's forward, whose second run finds the block's buffers as the first found them, and changes none."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module, self._forward = module, forward
        self._before: list[tuple[dict[str, Any], str, Tensor]] | None = None  # where each is held, and what it was

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._before is None:
            return self._first(*args, **kwargs)
        after = [(held, name, held[name]) for held, name, _ in self._before]
        for held, name, buffer in self._before:
            held[name] = buffer.clone()  # the first run's own may be saved for the backward pass
        try:
            return self._forward(*args, **kwargs)
        finally:
            for held, name, buffer in after:
                held[name] = buffer

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        known = _WRITTEN.get(self._module)
        kept = {
            (path, name): (part._buffers, name, buffer.clone())
            for path, part in (self._module.named_modules() if known is None or known else ())
            if not has_running_statistics(part)
            for name, buffer in part._buffers.items()
            if buffer is not None and (known is None or (path, name) in known)
        }
        self._before = list(kept.values())
        result = self._forward(*args, **kwargs)
        if known is None:
            written = {
                key: (held, name, before)
                for key, (held, name, before) in kept.items()
                if (now := held[name]) is None or not torch.equal(now, before)
            }
            self._before, _WRITTEN[self._module] = list(written.values()), frozenset(written)
        return result


_WRITTEN: WeakKeyDictionary[nn.Module, frozenset[tuple[str, str]]] = WeakKeyDictionary()
"""The buffers that a block was seen to write to, by the path of their module in it and their name."""


@contextmanager
def checkpointed(model: nn.Module, how: How = How()) -> Iterator[None]:  # noqa: B008 - immutable
    """The repeated blocks of `model` are checkpointed inside, or the model does that by itself where it can."""
    blocks, switched = _found(model)
    with ExitStack() as stack:
        for part in switched:
            layers = _layers(part)
            left_out = set(layers) - set(layers[how.every - 1 :: how.every])
            for each in part.modules():
                if hasattr(each, _SWITCH) and each not in left_out:
                    # Set here and not by the model's method, which also leaves hooks on its embeddings.
                    stack.enter_context(standing(each, **{_SWITCH: True, _FUNCTION: how.run}))
        for block in blocks[how.every - 1 :: how.every]:
            stack.enter_context(Checkpointed(block, how))
        yield


def all_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks by name, in the model's order, whatever switch the model has for checkpointing."""
    found: dict[nn.Module, bool] = {}
    _search(model, found, switches=False)
    return {name: module for name, module in model.named_modules() if module in found}


def _found(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """(repeated blocks, models with a switch), the outermost of each; each once, though it may be used twice."""
    found: dict[nn.Module, bool] = {}
    _search(model, found)
    return [each for each, switch in found.items() if not switch], [each for each, switch in found.items() if switch]


def _search(module: nn.Module, found: dict[nn.Module, bool], *, switches: bool = True) -> None:
    """Finds blocks; and models with a switch, into which it does not look, with `switches`. Says which each is."""
    if module in found:
        return
    if switches and _has_switch(module):
        found[module] = True
        return
    alike = Counter(map(type, module if isinstance(module, _CONTAINERS) else ()))
    for child in module.children():
        if alike[type(child)] > 1 and _is_block(child):
            found[child] = False
        else:
            _search(child, found, switches=switches)


def _is_block(module: nn.Module) -> bool:
    """Whether running it again saves memory: no single layer, and no mere row of blocks that are found inside."""
    if not any(True for _ in module.children()) or isinstance(module, (nn.ModuleList, torch.jit.ScriptModule)):
        return False
    inside: dict[nn.Module, bool] = {}
    if isinstance(module, nn.Sequential):
        _search(module, inside)
    return not inside


def _has_switch(module: nn.Module) -> bool:
    """Whether it is a model of Transformers that can checkpoint by itself."""
    supported = getattr(module, "supports_gradient_checkpointing", False)
    return bool(supported) and any(hasattr(part, _SWITCH) for part in module.modules())


def _layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model with a switch that have one each, as from Transformers 4.53 on."""
    named = "GradientCheckpointingLayer"
    parts = (part for part in model.modules() if hasattr(part, _SWITCH))
    return [part for part in parts if any(kind.__name__ == named for kind in type(part).__mro__)]
