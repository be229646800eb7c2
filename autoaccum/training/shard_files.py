"""A sharded model's tensors in a folder, written and read by torch.distributed.checkpoint: each rank has its shards.

Choices made here:

- The folder is what that library writes, so that its own tools read the weights, and that another number of ranks
  cuts the tensors anew. All else of a checkpoint stays in its `state.pt`, with a tensor on the meta device in the place
  of each, which says its shape and dtype.
- The library's index is a pickle. It is read by an unpickler that knows an index's classes and nothing else; the
  tensors are read with `weights_only=True`.
- Ranks that save meet in the library's own exchanges, which tell all of them where one has failed. To read, each opens
  the folder by itself, and they vote afterwards.
"""

import importlib.util
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoaccum.errors import CheckpointError
from autoaccum.ranks import Ranks, bytes_of, digest, told
from autoaccum.ranks.places import answering

__all__ = ["check_alike", "with_shards", "without_shards", "write_shards"]

_INDEX = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    *((_INDEX, name) for name in ("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                                  "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}  # fmt: skip

Place = tuple[Any, ...]


def without_shards(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(a state without its distributed tensors, a meta tensor in the place of each; those, by where they were)."""
    shards: dict[str, Tensor] = {}

    def take(path: Place, value: Tensor) -> Tensor:
        if not hasattr(value, "_local_tensor"):
            return value
        shards[_key(path)] = value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    return _mapped(dict(state), take), shards


def check_alike(optimizer: Optimizer, sharded: Callable[[Any], bool], ranks: Ranks) -> None:
    """That what an optimizer keeps undistributed of a sharded parameter is alike on all ranks, as a step's number is.

    Raises:
        CheckpointError: it is each rank's own, and could not be given back.
    """
    own = b"".join(
        bytes_of(value)
        for parameter, values in optimizer.state.items() if sharded(parameter)
        for value in values.values() if isinstance(value, Tensor) and not hasattr(value, "_local_tensor")
    )  # fmt: skip
    if len(set(ranks.gather("what the optimizer keeps", digest(own)))) > 1:
        raise told(
            CheckpointError(
                f"{type(optimizer).__name__} keeps plain tensors of a sharded model that differ on the ranks, and "
                "which part of a whole they are cannot be known: let it make its state by torch.zeros_like(parameter)"
            )
        )


def write_shards(shards: Mapping[str, Tensor], folder: Path, ranks: Ranks) -> None:
    """Writes each rank's part of distributed tensors into an empty folder. All ranks call this.

    Raises:
        CheckpointError: it failed on a rank, or a rank does not see the folder; on all ranks.
        LostRankError: another process ended, or no longer answers.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.metadata import StorageMeta
    from torch.distributed.checkpoint.state_dict_saver import save

    class Writer(FileSystemWriter):
        def storage_meta(self) -> StorageMeta:
            return StorageMeta()  # else the index has the folder's temporary name in it

    if importlib.util.find_spec("numpy") is None:
        raise CheckpointError("torch.distributed.checkpoint takes numpy, which is not installed: pip install numpy")
    if ranks.any("the checkpoint's folder", not folder.is_dir()):
        raise told(
            CheckpointError(
                f"not every rank sees {str(folder.parent)!r}: all ranks of a sharded model write there: "
                "give a folder on a disk that all machines share"
            )
        )
    try:
        with answering(ranks.group):
            save(dict(shards), storage_writer=Writer(folder, sync_files=False), process_group=ranks.group)
    except CheckpointException as error:
        raise told(CheckpointError(_causes(error))) from error


def with_shards(
    state: Mapping[str, Any], modules: Mapping[str, nn.Module], optimizer: Optimizer, folder: Path, ranks: Ranks
) -> dict[str, Any]:
    """A state whole again: what `without_shards` took out of it, cut as these modules' parameters are.

    What belongs to the modules is read into their own parameters. All ranks call this.

    Raises:
        CheckpointError: it cannot be read, or there is code in it.
    """
    own = {name: module.state_dict() for name, module in modules.items()}
    numbers = [number for group in state["turns"]["each"][0]["optimizer"]["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_number = dict(zip(numbers, parameters, strict=True))
    targets: dict[str, Tensor] = {}

    def put(path: Place, value: Tensor) -> Tensor:
        if not value.is_meta:
            return value
        # ("modules", its name, "state", a name), or ("turns", "each", 0, "optimizer", "state", a number, ...).
        made = own[path[1]][path[3]] if path[0] == "modules" else _cut_as(of_number[path[5]], value)
        targets[_key(path)] = made
        return made

    whole: dict[str, Any] = _mapped(dict(state), put)
    if targets:
        _read(targets, folder)
        ranks.tally("the shards are read")
    return whole


def _read(targets: dict[str, Tensor], folder: Path) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return index

    try:
        with (folder / ".metadata").open("rb") as file:
            index = _Index(file).load()
        with warnings.catch_warnings():  # that it takes this process for a single one, which is meant
            warnings.simplefilter("ignore", UserWarning)
            load(targets, storage_reader=Reader(folder), no_dist=True)
    except CheckpointError:
        raise
    except (CheckpointException, Exception) as error:  # whatever a pickle that is none makes of itself
        why = _causes(error) if isinstance(error, CheckpointException) else error
        raise CheckpointError(f"{folder} cannot be read by torch {torch.__version__}: {why}") from error


class _Index(pickle.Unpickler):
    """Reads an index, and runs nothing of what else a pickle may hold."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CLASSES:
            raise CheckpointError(
                f"the checkpoint's .metadata has {module}.{name} in it, which no index has, and nothing of it was run: "
                "delete it to go on from the checkpoint before, or resume=False to start anew"
            )
        return super().find_class(module, name)


def _cut_as(parameter: Any, value: Tensor) -> Tensor:
    """An empty tensor of a shape and dtype, cut over the ranks as the parameter is where it has the same dimension."""
    from torch.distributed.tensor import Replicate, Shard, zeros

    if value.shape == parameter.shape:
        return torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
    placements: Sequence[Any] = [
        each if isinstance(each, Shard) and value.shape[each.dim : each.dim + 1] == parameter.shape[each.dim :][:1]
        else Replicate()
        for each in parameter.placements
    ]  # fmt: skip
    made: Tensor = zeros(value.shape, dtype=value.dtype, device_mesh=parameter.device_mesh, placements=placements)
    return made


def _causes(error: Any) -> str:
    """What failed on which ranks, in one line."""
    return "; ".join(f"rank {rank}: {type(each).__name__}: {each}" for rank, (each, _) in error.failures.items())


def _key(path: Place) -> str:
    return "/".join(map(str, path))


def _mapped(value: Any, change: Callable[[Place, Tensor], Tensor], path: Place = ()) -> Any:
    """Plain values with each tensor changed, given where it is."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, dict):
        return type(value)({key: _mapped(each, change, (*path, key)) for key, each in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(each, change, (*path, place)) for place, each in enumerate(value))
    return value
