"""The optimizer the user named, made and checked before anything runs.

What cannot be trained by accumulating gradients is refused here, with the reason, while the model is untouched.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from autoaccum.checks import is_positive
from autoaccum.errors import SetupError, shown
from autoaccum.model.shards import check_shards
from autoaccum.ranks import Ranks

__all__ = [
    "DEFAULT_LR",
    "FirstBackward",
    "build_optimizer",
    "check_model",
    "check_no_gradient",
    "check_optimizer",
    "check_ranks",
    "check_schedule",
    "optimizer_name",
    "optimizer_parameters",
    "trained_parameters",
]

_NAMED = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
}
DEFAULT_LR = 1e-3


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
            raise SetupError(
                f"lr={shown(lr)} was given beside an Optimizer instance, whose own rates count: give only one"
            )
        made = optimizer
    else:
        made = _make(optimizer, trained_parameters(model, loss), DEFAULT_LR if lr is None else lr)
    check_optimizer(made, model, loss)
    return made


def _make(optimizer: str | Callable[..., Optimizer], parameters: list[nn.Parameter], lr: float) -> Optimizer:
    if isinstance(optimizer, (list, tuple, dict)):
        raise SetupError(
            f"optimizer= is a {type(optimizer).__name__} of {len(optimizer)}, as configure_optimizers returns it, and "
            "one optimizer is trained with: pass that itself, its schedule as schedule=f(optimizer), and several with "
            "what each steps as phases=[Phase(...)]"
        )
    factory: Any = _NAMED.get(optimizer.lower()) if isinstance(optimizer, str) else optimizer
    if not callable(factory) or isinstance(factory, nn.Module):
        raise SetupError(
            f"optimizer={shown(optimizer)}: give an Optimizer, a factory f(params, lr=lr), or the name of one in "
            f"torch.optim: {', '.join(sorted(_NAMED))}"
        )
    _refuse_closure(factory)
    try:
        made = factory(parameters, lr=lr)
    except (TypeError, ValueError) as error:
        raise SetupError(
            f"optimizer={shown(optimizer)} refuses f(params, lr=lr) with this model's parameters and lr={shown(lr)}: "
            f"{error}; give another, or a function of these, such as "
            "lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9)"
        ) from error
    if not isinstance(made, Optimizer):
        raise SetupError(f"the optimizer factory returned {type(made).__name__}, not a torch.optim.Optimizer")
    return made


def trained_parameters(model: nn.Module, loss: Any = None) -> list[nn.Parameter]:
    """The parameters that require gradients, of the model and of a loss that is a module."""
    modules = [model, loss] if isinstance(loss, nn.Module) else [model]
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def check_no_gradient(parameters: Iterable[nn.Parameter]) -> None:
    """Refuses gradients that would enter a window's sum, with a SetupError."""
    if [parameter for parameter in parameters if parameter.grad is not None]:
        raise SetupError(
            "a gradient stands before the window's first backward, and would enter its sum: "
            "call optimizer.zero_grad(set_to_none=True) before the window"
        )


