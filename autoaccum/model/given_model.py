"""The model as it was given: what it is wrapped in, where and in what mode it is, and what of it is not there yet."""

import os
from typing import Any

import torch
from torch import nn
from torch.nn import parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from autoaccum.errors import SetupError
from autoaccum.model.shards import local
from autoaccum.ranks import Ranks

__all__ = [
    "TrainingMode",
    "check_gradients_are_on",
    "device_of",
    "follow",
    "has_batch_norm",
    "is_lazy",
    "layer_class",
    "unwrapped",
]


def unwrapped(model: Any) -> Any:
    """The module inside DistributedDataParallel: gradients are summed once a window here, not in each backward."""
    if isinstance(model, DataParallel):
        raise SetupError(
            "the model is wrapped in DataParallel, which splits every micro-batch over the GPUs of one process: "
            "pass the model inside it, and start one process for each GPU with torchrun"
        )
    return model.module if isinstance(model, DistributedDataParallel) else model


def device_of(model: Any, ranks: Ranks) -> torch.device | None:
    """Where the model already is, if that is an accelerator; else the rank's own; else None, for the best there is."""
    first = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
    if first is not None and (first.device.type not in ("cpu", "meta") or local(first) is not first):
        return first.device
    if ranks.size > 1 and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", ranks.rank % torch.cuda.device_count())))
    return None


def check_gradients_are_on() -> None:
    """Refuses to go on where gradients are switched off, with a SetupError."""
    if not torch.is_grad_enabled():
        raise SetupError(
            "gradients are switched off here, by torch.no_grad(), torch.inference_mode() or "
            "torch.set_grad_enabled(False), and without them nothing can be trained: call this outside of it"
        )


def is_lazy(model: Any) -> bool:
    """Whether parameters or buffers wait for a first forward to take their shapes."""
    return isinstance(model, nn.Module) and any(map(parameter.is_lazy, (*model.parameters(), *model.buffers())))


def layer_class(module: nn.Module) -> type:
    """The module's class; that of torch.nn which it was compiled from, where it is TorchScript."""
    if not isinstance(module, torch.jit.ScriptModule):
        return type(module)
    original = getattr(nn, module.original_name, None)
    return original if isinstance(original, type) else type(module)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a layer may need two samples in a micro-batch."""
    return any(issubclass(layer_class(module), _BatchNorm) for module in model.modules())


def follow(optimizer: Optimizer) -> None:
    """Moves the state of an optimizer that was used before the model moved to where the parameters are now."""
    held = ((owner, value) for owner, state in optimizer.state.items() for value in state.values())
    if any(isinstance(value, torch.Tensor) and value.dim() and value.device != owner.device for owner, value in held):
        optimizer.load_state_dict(optimizer.state_dict())


class TrainingMode:
    """Puts a model into training mode and back.

    Modules in evaluation mode inside a model in training mode were put there by their owner, to freeze their
    statistics, and stay so. A model that is in evaluation mode as a whole, as pretrained ones come, is trained as a
    whole.
    """

    def __init__(self, model: nn.Module) -> None:
        """Looks at the modes as they are; changes none."""
        self._model = model
        resting = [module for module in model.modules() if not module.training]
        self._frozen, self._asleep = (resting, []) if model.training else ([], resting)

    def on(self) -> None:
        """Training mode; a model's own `train` has its say."""
        self._model.train()
        for module in self._frozen:
            module.training = False

    def keep(self) -> None:
        """Puts training mode on again, where somebody has put the whole model into evaluation mode meanwhile."""
        if not self._model.training:
            self.on()

    def back(self) -> None:
        """Evaluation mode for what was in it when the whole model was."""
        for module in self._asleep:
            module.training = False
