"""What the user most likely meant where the model or the loss raised: our words first, torch's own behind them.

Asked only after something was raised, so that a call which works costs nothing. What is not recognised stays the user's
error, as it was raised.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoaccum.data import tree
from autoaccum.errors import DataError, SetupError
from autoaccum.loss.call import Call
from autoaccum.loss.torch_losses import TorchLoss

__all__ = ["check_classes", "explain_loss", "explain_model"]

_DTYPES = re.compile(r"dtype|scalar type|input type|can't be cast|not implemented for '", re.IGNORECASE)
_SIZES = re.compile(r"\bsizes?\b|\bshapes?\b|dimension", re.IGNORECASE)
_STEP = "or own the call with step=f(model, batch)"


def explain_model(error: Exception, model: nn.Module, call: Call, *, apart: bool) -> Exception | None:
    """Why `model(*call.args, **call.kwargs)` raised `error`; None where that is not known.

    `apart`: the targets were kept from the model, since there is a `loss`.
    """
    if isinstance(error, TypeError) and not _takes(model, call):
        return _wrong_call(error, model, call, apart)
    if isinstance(error, IndexError) and "index out of range" in str(error):
        return _outside_embedding(error, model, call)
    if isinstance(error, (RuntimeError, TypeError)) and _DTYPES.search(str(error)):
        return _other_dtype(error, model, call)
    return None


def explain_loss(
    error: Exception, name: str, outputs: Any, targets: Any, torch_loss: TorchLoss | None
) -> Exception | None:
    """Why the loss of this name raised `error` for these outputs and targets; None where that is not known."""
    if isinstance(error, (IndexError, RuntimeError)) and torch_loss is not None:
        found = _outside_classes(outputs, targets, torch_loss)
        if found is not None:
            return SetupError(f"{found} ({_torch(error)})")
    if not isinstance(error, (AttributeError, IndexError, RuntimeError, TypeError, ValueError)):
        return None
    if not isinstance(outputs, Tensor):
        return _no_tensor(error, name, outputs)
    if outputs.dim() == 0:
        return SetupError(
            f"loss={name} was given one number, since the model returns a scalar: where that is its loss already, "
            f"leave loss= out ({_torch(error)})"
        )
    return _no_match(error, name, outputs, targets, torch_loss) if isinstance(targets, Tensor) else None


def check_classes(outputs: Any, targets: Any, torch_loss: TorchLoss | None) -> None:
    """Refuses labels that are no classes of the model's, where they lie on an accelerator.

    There torch ends the process's use of the device for such a label; on the CPU it raises, which is explained then.

    Raises:
        SetupError: naming the label.
    """
    if torch_loss is None or not isinstance(targets, Tensor) or targets.device.type in ("cpu", "meta"):
        return
    found = _outside_classes(outputs, targets, torch_loss)
    if found is not None:
        raise SetupError(found)


def _torch(error: Exception) -> str:
    """What was raised, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _takes(model: nn.Module, call: Call) -> bool:
    try:
        inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    except TypeError:
        return False
    except ValueError:  # no signature to be had
        return True
    return True


def _wrong_call(error: Exception, model: nn.Module, call: Call, apart: bool) -> Exception:
    given = f"the keywords {', '.join(call.kwargs)}" if call.kwargs else f"{len(call.args)} of the batch's parts"
    names = ", ".join(inspect.signature(model.forward).parameters)
    what = f"{type(model).__name__}.forward({names}) cannot be called with {given}"
    if apart:
        remedy = (
            "with loss= the target is kept from the model: where the model computes its own loss from it, leave loss= "
            f"out; else make the batch's other parts fit its arguments, {_STEP}"
        )
    else:
        remedy = (
            "without loss= the model gets the whole batch and returns its loss: where the batch's last part is the "
            f"target, pass loss=f(outputs, targets), such as loss=torch.nn.CrossEntropyLoss(), {_STEP}"
        )
    return SetupError(f"{what}; {remedy} ({_torch(error)})")