def optimizer_name(optimizer: Optimizer) -> str:
    """Its class, and how many parameters each of its groups has."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    groups = f"{sizes[0]} parameters" if len(sizes) == 1 else f"groups of {', '.join(map(str, sizes))} parameters"
    return f"{type(optimizer).__name__} with {groups}"


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
    check_shards(model, (parameter for parameter in parameters if not isinstance(parameter, UninitializedParameter)))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise SetupError(
                f"{name} of {type(model).__name__} is on the meta device, which holds no numbers: build the model on a "
                'real one, or take model.to_empty(device="cpu") and load its weights'
            )
    if clip_norm is not None and not is_positive(clip_norm):
        raise SetupError(f"clip_norm={shown(clip_norm)}: give a norm above 0, or None to leave gradients as they are")
    if clip_norm is not None or log_grad_norm:
        setting = "log_grad_norm=True" if clip_norm is None else f"clip_norm={clip_norm}"
        if sparse := _sparse_weights(model):
            raise SetupError(
                f"{setting} beside sparse gradients (of {', '.join(sparse.values())}): torch cannot take their norm; "
                f"make those embeddings with sparse=False, or leave {setting.partition('=')[0]} out"
            )


def check_optimizer(optimizer: Optimizer, model: nn.Module, loss: Any = None) -> None:
    """Refuses an optimizer that cannot be stepped once a window, or that trains something else.

    Raises:
        SetupError: it needs a closure, or holds parameters that are not the model's.
    """
    if not isinstance(getattr(optimizer, "param_groups", None), list) or not hasattr(optimizer, "step"):
        raise SetupError(f"optimizer={shown(optimizer)} is no optimizer: give one, such as AdamW(model.parameters())")
    _refuse_closure(type(optimizer))
    modules = [module for module in (model, loss) if isinstance(module, nn.Module)]
    known = {id(parameter) for module in modules for parameter in module.parameters()}
    held = optimizer_parameters(optimizer)
    foreign = sum(id(parameter) not in known for parameter in held)
    if foreign:
        raise SetupError(
            f"{foreign} of the optimizer's {len(held)} parameters are not the model's: it was made for another model "
            "or before the model was copied; make it from model.parameters()"
        )
    _refuse_layout(optimizer, {id(parameter) for parameter in held}, _sparse_weights(model))
    if not any(parameter.requires_grad for parameter in held):
        raise SetupError(
            f"none of the optimizer's {len(held)} parameters requires a gradient: there is nothing to train"
        )


# Of torch's optimizers these alone step a parameter whose gradient is sparse, and SparseAdam steps no other.
_TAKES_SPARSE = ("SGD", "Adagrad", "SparseAdam")


def _refuse_layout(optimizer: Optimizer, held: set[int], sparse: Mapping[int, str], dense: Sequence[str] = ()) -> None:
    """Refuses one of torch's optimizers, whose parameters have the ids `held`, beside gradients that it cannot step.

    `sparse` names parameters whose gradients are sparse, by id; `dense` names such whose gradients are not.
    """
    kind = next((base.__name__ for base in type(optimizer).__mro__ if base in _NAMED.values()), None)
    names = [name for own, name in sparse.items() if own in held]
    if kind is not None and kind not in _TAKES_SPARSE and names:
        raise SetupError(
            f"{kind} does not step sparse gradients, and those of {', '.join(names[:4])} are sparse: make the "
            'embedding with sparse=False, or choose optimizer="sgd" or "adagrad", which step both'
        )
    if kind == "SparseAdam" and dense:
        raise SetupError(
            f"SparseAdam steps sparse gradients only, and those of {', '.join(dense[:4])} are not: choose "
            'optimizer="adamw" without sparse embeddings, or "sgd" or "adagrad", which step both'
        )


def _sparse_weights(model: nn.Module) -> dict[int, str]:
    """The weights of layers that say that their gradients are sparse, by id."""
    return {
        id(module.weight): f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
    }


class FirstBackward:
    """What the first backward pass did, held against what an optimizer can be stepped with once a window.

    An optimizer that is stepped from a hook on the gradients (optimizer-in-backward) makes each micro-batch a step of
    its own, and leaves no gradient to accumulate.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        """To be made before that pass: keeps how often each parameter was written to, and those that have hooks."""
        self._optimizer = optimizer
        self._named = dict(model.named_parameters())
        self._versions = {name: parameter._version for name, parameter in self._named.items()}
        hooked = (p for p in self._named.values() if getattr(p, "_post_accumulate_grad_hooks", None))
        self._before = [(parameter, parameter.detach().clone()) for parameter in hooked]

    def check(self) -> None:
        """Refuses what cannot be trained so; parameters that hooks have stepped are put back.

        Raises:
            SetupError: parameters changed during the pass, or hooks took the gradients; or the optimizer does not take
                gradients of this layout.
        """
        changed = [name for name, parameter in self._named.items() if parameter._version != self._versions[name]]
        held = {id(parameter) for parameter in optimizer_parameters(self._optimizer)}
        found = {name: p for name, p in self._named.items() if p.grad is not None and id(p) in held}
        if changed or (self._before and not found):
            with torch.no_grad():
                for parameter, value in self._before:
                    parameter.copy_(value)
            what = f"{', '.join(changed[:4])} changed" if changed else "the gradients were taken away"
            raise SetupError(
                f"{what} during the backward pass: a hook steps an optimizer there "
                "(register_post_accumulate_grad_hook), so that each micro-batch would be a step of its own: take the "
                "hooks off (handle.remove()), and pass the optimizer, which is stepped once a window"
            )
        sparse = {id(p): name for name, p in found.items() if p.grad is not None and p.grad.is_sparse}
        dense = [name for name, p in found.items() if id(p) not in sparse]
        _refuse_layout(self._optimizer, held, sparse, dense)


def _refuse_closure(kind: Any) -> None:
    step = getattr(kind, "step", None)
    closure = None if step is None else inspect.signature(step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise SetupError(
            f"{kind.__name__} needs a closure that evaluates the whole batch several times a step, which accumulation "
            "cannot give it: use a first-order optimizer such as AdamW or SGD"
        )


def check_schedule(scheduler: Any) -> None:
    """Refuses a schedule that wants a loss, ReduceLROnPlateau, with a SetupError."""
    if isinstance(scheduler, ReduceLROnPlateau):
        raise SetupError(
            "ReduceLROnPlateau wants a loss at each step, and a schedule here takes one step a window: call its "
            "step(loss) yourself after each epoch, such as in a callback that gets EpochEnded"
        )


def check_ranks(rank: int, world_size: int, ranks: Ranks) -> None:
    """Refuses a plan that is for another rank, or for another number of them, with a SetupError."""
    if (rank, world_size) != (ranks.rank, ranks.size):
        raise SetupError(
            f"the plan is for rank {rank} of {world_size}, and this is rank {ranks.rank} of {ranks.size}: call "
            "torch.distributed.init_process_group() first where there are several, and make the plan with their "
            "world_size and rank"
        )
