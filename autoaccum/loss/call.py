"""A batch, and the calls it stands for: the model's, and the loss's.

Choices: a mapping is the model's keyword arguments and its targets go by one of four names; of a tuple or a list the
last element is the target; any other object is the model's one argument. Nothing is guessed beyond that: a batch that
does not fit gets an error which asks for `step=`. The user's batch is never changed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoaccum.data.ready import TARGET_KEYS
from autoaccum.data.structure import Piece, plain
from autoaccum.errors import DataError, LossError, shown

__all__ = ["STEP", "TARGET_KEYS", "Call", "arrange", "name_of", "returned_loss", "scalar", "targets_in"]

STEP = "or own the call with step=f(model, batch)"


class Call(NamedTuple):
    """The model's arguments, and what its outputs are compared with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any


def arrange(batch: Any, *, apart: bool) -> Call:
    """The calls that `batch` stands for.

    `apart` keeps the targets from the model, as there is a `loss`; a DataError where it is unclear which they are.
    """
    batch = plain(batch)
    if isinstance(batch, Mapping):
        return _arrange_mapping(batch, apart)
    several = isinstance(batch, (tuple, list))
    if not apart:
        return Call(tuple(batch) if several else (batch,), {}, None)
    if several and len(batch) > 1:
        return Call(tuple(batch[:-1]), {}, batch[-1])
    what = f"a {type(batch).__name__} of {len(batch)}" if several else f"one {type(batch).__name__}"
    raise DataError(
        f"the batch is {what}, and a loss needs a target beside the inputs: make each sample (input, target), {STEP}"
    )


def _arrange_mapping(batch: Mapping[Any, Any], apart: bool) -> Call:
    for key in batch:
        if not isinstance(key, str):
            raise DataError(
                f"the batch has the key {shown(key)}, a {type(key).__name__}: the model is called with keyword "
                f"arguments, so make the keys texts, {STEP}"
            )
    if not apart:
        return Call((), dict(batch), targets_in(batch, apart=False))
    found = [key for key in TARGET_KEYS if key in batch]
    if len(found) != 1:
        has = f"both {found[0]!r} and {found[1]!r}" if found else "none of them"
        raise DataError(
            f"the batch's keys are {', '.join(map(repr, batch))}: a loss takes its targets from exactly one of "
            f"{', '.join(map(repr, TARGET_KEYS))}, and there is {has}: rename a key, {STEP}"
        )
    rest = {key: value for key, value in batch.items() if key != found[0]}
    if not rest:
        raise DataError(f"the batch has nothing but {found[0]!r}, so nothing is left for the model: add its inputs")
    return Call((), rest, batch[found[0]])


def name_of(function: Any) -> str:
    """A callable's name, for messages."""
    return getattr(function, "__qualname__", None) or type(function).__name__


def targets_in(batch: Any, *, apart: bool) -> Any:
    """The batch's targets, where it is clear which they are; else None.

    Where they are not kept `apart`, only a mapping's labels count: a tuple's last element may be one more input.
    """
    if isinstance(batch, Piece):
        return targets_in(batch.batch, apart=apart)
    if isinstance(batch, Mapping):
        found = [key for key in TARGET_KEYS if key in batch]
        # "labels", which Transformers' heads know, wins where several are there.
        return batch["labels"] if "labels" in found else batch[found[0]] if len(found) == 1 else None
    if apart and isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[-1]
    return None


def returned_loss(outputs: Any) -> Any:
    """The loss in what a model returned: itself, `["loss"]`, `.loss`, or the first of a tuple; else a LossError."""
    if isinstance(outputs, (Tensor, int, float)):
        return outputs
    first = outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) else None
    loss = outputs["loss"] if isinstance(outputs, Mapping) and "loss" in outputs else getattr(outputs, "loss", first)
    if loss is None:
        keys = f" with the keys {', '.join(map(repr, outputs))}" if isinstance(outputs, Mapping) else ""
        raise LossError(
            f"the model returned a {type(outputs).__name__}{keys}, which holds no loss, or whose loss is None: give it "
            'labels in the batch, or return a scalar, or something with .loss or ["loss"]; or pass '
            "loss=f(outputs, targets) or step=f(model, batch)"
        )
    return loss


def scalar(loss: Any, source: str, *, graph: bool = True) -> Tensor:
    """`loss`, which `source` returned, as a tensor of shape (); with `graph` it needs one where gradients are enabled.

    Raises:
        LossError: not a tensor, not one real element, or without a graph.
    """
    if not isinstance(loss, Tensor):
        what = f"the number {shown(loss)}" if isinstance(loss, (int, float)) else f"a {type(loss).__name__}"
        raise LossError(
            f"{source} returned {what} as its loss, which has no graph, so nothing can be learned from it: return the "
            "loss tensor itself, without .item() or float()"
        )
    if loss.numel() != 1:
        raise LossError(
            f"{source} returned a loss of shape {tuple(loss.shape)}, and a gradient needs a scalar: average it "
            "(loss.mean(), or reduction='mean'); where these are a model's outputs, pass loss=f(outputs, targets), as "
            "loss=torch.nn.CrossEntropyLoss(); or pick the scalar out with step=f(model, batch)"
        )
    if loss.is_complex():
        raise LossError(f"{source} returned a complex loss, and a gradient needs a real one: take its .abs() or .real")
    if graph and not loss.requires_grad and torch.is_grad_enabled():
        raise LossError(
            f"{source} returned a loss of {loss.item():.6g} without a graph, so nothing can be learned from it: take "
            "away .detach(), .item() or no_grad on its way, and see that some parameter requires a gradient"
        )
    return loss.reshape(()) if loss.dim() else loss
