"""A model made a function of its samples alone, for as long as its gradient is compared with itself.

Choices made here:

- Dropout is off: RNNs by their attribute, everything else through a function mode, which sees functional dropout and
  the `dropout_p` of attention whatever module calls them. Rectifiers with random slopes take their mean slope.
- The function mode does not see into TorchScript, whose layers of the same kinds are in evaluation mode instead.
- BatchNorm normalises by its running statistics. In training it normalises by the micro-batch, which makes the
  gradient of a split batch another one, rightly; that difference would hide all others.
- What is still drawn at random (noise of an autoencoder, diffusion times, stochastic depth) stays on, and belongs to
  its sample (sample_noise.py).
- Generators, buffers and all else that modules hold are put back before each micro-batch, so that no micro-batch sees
  another's counters, caches, codebooks or power iterations.
"""

import inspect
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from autoaccum.data import tree
from autoaccum.loss.objective import Objective
from autoaccum.model.given_model import layer_class
from autoaccum.model.snapshot import Snapshot
from autoaccum.random_state import seed_everything
from autoaccum.window.passes import run_engine
from autoaccum.window.sample_noise import SampleNoise

__all__ = ["Determinism", "settle_loss"]


class Determinism(ExitStack):
    """A context in which a model gives each sample the same, in whatever micro-batch it comes.

    `begin` is called before each micro-batch; before the whole batch, which comes first, with all of its samples.

    Attributes:
        noise: what was seen of random draws, and of the formats that were computed in, forward and backward.
        normalises: there are BatchNorm layers that train, and are held to their running statistics.
    """

    def __init__(self, model: nn.Module, *others: nn.Module, samples: int, device: torch.device) -> None:
        """Changes nothing until it is entered; `others` are modules beside the model, as a loss may be."""
        super().__init__()
        self._roots, self._device = (model, *others), device
        self.noise = SampleNoise(samples)
        self.normalises = False

    def __enter__(self) -> "Determinism":
        with ExitStack() as stack:
            self._switch(stack)
            self._start = Snapshot(*self._roots, device=self._device, parameters=False)
            stack.callback(self._start.close)
            stack.callback(self._restart)
            if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
                # Modes make compiled code skip itself, which fullgraph=True takes for an error.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self.noise)
            stack.enter_context(_Functions())
            self.push(stack.pop_all())
        return self

    def begin(self, rows: Sequence[int], *, seed: int | None = None) -> None:
        """Puts the model back to the start, for a micro-batch with the samples at these places of the whole batch.

        With a `seed` other numbers are drawn than the generators would give.
        """
        self._restart()
        self.noise.rows = list(rows)
        if seed is not None:
            seed_everything(seed)

    def _restart(self) -> None:
        self._start.restore()
        self.noise.restart()

    def _switch(self, stack: ExitStack) -> None:
        """Training mode, but for what normalises over the batch; no dropout between the layers of an RNN."""
        modules = list(dict.fromkeys(module for root in self._roots for module in root.modules()))
        for module in modules:
            stack.callback(setattr, module, "training", module.training)
        self._roots[0].train()  # as training will: models may keep parts of theirs in evaluation mode
        for module in modules:
            kind, scripted = layer_class(module), isinstance(module, torch.jit.ScriptModule)
            if issubclass(kind, _BatchNorm):
                self.normalises = self.normalises or module.training
            if issubclass(kind, _BatchNorm) or (scripted and issubclass(kind, _RANDOM_LAYERS)):
                module.training = False
            elif isinstance(module, nn.RNNBase) and not scripted:
                stack.callback(setattr, module, "dropout", module.dropout)
                module.dropout = 0.0


_RANDOM_LAYERS = (_DropoutNd, nn.MultiheadAttention, nn.RReLU)
_DROPOUTS = {
    functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, functional.alpha_dropout,
    functional.feature_alpha_dropout, torch.dropout, torch.dropout_, torch.alpha_dropout, torch.alpha_dropout_,
    torch.feature_dropout, torch.feature_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_,
}  # fmt: skip
# The argument to replace: its name, its place, its value.
_ARGUMENTS: dict[Any, tuple[str, int, Any]] = {
    functional.scaled_dot_product_attention: ("dropout_p", 4, 0.0),
    functional.multi_head_attention_forward: ("dropout_p", 10, 0.0),
    functional.rrelu: ("training", 3, False),
    torch.rrelu: ("training", 3, False),
    torch.rrelu_: ("training", 3, False),
}


class _Functions(TorchFunctionMode):
    """Takes dropout out of calls, and gives BatchNorm running statistics to normalise by."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func in (Tensor.backward, torch.autograd.backward) and len(args) == 1:
            begin = kwargs.get("grad_tensors")
            if all(value is None or value is False for name, value in kwargs.items() if name != "grad_tensors"):
                with self:  # activation checkpointing runs forwards in there, which must see this mode too
                    return _backward(args[0], begin)
        if func is functional.batch_norm:
            args, kwargs = (), _by_running_statistics(*args, **kwargs)
        elif func in _ARGUMENTS:
            name, place, value = _ARGUMENTS[func]
            if place < len(args):
                args = (*args[:place], value, *args[place + 1 :])
            else:
                kwargs = {**kwargs, name: value}
        return func(*args, **kwargs)


def _backward(losses: Any, begin: Any) -> None:
    """The backward pass without asking the mode again, which torch's own two functions do."""
    losses = (losses,) if isinstance(losses, Tensor) else tuple(losses)
    given = (begin,) * len(losses) if begin is None or isinstance(begin, Tensor) else tuple(begin)
    run_engine(losses, [torch.ones_like(loss) if at is None else at for loss, at in zip(losses, given)])


def _by_running_statistics(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """`functional.batch_norm`'s arguments, without statistics of the batch; a layer that keeps none gets 0 and 1."""
    given = inspect.signature(functional.batch_norm).bind(*args, **kwargs).arguments
    if given["running_mean"] is None or given["running_var"] is None:
        channels, device = given["input"].shape[1], given["input"].device
        given["running_mean"] = torch.zeros(channels, device=device)
        given["running_var"] = torch.ones(channels, device=device)
    return {**given, "training": False}


def settle_loss(objective: Objective, batch: Any, most: int, device: torch.device) -> None:
    """Settles the divisor of the loss, on at most `most` samples of `batch`, on the host; the model stays as it is."""
    samples = min(most, tree.batch_size(batch))
    with Determinism(*objective.modules, samples=samples, device=device) as fixed:
        objective.settle([batch], samples, fixed.begin)
