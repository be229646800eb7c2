"""Sharded trainings that are saved, for test_training_shard_files.py and torture, and what they came to."""

import os
from typing import Any

import torch
from torch import Tensor, nn

import autoaccum
from tests.shards_work import Net, sharded, tokens

__all__ = ["Interruption", "came_to", "prepared"]


class Interruption(Exception):
    """Stands for whatever ends a training early."""


def prepared(
    folder: Any, *, drop: float = 0.3, epochs: int = 2, until: int | None = None, shard: bool = True, **more: Any
) -> autoaccum.TrainingLoop:
    """Shuffled windows, dropout, AdamW on a schedule, clipping: three windows an epoch, each of them saved."""

    def listen(event: Any) -> None:
        if event.name == "step" and event.record.step == until:
            raise Interruption

    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))  # as in a new process, they start elsewhere
    model = Net(drop=drop, norm=True)
    return autoaccum.prepare(
        sharded(model) if shard else model, tokens(29),
        target_batch=10, micro_batch=3, loss=nn.CrossEntropyLoss(), epochs=epochs, seed=5,
        optimizer=lambda parameters, lr: torch.optim.AdamW(parameters, lr=1e-3), schedule="cosine", clip_norm=0.5,
        check=False, progress=False, checkpoint=folder, checkpoint_every=None if folder is None else 1,
        callbacks=[listen], **more,
    )  # fmt: skip


def whole(tensor: Any) -> Tensor:
    got: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return got.detach().clone()


def came_to(loop: autoaccum.TrainingLoop) -> dict[str, Any]:
    """All that a training came to: records, parameters and buffers, the optimizer's state."""
    records = [{**record.to_dict(), "seconds": 0, "samples_per_second": 0} for record in loop.history]
    tensors = [whole(tensor) for tensor in loop.model.state_dict().values()]
    for state in loop.optimizer.state_dict()["state"].values():
        tensors += [whole(value) for value in state.values() if isinstance(value, torch.Tensor)]
    return {"records": records, "tensors": tensors}
