"""Models that `fully_shard` has sharded over the ranks: found, checked, and put back to where a pass begins.

Nothing of torch.distributed is imported for a model that is not sharded. What FSDP's own methods do not tell (its
groups of parameters, how they are reduced) is read from its states here, and nowhere else.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autoaccum.errors import SetupError
from autoaccum.model.checkpointing import all_blocks

__all__ = [
    "Shards",
    "check_shards",
    "is_sharded",
    "local",
    "put_on",
    "refuse_beside_shards",
    "refuse_for_shards",
    "reset_all",
    "shard",
]

_RUNGS = ("checkpointing/4", "checkpointing/2", "selective_checkpointing", "checkpointing")  # inside FSDP's own hooks
_OTHER_WAY = "train it unsharded, or shard it with torch.distributed.fsdp.fully_shard over all ranks"
_DISTRIBUTED = (
    "the model's parameters are distributed tensors (DTensor) that fully_shard has not made, such as those of tensor, "
    f"pipeline or context parallelism, which is not supported: {_OTHER_WAY}"
)


def local(tensor: Tensor) -> Tensor:
    """What lies on this rank of a distributed tensor; any other tensor itself."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def is_sharded(model: Any) -> bool:
    """Whether `fully_shard` was called on the model or on a part of it."""
    return isinstance(model, nn.Module) and any(_is_fsdp(module) for module in model.modules())