def _no_tensor(error: Exception, name: str, outputs: Any) -> Exception | None:
    """Outputs that a loss made for tensors cannot take; a loss of the user's own may take them, and fail otherwise."""
    if not isinstance(error, (AttributeError, TypeError)):
        return None
    keys = [str(key) for key in outputs] if isinstance(outputs, Mapping) else []
    holds = f" with the keys {', '.join(keys)}" if keys else ""
    part = f"outputs[{keys[-1]!r}]" if keys else "outputs[0]" if isinstance(outputs, tuple) else "outputs.logits"
    return SetupError(
        f"loss={name} was given what the model returned, a {type(outputs).__name__}{holds}, and cannot take it: where "
        "the model computes its own loss, leave loss= out; else pick the part that counts, "
        f"loss=lambda outputs, targets: {name}({part}, targets) ({_torch(error)})"
    )


def _no_match(
    error: Exception, name: str, outputs: Tensor, targets: Tensor, torch_loss: TorchLoss | None
) -> Exception | None:
    """Outputs and targets of types or shapes that the loss does not take together."""
    if _DTYPES.search(str(error)):
        return DataError(
            f"loss={name} was given outputs of {outputs.dtype} and targets of {targets.dtype}, which it does not take "
            f"together: convert the targets, such as targets.{_wanted(torch_loss, outputs)} ({_torch(error)})"
        )
    if torch_loss is None or not _SIZES.search(str(error)):
        return None
    takes = "outputs (samples, classes, ...) and targets (samples, ...)" if torch_loss.of_logits else "equal shapes"
    return DataError(
        f"loss={name} was given outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}, "
        f"which do not go together: it takes {takes} ({_torch(error)})"
    )


def _outside_classes(outputs: Any, targets: Any, torch_loss: TorchLoss) -> str | None:
    """In words, which label is none of the classes; None where all are."""
    if not torch_loss.of_logits or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if outputs.dim() == 0 or targets.is_floating_point() or targets.dim() >= max(outputs.dim(), 2):
        return None
    classes = outputs.shape[min(1, outputs.dim() - 1)]
    wrong = targets[((targets < 0) | (targets >= classes)) & (targets != torch_loss.ignore_index)]
    if not wrong.numel():
        return None
    return (
        f"a label is {int(wrong[0])}, and the model's output has {classes} classes, counted from 0 to {classes - 1}: "
        "give the model as many outputs as there are classes, count labels from 0, or mark what is not to count by "
        f"ignore_index={torch_loss.ignore_index}"
    )


def _outside_embedding(error: Exception, model: nn.Module, call: Call) -> Exception | None:
    rows = [module.num_embeddings for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    if not rows:
        return None
    for place, leaf in _leaves(call):
        if not leaf.is_floating_point() and leaf.dtype != torch.bool and leaf.numel():
            low, high = int(leaf.min()), int(leaf.max())
            if low < 0 or high >= min(rows):
                either = " or ".join(str(each) for each in sorted(set(rows))[:4])
                return DataError(
                    f"{place} holds the index {low if low < 0 else high}, and the model's embeddings have {either} "
                    "rows, counted from 0: make the embedding as large as the vocabulary, or look at the data "
                    f"({_torch(error)})"
                )
    return None


def _other_dtype(error: Exception, model: nn.Module, call: Call) -> Exception | None:
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if own is None:
        return None
    floats = [(place, leaf.dtype) for place, leaf in _leaves(call) if leaf.is_floating_point() and leaf.dtype != own]
    whole = [
        (place, leaf.dtype) for place, leaf in _leaves(call) if not (leaf.is_floating_point() or leaf.is_complex())
    ]
    for place, dtype in floats[:1] or whole[:1]:
        also = f", or the model, model.to({dtype})" if floats else ""
        what = "" if floats else ", whole numbers"
        return DataError(
            f"{place} is {dtype}{what}, and the model's parameters are {own}: convert the data, such as x.to({own})"
            f"{also} ({_torch(error)})"
        )
    return None


def _leaves(call: Call) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a call's arguments, each with its place in the batch."""
    for path, leaf in tree.tensors(call.args if call.args else call.kwargs):
        yield f"batch{path}", leaf


def _wanted(torch_loss: TorchLoss | None, outputs: Tensor) -> str:
    return "long()" if torch_loss is not None and torch_loss.over_classes else f"to({outputs.dtype})"
