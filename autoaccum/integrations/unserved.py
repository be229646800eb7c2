"""Transformers Trainers whose windows cannot be made ours, and why: refused before anything is touched."""

from typing import Any

from torch import nn

from autoaccum.errors import SetupError
from autoaccum.integrations.heldback import refuse_dealt_streams
from autoaccum.integrations.wanted import refuse_late

__all__ = ["NAME", "refuse", "refuse_own_batches"]

NAME = "_autoaccum"  # of what stands on a trainer that is attached


def refuse(trainer: Any) -> None:
    """Refuses, before anything is touched, a trainer whose windows cannot be made ours.

    Raises:
        SetupError: with the reason, and what to do instead.
    """
    args = trainer.args
    refuse_late(NAME in vars(trainer), trainer.is_in_train, "trainer.train()")
    refuse_own_batches(trainer)
    if args.auto_find_batch_size:
        raise SetupError(
            "auto_find_batch_size=True shrinks the batch when memory runs out, and attach() keeps it: set it to False"
        )
    if args.n_gpu > 1:
        raise SetupError(
            f"one process for {args.n_gpu} GPUs is DataParallel, which splits each batch by itself: start the script "
            "with torchrun, one process for each GPU, or show it one with CUDA_VISIBLE_DEVICES"
        )
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        raise SetupError(
            'train_sampling_strategy="batch_rebalance" makes its own batches: leave it out; windows are cut by length'
        )
    for name, on in (("DeepSpeed", trainer.is_deepspeed_enabled), ("FSDP", trainer.is_fsdp_enabled)):
        if on:
            raise SetupError(f"{name} shards what attach() has to add up: train without it, or with its own settings")
    for name, layer in () if trainer.model is None else trainer.model.named_modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse:
            raise SetupError(
                f"{name} has sparse gradients, and the Trainer takes the norm of all gradients, which torch cannot of "
                "sparse ones: make it with sparse=False"
            )
    refuse_dealt_streams(trainer.train_dataset)


def refuse_own_batches(trainer: Any) -> None:
    """Refuses a trainer that makes its own batches.

    Raises:
        SetupError: the class that does is named.
    """
    kind = type(trainer)
    for method in (
        "get_train_dataloader",
        "_get_dataloader",
        "_prepare_inputs",
        "get_batch_samples",
        "_inner_training_loop",
    ):
        where = next((base for base in kind.__mro__ if method in vars(base)), None)
        if where is not None and not where.__module__.startswith("transformers."):
            raise SetupError(
                f"{where.__name__} makes its own batches ({where.__module__} overrides {method}), and may count the "
                "calls of training_step: attach() cannot cut them; train with its own settings"
            )
