"""What the user most likely meant where the model or the loss raised: our words first, torch's own behind them.

Asked only after something was raised, so that a call which works costs nothing. What is not recognised stays the user's
error, as it was raised.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from autoaccum.checks import misfit
from autoaccum.data import tree
from autoaccum.errors import AutoaccumError, DataError, SetupError
from autoaccum.loss.call import STEP, Call, name_of
from autoaccum.loss.counts import holds_indices, ignored_by
from autoaccum.loss.reduction import GivenLoss

__all__ = ["explain_loss", "explain_model", "outside_classes", "raise_meant"]

_DTYPES = re.compile(r"dtype|scalar type|input type|can't be cast|not implemented for '", re.IGNORECASE)
_SIZES = re.compile(r"\bsizes?\b|\bshapes?\b|dimension", re.IGNORECASE)

Meant = tuple[type[AutoaccumError], str]
Leaves = list[tuple[str, Tensor]]  # the tensors in a call's arguments, each with its place in the batch


def raise_meant(error: Exception, meant: Meant | None) -> None:
    """Raises what was meant, where that is known, with what was raised behind it."""
    if meant is not None:
        kind, text = meant
        raise kind(f"{text} ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from error


def explain_model(error: Exception, model: nn.Module, call: Call, *, apart: bool) -> Meant | None:
    """What was meant where `model(*call.args, **call.kwargs)` raised `error`; None where that is not known.

    `apart`: the targets were kept from the model, since there is a `loss`.
    """
    leaves = [(f"batch{path}", leaf) for path, leaf in tree.tensors(call.args if call.args else call.kwargs)]
    if isinstance(error, TypeError) and misfit(model.forward, *call.args, **call.kwargs):
        given = f"the keywords {', '.join(call.kwargs)}" if call.kwargs else f"{len(call.args)} of the batch's parts"
        names = ", ".join(inspect.signature(model.forward).parameters)
        remedy = _LOSS_BESIDE if apart else _LOSS_FORGOTTEN
        return SetupError, f"{type(model).__name__}.forward({names}) cannot be called with {given}; {remedy}, {STEP}"
    if isinstance(error, IndexError) and "index out of range" in str(error):
        return _outside_embedding(model, leaves)
    if isinstance(error, (RuntimeError, TypeError)) and _DTYPES.search(str(error)):
        return _other_dtype(model, leaves)
    return None


def explain_loss(error: Exception, given: GivenLoss, outputs: Any, targets: Any) -> Meant | None:
    """What was meant where the loss raised `error` for these; None where that is not known."""
    name = name_of(given.loss)
    if isinstance(error, (IndexError, RuntimeError)) and (found := outside_classes(outputs, targets, given)):
        return SetupError, found
    if not isinstance(error, (AttributeError, IndexError, RuntimeError, TypeError, ValueError)):
        return None
    if not isinstance(outputs, Tensor):  # a loss of the user's own may take them, and fail otherwise
        return _no_tensor(name, outputs) if isinstance(error, (AttributeError, TypeError)) else None
    if outputs.dim() == 0:
        return SetupError, (
            f"loss={name} was given one number, since the model returns a scalar: where that is its loss already, "
            "leave loss= out"
        )
    told = _DTYPES.search(str(error)) or (given.kind and _SIZES.search(str(error)))
    if not told or not isinstance(targets, Tensor):
        return None
    takes = f"equal shapes, and targets.to({outputs.dtype})"
    if given.takes_classes:
        takes = "outputs (samples, classes, ...) and targets (samples, ...), which targets.long() makes classes"
    return DataError, (
        f"loss={name} was given outputs of shape {tuple(outputs.shape)} and {outputs.dtype}, and targets of shape "
        f"{tuple(targets.shape)} and {targets.dtype}, which do not go together: it takes {takes}"
    )


_LOSS_BESIDE = (
    "with loss= the target is kept from the model: where the model computes its own loss from it, leave loss= out; "
    "else make the batch's other parts fit its arguments"
)
_LOSS_FORGOTTEN = (
    "without loss= the model gets the whole batch and returns its loss: where the batch's last part is the target, "
    "pass loss=f(outputs, targets), such as loss=torch.nn.CrossEntropyLoss()"
)


def _no_tensor(name: str, outputs: Any) -> Meant:
    """Outputs that a loss made for tensors cannot take."""
    keys = [str(key) for key in outputs] if isinstance(outputs, Mapping) else []
    holds = f" with the keys {', '.join(keys)}" if keys else ""
    part = f"outputs[{keys[-1]!r}]" if keys else "outputs[0]" if isinstance(outputs, tuple) else "outputs.logits"
    return SetupError, (
        f"loss={name} was given what the model returned, a {type(outputs).__name__}{holds}, and cannot take it: where "
        "the model computes its own loss, leave loss= out; else pick the part that counts, "
        f"loss=lambda outputs, targets: {name}({part}, targets)"
    )


def outside_classes(outputs: Any, targets: Any, given: GivenLoss) -> str | None:
    """In words, which label is none of the classes; None where all are."""
    if not given.of_logits or not holds_indices(targets):
        return None
    if not isinstance(outputs, Tensor) or outputs.dim() == 0 or targets.dim() >= max(outputs.dim(), 2):
        return None
    classes = outputs.shape[min(1, outputs.dim() - 1)]
    ignored = ignored_by(given.settings)
    wrong = targets[((targets < 0) | (targets >= classes)) & (targets != ignored)]
    if not wrong.numel():
        return None
    return (
        f"a label is {int(wrong[0])}, and the model's output has {classes} classes, counted from 0 to {classes - 1}: "
        "give the model as many outputs as there are classes, count labels from 0, or mark what is not to count by "
        f"ignore_index={ignored}"
    )


def _outside_embedding(model: nn.Module, leaves: Leaves) -> Meant | None:
    """An index that none of the model's embeddings has."""
    rows = sorted(
        {each.num_embeddings for each in model.modules() if isinstance(each, (nn.Embedding, nn.EmbeddingBag))}
    )
    for place, leaf in leaves:
        if not rows or not holds_indices(leaf) or not leaf.numel():
            continue
        low, high = int(leaf.min()), int(leaf.max())
        if low < 0 or high >= rows[0]:
            return DataError, (
                f"{place} holds the index {low if low < 0 else high}, and the model's embeddings have "
                f"{' or '.join(map(str, rows[:4]))} rows, counted from 0: make the embedding as large as the "
                "vocabulary, or look at the data"
            )
    return None


def _other_dtype(model: nn.Module, leaves: Leaves) -> Meant | None:
    """Data in another number format than the parameters."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    others = [(place, leaf) for place, leaf in leaves if leaf.dtype != own and not leaf.is_complex()]
    if own is None or not others:
        return None
    # Whole numbers are right for many models; a float of another format is right for none.
    place, leaf = max(others, key=lambda other: other[1].is_floating_point())
    floats = leaf.is_floating_point()
    also = f", or the model, model.to({leaf.dtype})" if floats else ""
    return DataError, (
        f"{place} is {leaf.dtype}{'' if floats else ', whole numbers'}, and the model's parameters are {own}: convert "
        f"the data, such as x.to({own}){also}"
    )