def _is_fsdp(module: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


class Shards:
    """The sharded part of a model, on this rank.

    Attributes:
        root: the module on which `fully_shard` was called last.
        groups: FSDP's groups of parameters, which are gathered and reduced together.
    """

    def __init__(self, model: nn.Module) -> None:
        """Reads FSDP's states, of a model that `is_sharded`, and reshards what a forward pass has left gathered."""
        modules: list[Any] = [module for module in model.modules() if _is_fsdp(module)]
        self.root = modules[0]
        self._modules = modules
        state = self.root._get_fsdp_state()
        if state._is_root is None:  # else the first forward would do it, and change what a snapshot has kept
            state._lazy_init()
        states = [module._get_fsdp_state() for module in modules]
        self.groups: list[Any] = list(dict.fromkeys(group for each in states for group in each._fsdp_param_groups))
        self._held = [parameter for group in self.groups for parameter in group.fsdp_params]
        self.reset()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The sharded ones, which the optimizer holds."""
        return [parameter.sharded_param for parameter in self._held]

    def reset(self) -> None:
        """To where a pass begins: nothing gathered, nothing left over from a pass that was broken off."""
        self.root.reset_iter_state()
        self.drop_whole()

    def drop_whole(self) -> None:
        """Lets go of gradients that no rank has summed yet."""
        for parameter in self._held:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None

    def gather_once(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(the sharded parameter, the one that forward passes use) of each; these exist once they were gathered.

        All ranks call this.
        """
        for module in self._modules:
            module.unshard()
            module.reshard()
        return [(parameter.sharded_param, parameter._unsharded_param) for parameter in self._held]

    def replicas(self) -> int:
        """How many ranks hold the same shard: 1, but on a mesh of two dimensions (HSDP)."""
        return next((group.mesh_info.replicate_mesh_size for group in self.groups if group._is_hsdp), 1)


def shard(model: nn.Module, device: torch.device, ranks: int) -> list[str]:
    """Calls `fully_shard` on each repeated block and then on the whole model, over all ranks; the blocks' names.

    Blocks are what activation checkpointing takes: the children of one class that a ModuleList or a Sequential has two
    or more of, the outermost such. All ranks call this.

    Raises:
        SetupError: the model has no blocks, or torch is too old.
    """
    _check_version()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = {name: block for name, block in all_blocks(model).items() if any(True for _ in block.parameters())}
    if not blocks:
        raise SetupError(
            "no repeated blocks were found to shard the model by: a ModuleList or Sequential with two or more children "
            "of one class; call fully_shard on parts of it and then on the whole yourself, where TARGET builds it"
        )
    mesh = init_device_mesh(device.type, (ranks,))
    for block in (*blocks.values(), model):
        fully_shard(block, mesh=mesh)
    return list(blocks)


def check_shards(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Refuses sharded parameters that cannot be trained here; reshards those that can.

    Raises:
        SetupError: FSDP1; a mesh with tensor parallelism; torch that is too old; several sharded roots; parameters on
            the host or with communication of the user's own; sparse embeddings; layers that meet other ranks.
    """
    if any(base.__name__ == "FullyShardedDataParallel" for module in model.modules() for base in type(module).__mro__):
        raise SetupError(
            f"the model is sharded by FullyShardedDataParallel (FSDP1), which is not supported: {_OTHER_WAY}"
        )
    own: set[int] = set()
    if is_sharded(model):
        _check_version()
        for text in _against(model):
            raise SetupError(text)
        own = {id(parameter) for parameter in Shards(model).parameters}
        parameters = model.parameters()
    if any(hasattr(parameter, "_local_tensor") and id(parameter) not in own for parameter in parameters):
        raise SetupError(_DISTRIBUTED)


def _check_version() -> None:
    from torch.distributed import fsdp

    kind: Any = getattr(fsdp, "FSDPModule", None)
    wanted = ("reset_iter_state", "set_reduce_scatter_unused_params", "set_force_sum_reduction_for_comms")
    missing = [name for name in wanted if not hasattr(kind, name)]
    if missing:
        raise SetupError(
            f"training a fully_shard model takes torch 2.13 or newer, and this is torch {torch.__version__}, whose "
            f"FSDPModule has no {missing[0]}: update torch, or train the model unsharded"
        )


def _against(model: nn.Module) -> Iterator[str]:
    """What stands against training a sharded model."""
    inside = set(next(module for module in model.modules() if _is_fsdp(module)).modules())
    for name, module in model.named_modules():
        if _is_fsdp(module) and module not in inside:
            yield (f"the model has several sharded roots ({name} is not inside the first of them), each of which would "
                   "gather and reduce by itself: call fully_shard on the whole model last")  # fmt: skip
        if isinstance(module, nn.SyncBatchNorm):
            yield (f"{name} is a SyncBatchNorm in a sharded model, which is not supported: use BatchNorm, whose "
                   "running statistics are pooled over the ranks as well")  # fmt: skip
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            yield f"{name} has sparse gradients, which cannot be sharded: make it with sparse=False"
    for group in Shards(model).groups:
        offload = type(group.offload_policy).__name__
        if offload != "OffloadPolicy":
            yield (f"the model is sharded with {offload}, whose parameters wait on the host, which is not supported: "
                   "call fully_shard without offload_policy")  # fmt: skip
        for comm in (group._all_gather_comm, group._reduce_scatter_comm):
            if not type(comm).__name__.startswith("Default"):
                yield (f"the model communicates through {type(comm).__name__}, an object of your own or of a "
                       "backend's, where autoaccum puts its own: leave set_custom_all_gather, "
                       "set_custom_reduce_scatter and set_allocate_memory_from_process_group_for_comm out")  # fmt: skip
        if not hasattr(group.mesh_info, "shard_mesh_size") or group._all_reduce_hook is not None:
            yield f"the model is replicated by FSDP's own means, or has an all-reduce hook: {_OTHER_WAY}"
        if any(parameter.is_dtensor for parameter in group.fsdp_params):
            yield _DISTRIBUTED


def refuse_for_shards(model: Any, **given: tuple[bool, str]) -> None:
    """Refuses, with a SetupError, what a sharded model cannot be trained with.

    `given`: by the name of a setting, whether it was asked for, and what to do instead.
    """
    for name, (asked, advice) in given.items():
        if asked and is_sharded(model):
            raise SetupError(f"{name} is not supported for a model that fully_shard has sharded: {advice}")


def refuse_beside_shards(model: Any, isolation: Any, prefer: str, ladder: str | bool | None) -> None:
    """Refuses what the probe of a sharded model cannot be asked, with a SetupError."""
    refuse_for_shards(
        model,
        isolate=(isolation is not None, "the ranks meet in each trial, and a child process is none of them"),
        prefer=(prefer == "fastest", "leave it at fewest"),
        ladder=(
            ladder not in (None, False, *_RUNGS),
            f"shard it over more ranks, or take one of {', '.join(_RUNGS)} by name",
        ),
    )


def put_on(device: torch.device, module: nn.Module) -> None:
    """Puts a module on a device; a SetupError where it is sharded, and on a device of another kind."""
    if not is_sharded(module):
        module.to(device)
        return
    own = next(module.parameters()).device
    if own.type != device.type:
        raise SetupError(
            f"the model is sharded on {own.type}, and device= says {device}: leave device= out, or shard it over "
            f"a mesh of {device.type}"
        )


def reset_all(roots: Iterable[Any]) -> None:
    """Reshards each sharded module among `roots`."""
    if "torch.distributed.fsdp" in sys.modules:
        for root in roots:
            if is_sharded(root):
                Shards(root).reset()
