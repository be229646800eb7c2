"""The ladder: what makes a step smaller when not even one sample fits, in the order of what it costs.

    bf16                      autocast: most activations in half the bytes, and bf16's rounding
    checkpointing             the repeated blocks keep their inputs only, and run again in the backward pass
    save_on_cpu               what the forward keeps for the backward waits in the host's memory
    checkpointing+save_on_cpu both: the blocks' inputs wait there

Choices made here:

- Only the first changes numbers. The others give the plain step's gradients: random generators are put back for the
  second run of a block, and BatchNorm's statistics count its first (norm_layer.py).
- Repeated blocks are the children of one class that a ModuleList or a Sequential has two or more of, the outermost
  such. A Transformers model checkpoints by its own switch, which knows that its caches must not be filled twice.
- save_on_cpu leaves parameters and buffers where they are, which torch's own context of that name would copy for every
  layer that saves them.
- A rung is installed for as long as something runs under it. The model's class, its `state_dict` and its own settings
  are then as before.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoaccum.model.forward import StandIn

__all__ = ["RUNGS", "Checkpointed", "SavedOnHost", "checkpointed", "installed", "obstacle", "repeated_blocks"]

RUNGS = {
    "bf16": "autocast rounds most of the forward pass to bf16; slow where the device has none of its own",
    "checkpointing": "the repeated blocks run once more in the backward pass, for the same gradients",
    "save_on_cpu": "activations wait in the host's memory, and travel there and back in every micro-batch",
    "checkpointing+save_on_cpu": "the repeated blocks run once more in the backward pass, and their inputs wait in the "
    "host's memory",
}

_CONTAINERS = (nn.ModuleList, nn.Sequential)
_SWITCH = ("gradient_checkpointing", "_gradient_checkpointing_func")


def obstacle(rung: str, model: nn.Module, device: torch.device, precision: str) -> str | None:
    """Why a rung cannot be taken at all, in a few words; None where it can be tried.

    Args:
        rung: one of RUNGS.
        model: which would be trained under it.
        device: where.
        precision: as the user gave it; what was asked for by name is not changed.
    """
    if rung == "bf16":
        return None if precision == "auto" else f'precision="{precision}" was asked for'
    if "save_on_cpu" in rung and device.type == "cpu":
        return "frees nothing here, since the training is in the host's memory already"
    if "checkpointing" in rung:
        blocks, switched = _found(model)
        if any(_is_on(part) for part in switched):
            return "the model's own checkpointing is on already"
        if not blocks and not switched:
            return "no repeated blocks were found: a ModuleList or Sequential with two or more children of one class"
    return None


@contextmanager
def installed(rung: str | None, model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model runs under `rung` inside; bf16 is the Precision's part, and changes nothing here."""
    with ExitStack() as stack:
        if rung is not None and "checkpointing" in rung:
            stack.enter_context(checkpointed(model))
        if rung is not None and "save_on_cpu" in rung:
            stack.enter_context(SavedOnHost(model, device))
        yield


class Checkpointed(StandIn):
    """A block that keeps its inputs only, and runs again in the backward pass."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward, of which nothing is kept where it will run again."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """The repeated blocks of `model` are checkpointed inside, or the model does that by itself where it can."""
    blocks, switched = _found(model)
    with ExitStack() as stack:
        for part in switched:
            stack.enter_context(_switched_on(part))
        for block in blocks:
            stack.enter_context(Checkpointed(block))
        yield


class SavedOnHost(StandIn):
    """A model whose forward leaves what it keeps for the backward in host memory, pinned where CUDA copies from it."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__(module)
        self._pinned = device.type == "cuda"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, what it keeps on the host."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        held = (*self.module.parameters(), *self.module.buffers())
        staying = {_place(tensor) for tensor in held if tensor.layout is torch.strided}

        def pack(tensor: Tensor) -> tuple[torch.device | None, Tensor]:
            if tensor.layout is not torch.strided or _place(tensor) in staying:
                return None, tensor
            kept = torch.empty_like(tensor, device="cpu", pin_memory=self._pinned)
            kept.copy_(tensor)
            return tensor.device, kept

        def unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
            device, kept = packed
            return kept if device is None else kept.to(device, non_blocking=self._pinned)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self.forward(*args, **kwargs)


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that are checkpointed, in the model's order; those of models with a switch of their own left out."""
    return _found(model)[0]


def _found(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """(repeated blocks, models with a switch), the outermost of each; each once, though it may be used twice."""
    blocks: dict[nn.Module, None] = {}
    switched: dict[nn.Module, None] = {}
    _search(model, blocks, switched)
    return list(blocks), list(switched)


def _search(module: nn.Module, blocks: dict[nn.Module, None], switched: dict[nn.Module, None]) -> None:
    if module in blocks or module in switched:
        return
    if _has_switch(module):
        switched[module] = None
        return
    alike = Counter(map(type, module if isinstance(module, _CONTAINERS) else ()))
    for child in module.children():
        if alike[type(child)] > 1 and _is_block(child):
            blocks[child] = None
        else:
            _search(child, blocks, switched)


def _is_block(module: nn.Module) -> bool:
    """Whether running it again saves memory: no single layer, and no mere row of blocks that are found inside."""
    if not any(True for _ in module.children()) or isinstance(module, (nn.ModuleList, torch.jit.ScriptModule)):
        return False
    inside: dict[nn.Module, None] = {}
    if isinstance(module, nn.Sequential):
        _search(module, inside, inside)
    return not inside


# --- Transformers' own switch


def _has_switch(module: nn.Module) -> bool:
    supported = getattr(module, "supports_gradient_checkpointing", False)
    return bool(supported) and any(hasattr(part, _SWITCH[0]) for part in module.modules())


def _is_on(model: nn.Module) -> bool:
    return any(getattr(part, _SWITCH[0], False) for part in model.modules())


@contextmanager
def _switched_on(model: nn.Module) -> Iterator[None]:
    # Set here and not by the model's method, which also leaves hooks on its embeddings.
    parts = [vars(part) for part in model.modules() if hasattr(part, _SWITCH[0])]
    kept = [(held, {name: held[name] for name in _SWITCH if name in held}) for held in parts]
    on = dict(zip(_SWITCH, (True, functools.partial(checkpoint, use_reentrant=False))))
    for held in parts:
        held.update(on)
    try:
        yield
    finally:
        for held, before in kept:
            for name in _SWITCH:
                del held[name]
            held.update(before)
