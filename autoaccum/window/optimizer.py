"""The optimizer the user named, made and checked before anything runs.

What cannot be trained by accumulating gradients is refused here, with the reason, while the model is untouched.
"""

import inspect
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from autoaccum.errors import SetupError

__all__ = ["build_optimizer", "check_model", "check_optimizer", "optimizer_parameters", "trained_parameters"]

_NAMED = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
}
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def build_optimizer(
    optimizer: str | Optimizer | Callable[..., Optimizer], model: nn.Module, *, lr: float | None, loss: Any = None
) -> Optimizer:
    """The optimizer for `model`: an instance as it is, a class or factory called as `f(params, lr=lr)`, a torch name.

    Args:
        optimizer: an instance, a class, a factory, or a name in `torch.optim` in any case ("adamw").
        model: what is trained.
        lr: the learning rate; None beside an instance, whose own count.
        loss: the loss; where it is a module, its parameters are trained as well.

    Raises:
        SetupError: an unknown name, several optimizers, one that needs a closure, one that holds foreign parameters.
    """
    if isinstance(optimizer, Optimizer):
        if lr is not None:
            raise SetupError(f"lr={lr!r} was given beside an Optimizer instance, whose own rates count: give only one")
        made = optimizer
    elif isinstance(optimizer, (list, tuple, dict)):
        raise SetupError(
            f"{len(optimizer)} optimizers were given: autoaccum trains with one; "
            "use parameter groups of a single optimizer, or the Accumulator once per optimizer"
        )
    else:
        made = _make(optimizer, trained_parameters(model, loss), 1e-3 if lr is None else lr)
    check_optimizer(made, model, loss)
    return made


def _make(optimizer: str | Callable[..., Optimizer], parameters: list[nn.Parameter], lr: float) -> Optimizer:
    factory: Any = optimizer
    if isinstance(optimizer, str):
        factory = _NAMED.get(optimizer.lower())
        if factory is None:
            raise SetupError(
                f"optimizer={optimizer!r} is not in torch.optim: choose one of {', '.join(sorted(_NAMED))}"
            )
    if not callable(factory):
        raise SetupError(f"optimizer={optimizer!r} is not an Optimizer, a factory f(params, lr=lr) or a torch name")
    _refuse_closure(factory)
    try:
        made = factory(parameters, lr=lr)
    except ValueError as error:
        named = repr(optimizer) if isinstance(optimizer, str) else getattr(optimizer, "__name__", "its factory")
        raise SetupError(
            f"optimizer={named} refuses this model's parameters or its lr={lr!r}: {error}; choose another, or make one "
            "for these parameters and pass it"
        ) from error
    if not isinstance(made, Optimizer):
        raise SetupError(f"the optimizer factory returned {type(made).__name__}, not a torch.optim.Optimizer")
    return made


def trained_parameters(model: nn.Module, loss: Any = None) -> list[nn.Parameter]:
    """The parameters that require gradients, of the model and of a loss that is a module."""
    modules = [model, loss] if isinstance(loss, nn.Module) else [model]
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def optimizer_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """The optimizer's parameters over all its groups, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_model(
    model: nn.Module, *, loss: Any = None, clip_norm: float | None = None, log_grad_norm: bool = False
) -> None:
    """Refuses a model that cannot be trained here, or not with these settings of `fit`.

    Raises:
        SetupError: not a module, nothing to train, parameters that are sharded or hold no numbers, a norm that is none,
            sparse gradients whose norm is wanted.
    """
    if not isinstance(model, nn.Module):
        raise SetupError(f"model is {type(model).__name__}, not a torch.nn.Module: pass the module itself")
    parameters = trained_parameters(model, loss)
    if not parameters:
        raise SetupError(
            f"{type(model).__name__} has no parameter that requires a gradient, so there is nothing to train: "
            "unfreeze what should learn with parameter.requires_grad_(True)"
        )
    _refuse_sharded(model, parameters)
    _refuse_meta(model)
    if clip_norm is not None and (isinstance(clip_norm, bool) or not isinstance(clip_norm, Real) or not clip_norm > 0):
        raise SetupError(f"clip_norm={clip_norm!r}: give a norm above 0, or None to leave gradients as they are")
    if clip_norm is not None or log_grad_norm:
        setting = "log_grad_norm=True" if clip_norm is None else f"clip_norm={clip_norm}"
        _refuse_sparse(model, setting)


def check_optimizer(optimizer: Optimizer, model: nn.Module, loss: Any = None) -> None:
    """Refuses an optimizer that cannot be stepped once a window, or that trains something else.

    Raises:
        SetupError: it needs a closure, or holds parameters that are not the model's.
    """
    _refuse_closure(type(optimizer))
    known = {
        id(parameter) for module in (model, loss) if isinstance(module, nn.Module) for parameter in module.parameters()
    }
    held = optimizer_parameters(optimizer)
    foreign = sum(id(parameter) not in known for parameter in held)
    if foreign:
        raise SetupError(
            f"{foreign} of the optimizer's {len(held)} parameters are not the model's: it was made for another model "
            "or before the model was copied; make it from model.parameters()"
        )
    if not any(parameter.requires_grad for parameter in held):
        raise SetupError(
            f"none of the optimizer's {len(held)} parameters requires a gradient: there is nothing to train"
        )


def _refuse_closure(kind: Any) -> None:
    step = getattr(kind, "step", None)
    if step is None:
        return
    closure = inspect.signature(step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise SetupError(
            f"{kind.__name__} needs a closure that evaluates the whole batch several times a step, which accumulation "
            "cannot give it: use a first-order optimizer such as AdamW or SGD"
        )


def _refuse_meta(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise SetupError(
                f"{name} of {type(model).__name__} is on the meta device, which holds no numbers: build the model on a "
                'real one, or take model.to_empty(device="cpu") and load its weights'
            )


def _refuse_sparse(model: nn.Module, setting: str) -> None:
    sparse = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
    ]
    if sparse:
        raise SetupError(
            f"{setting} beside sparse gradients (of {', '.join(sparse)}): torch cannot take their norm; "
            f"make those embeddings with sparse=False, or leave {setting.partition('=')[0]} out"
        )


def _refuse_sharded(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    kinds = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    kinds |= {type(parameter).__name__ for parameter in parameters if not isinstance(parameter, UninitializedParameter)}
    found = sorted(kinds.intersection((*_SHARDED, "DTensor")))
    if found:
        raise SetupError(
            f"the model's parameters are sharded ({', '.join(found)}), which autoaccum does not support yet: "
            "train it unsharded, or on several ranks with a whole model on each"
        )
