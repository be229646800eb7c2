"""Joining the group that torchrun started, and finding this process in the one that there is."""

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from autoaccum.errors import SetupError, shown
from autoaccum.ranks.together import Ranks

if dist.is_available():
    # It takes the group of the moment as its functions' default. Later, as a part of torch that an optimizer needs,
    # it would keep a destroyed group and its threads alive, and one that lets go of a tensor while the interpreter
    # ends aborts the process.
    import torch.distributed.nn
    from torch.distributed.rendezvous import rendezvous

__all__ = ["ends_all", "here", "join", "leave", "ranks_given", "sharing"]

# Dimensions of a mesh along which each rank has samples of its own; along others ranks share theirs.
DATA_DIMENSIONS = ("dp", "data", "ddp", "fsdp", "replicate", "shard", "dp_replicate", "dp_shard")


def join() -> None:
    """Joins the group where torchrun, or something with its environment, started this process and nobody has yet.

    Who joins leaves again: the group is destroyed when the process ends, before the interpreter does.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not asked or not dist.is_available() or dist.is_initialized():
        return
    atexit.register(leave)
    # A driver that is too old for this PyTorch still counts its GPUs.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local < gpus:
        # Otherwise all ranks of a host would meet on its first GPU, where NCCL waits forever.
        torch.cuda.set_device(local)
    # A model may be trained on the CPU of a machine with GPUs, and small messages need not wait for a GPU.
    _init("cpu:gloo,cuda:nccl" if gpus else "gloo")


def _init(backend: str) -> None:
    """Initialises the default group; one that torchrun started again meets where no earlier start has met.

    torchrun keeps one store over its restarts, in which torch looks for the addresses of the other ranks without asking
    which start they are of: who reads before the others have written is sent to the port of a process that was killed.
    How often torchrun has started again tells the starts apart on one node; several nodes may count differently.
    """
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend)
        return
    store, rank, world_size = next(rendezvous("env://"))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"start {start}", store)  # type: ignore[attr-defined]  # public, and left out of __all__
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def leave() -> None:
    """Destroys the default group, where there is one."""
    if dist.is_initialized():
        # A thread of gloo's may still hold a tensor, and wait for the interpreter to let it go. Torch 2.4 joins that
        # thread without giving way to it, for ever.
        time.sleep(0.02)
        dist.destroy_process_group()


@contextmanager
def ends_all(together: bool = True, group: Any = None) -> Iterator[None]:
    """For what all ranks of `group` do together and ends in an exchange: an error on one of them ends it on all."""
    try:
        yield
    except Exception:
        if together:
            here(group=group).fail()
        raise


def ranks_given(group: Any, mesh: Any) -> Any:
    """The process group of `group=` or of `device_mesh=`, among which windows are shared out; None: all ranks.

    Raises:
        SetupError: both are given; or the mesh is none, does not hold this process, or not all ranks in several
            dimensions of data; or has others as well, and not one of data.
    """
    if mesh is None:
        return group
    if group is not None:
        raise SetupError("group= and device_mesh= both say which ranks train together: give one of them")
    if not hasattr(mesh, "mesh_dim_names"):
        raise SetupError(f"device_mesh={shown(mesh)} is no DeviceMesh: give what init_device_mesh returned")
    if mesh.get_coordinate() is None:
        raise SetupError("device_mesh= does not hold this process: call this on the ranks that it was made of")
    names = mesh.mesh_dim_names or ()
    data = [at for at, name in enumerate(names) if name in DATA_DIMENSIONS]
    if _of_copies(mesh):
        if len(data) != 1:
            raise SetupError(
                f"device_mesh= has the dimensions {', '.join(names)}, of which {len(data)} are of data: beside others "
                f"ranks have samples of their own along one dimension, which is named as one of "
                f"{', '.join(DATA_DIMENSIONS)}"
            )
        return mesh.get_group(data[0])
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() != dist.get_world_size():
        raise SetupError(
            f"device_mesh= has {mesh.size()} of {dist.get_world_size()} ranks in several dimensions: give a mesh of "
            "all ranks, one of one dimension, or their process group by group="
        )
    return None


def sharing(mesh: Any) -> list[Ranks]:
    """This process among those that have the same samples, for each dimension of a mesh that is none of data's."""
    return [] if mesh is None else [here(group=mesh.get_group(at)) for at in _of_copies(mesh)]


def _of_copies(mesh: Any) -> list[int]:
    names = enumerate(mesh.mesh_dim_names or ())
    return [at for at, name in names if name not in DATA_DIMENSIONS and mesh.size(at) > 1]


def here(device: torch.device | None = None, group: Any = None) -> Ranks:
    """This process among those of an initialised process group, the default one if none is given; else a single one.

    `device` is where this process trains: a backend without CPU tensors (NCCL) talks through it. Where none is given,
    it is the current device, or under torchrun the one of the local rank.

    Raises:
        SetupError: `group` is none, or this process is not one of its.
    """
    if not dist.is_available() or not dist.is_initialized():
        if group is not None:
            raise SetupError("group= is given, and no process group is initialised here: call init_process_group first")
        return Ranks()
    if group is dist.GroupMember.NON_GROUP_MEMBER or (group is not None and not isinstance(group, dist.ProcessGroup)):
        raise SetupError(
            "group= does not hold this process: give what torch.distributed.new_group returned, and call this on the "
            "ranks that it was made of, and on no others"
        )
    group = dist.group.WORLD if group is None else group
    return Ranks(group, _meeting_place(dist.get_backend_config(group), device))


def _meeting_place(backends: str, device: torch.device | None) -> torch.device:
    """The device for small messages, from a configuration such as "cpu:gloo,cuda:nccl"."""
    kinds = [part.split(":")[0] for part in backends.split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    if device is not None and device.type in kinds:
        return device
    # Where nobody has made a device current, all ranks of a host would meet on its first one: NCCL hangs there.
    api, local = getattr(torch, kinds[0]), int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device(kinds[0], api.current_device() or (local if local < api.device_count() else 0))
