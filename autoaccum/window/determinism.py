"""A model made a function of its samples alone, for as long as its gradient is compared with itself.

Choices made here:

- Dropout is off: RNNs by their attribute, everything else through a function mode, which sees functional dropout and
  the `dropout_p` of attention whatever module calls them. Rectifiers with random slopes take their mean slope.
- BatchNorm normalises by its running statistics. In training it normalises by the micro-batch, which makes the
  gradient of a split batch another one, rightly; that difference would hide all others.
- What is still drawn at random (noise of an autoencoder, diffusion times, stochastic depth) stays on, and belongs to
  its sample: a dispatch mode sees every draw, also those inside torch. In the first run over the whole batch it notes
  the shapes. A micro-batch, whose draw is smaller along one dimension, then gets its samples' rows of the draw that
  the whole batch would make. Random generators move as they would there, so later draws agree as well.
- Generators, buffers and plain attributes of modules are put back before each micro-batch, so that no micro-batch sees
  another's counters, caches, codebooks or power iterations.
"""

import copy
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autoaccum.window.snapshot import RandomState

__all__ = ["Determinism"]

_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules"})


class Determinism:
    """A context in which a model gives each sample the same, in whatever micro-batch it comes.

    ```python
    with Determinism([model], samples=8, device=device) as fixed:
        fixed.begin(range(8))       # before the whole batch, which comes first
        ...
        fixed.begin(range(5))       # before a micro-batch with the first five of its samples
    ```

    Attributes:
        normalises: BatchNorm layers were held to their running statistics.
        unexplained: a draw was seen that could not be given to single samples.
    """

    def __init__(self, modules: Iterable[nn.Module], *, samples: int, device: torch.device) -> None:
        """Looks at the modules; changes nothing until it is entered.

        Args:
            modules: the model, and a loss that is a module.
            samples: of the whole batch.
            device: whose generator is fixed beside the CPU's.
        """
        self._modules = list(dict.fromkeys(module for root in modules for module in root.modules()))
        self._device = device
        self._functions = _Functions()
        self._draws = _Draws(samples)
        self._stack = ExitStack()
        self.normalises = False

    def __enter__(self) -> "Determinism":
        with ExitStack() as stack:
            for module in self._modules:
                self._switch(stack, module)
            self._start = _Start(self._modules, self._device)
            stack.callback(self._restart)
            if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
                # Compiled code would not see the modes. (It is traced without them by torch < 2.6.)
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self._draws)
            stack.enter_context(self._functions)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    @property
    def unexplained(self) -> bool:
        """Whether a draw was seen that could not be given to single samples."""
        return self._draws.unexplained

    def begin(self, rows: Sequence[int], *, seed: int | None = None) -> None:
        """Puts the model back to the start, for a micro-batch with these samples.

        Args:
            rows: their places in the whole batch.
            seed: draw other numbers than the generators would give.
        """
        self._restart()
        self._draws.rows = list(rows)
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            numpy = sys.modules.get("numpy")
            if numpy is not None and hasattr(numpy, "random"):
                numpy.random.seed(seed)

    def _restart(self) -> None:
        self._start.restore()
        self._draws.restart()

    def _switch(self, stack: ExitStack, module: nn.Module) -> None:
        """Training mode, but for what normalises over the batch; no dropout between the layers of an RNN."""
        training = not isinstance(module, _BatchNorm)
        self.normalises = self.normalises or not training
        stack.callback(setattr, module, "training", module.training)
        module.training = training
        if isinstance(module, nn.RNNBase) and not isinstance(module, torch.jit.ScriptModule):
            stack.callback(setattr, module, "dropout", module.dropout)
            module.dropout = 0.0


class _Start:
    """Buffers, plain attributes and random generators as they were."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._modules = [(module, _plain(module), dict(module._buffers)) for module in modules]
        buffers = {id(b): b for module in modules for b in module._buffers.values() if b is not None and not is_lazy(b)}
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in buffers.values()]
        self._random = RandomState(device)

    def restore(self) -> None:
        for module, plain, buffers in self._modules:
            for name in [name for name in vars(module) if name not in plain and name not in _REGISTRIES]:
                del module.__dict__[name]
            for name, (value, contents) in plain.items():
                _refill(value, contents)
                module.__dict__[name] = value
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, saved in self._buffers:
                buffer.copy_(saved)
        self._random.restore()


def _plain(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What a module holds besides its registries; of containers their contents too, which are changed in place."""
    return {
        name: (value, copy.copy(value) if type(value) in (list, dict, set) else None)
        for name, value in vars(module).items()
        if name not in _REGISTRIES
    }


def _refill(container: Any, contents: Any) -> None:
    if contents is not None:
        container.clear()
        container.extend(contents) if isinstance(container, list) else container.update(contents)


# --- functions whose behaviour in training is not that of the samples alone -------------------------------------------

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
        if func is Tensor.backward and len(args) == 1 and all(v is None or v is False for v in kwargs.values()):
            with self:  # activation checkpointing runs forwards in there, which must see this mode too
                return _backward(args[0])
        if func is functional.batch_norm:
            args, kwargs = _by_running_statistics(*args, **kwargs)
        elif func in _ARGUMENTS:
            name, place, value = _ARGUMENTS[func]
            if place < len(args):
                args = (*args[:place], value, *args[place + 1 :])
            else:
                kwargs = {**kwargs, name: value}
        return func(*args, **kwargs)


def _backward(loss: Tensor) -> None:
    """`loss.backward()` without asking the mode again, which torch's own two functions do."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _by_running_statistics(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`functional.batch_norm`'s arguments, without statistics of the batch; a layer that keeps none gets 0 and 1."""
    if running_mean is None or running_var is None:
        running_mean = torch.zeros(input.shape[1], device=input.device)
        running_var = torch.ones(input.shape[1], device=input.device)
    return (input, running_mean, running_var, weight, bias, False, momentum, eps), {}


# --- draws -----------------------------------------------------------------------------------------------------------

_Draw = Callable[[Sequence[int]], Tensor]  # the shape -> random numbers
_aten = torch.ops.aten


def _overloads(*names: str) -> set[Any]:
    """The overloads of these operators that exist in this torch, without those which write to `out`."""
    packets = [getattr(_aten, name) for name in names if hasattr(_aten, name)]
    found = {(packet, overload) for packet in packets for overload in packet.overloads()}
    return {getattr(packet, overload) for packet, overload in found if not overload.endswith("out")}


_FILLS = _overloads(
    "uniform_", "normal_", "exponential_", "log_normal_", "cauchy_", "geometric_", "random_", "bernoulli_"
) - {_aten.bernoulli_.Tensor}  # fmt: skip
_LIKES = _overloads("rand_like", "randn_like", "randint_like") | {_aten.bernoulli.p}
_SIZED = _overloads("rand", "randn", "randint") | {_aten.normal.float_float}
_CHANCES = {_aten.bernoulli.default, _aten.bernoulli_.Tensor}
_NORMALS = {_aten.normal.Tensor_Tensor, _aten.normal.Tensor_float, _aten.normal.float_Tensor}
# Of these, one sample's part cannot be told from the outside.
_OPAQUE = _overloads("multinomial", "randperm", "poisson", "binomial", "_standard_gamma", "_sample_dirichlet")


class _Draws(TorchDispatchMode):
    """Gives each micro-batch its samples' rows of what the whole batch would draw."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.rows = list(range(samples))
        self.unexplained = False
        self._samples = samples
        # By the state of the generator before a draw, which is the same in the whole batch and in its micro-batches,
        # and when activation checkpointing runs a forward again.
        self._shapes: dict[Any, tuple[int, ...]] = {}
        self._dims: dict[Any, int] = {}
        self._own: dict[int, tuple[torch.Generator, Tensor]] = {}

    def restart(self) -> None:
        """Puts generators that the model brought itself back to where they were first seen."""
        for generator, state in self._own.values():
            generator.set_state(state)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            target = args[0]
            return target.copy_(self._draw(target, kwargs, _like(func, args, kwargs)))
        if func in _LIKES:
            return self._draw(args[0], kwargs, _like(func, args, kwargs))
        if func in _SIZED:
            return self._sized(func, args, kwargs)
        if func in _CHANCES:
            chance = args[-1]
            drawn = self._draw(args[0], kwargs, _standard(torch.rand, args[0], kwargs)) < chance
            return args[0].copy_(drawn) if len(args) > 1 else drawn.to(chance.dtype)
        if func in _NORMALS:
            mean, std = (*args, 1.0)[:2]
            spread = torch.as_tensor(mean) + torch.zeros_like(torch.as_tensor(std))
            return mean + std * self._draw(spread, kwargs, _standard(torch.randn, spread, kwargs))
        if func is _aten.native_dropout.default and args[2] is not False and 0 < args[1] < 1:
            keep = self._draw(args[0], {}, _standard(torch.rand, args[0], {})) >= args[1]
            return args[0] * keep / (1 - args[1]), keep
        self.unexplained = self.unexplained or func in _OPAQUE
        return func(*args, **kwargs)

    def _sized(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        place = next(i for i, argument in enumerate(func._schema.arguments) if argument.name == "size")
        device = torch.device(kwargs.get("device") or "cpu")

        def draw(shape: Sequence[int]) -> Tensor:
            drawn: Tensor = func(*args[:place], list(shape), *args[place + 1 :], **kwargs)
            return drawn

        return self._rows_of(self._key(device, kwargs), tuple(args[place]), draw)

    def _draw(self, like: Tensor, kwargs: Any, draw: _Draw) -> Tensor:
        return self._rows_of(self._key(like.device, kwargs), tuple(like.shape), draw)

    def _rows_of(self, key: Any, shape: tuple[int, ...], draw: _Draw) -> Tensor:
        count = len(self.rows)
        if count == self._samples:
            whole = self._shapes.setdefault(key, shape)
        else:
            whole = self._shapes.get(key, ())
        if count < self._samples and shape != whole:
            dims = [dim for dim in range(len(shape)) if _scaled(shape, whole, dim, count, self._samples)]
            if len(dims) != 1:
                self.unexplained = True
                return draw(shape)
            self._dims[key] = dims[0]
        elif shape != whole:
            self.unexplained = True
            return draw(shape)
        dim = self._dims.get(key)
        if dim is None or self.rows == list(range(self._samples)):
            return draw(shape)
        drawn = draw(whole).unflatten(dim, (self._samples, -1))
        rows = torch.tensor(self.rows, device=drawn.device)
        return drawn.index_select(dim, rows).flatten(dim, dim + 1)

    def _key(self, device: torch.device, kwargs: Any) -> tuple[Any, ...]:
        generator = kwargs.get("generator")
        if generator is not None:
            state = generator.get_state()
            self._own.setdefault(id(generator), (generator, state))
        elif device.type == "cpu":
            state = torch.get_rng_state()
        else:
            state = torch.get_device_module(device).get_rng_state(device)
        # A number for the state: a sum with weights, which wraps around as a hash may.
        weights = torch.arange(1, state.numel() + 1, dtype=torch.int64) * 0x9E3779B97F4A7C1
        return str(device), id(generator), int((state.long() * weights).sum())


def _like(func: Any, args: Any, kwargs: Any) -> _Draw:
    """Draws as `func` would for its first argument, in other shapes."""

    def draw(shape: Sequence[int]) -> Tensor:
        drawn: Tensor = func(args[0].new_empty(shape), *args[1:], **kwargs)
        return drawn

    return draw


def _standard(draw: Callable[..., Tensor], like: Tensor, kwargs: Any) -> _Draw:
    """Draws standard numbers, on the device and in the precision of `like`."""
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    generator = kwargs.get("generator")
    return lambda shape: draw(list(shape), dtype=dtype, device=like.device, generator=generator)


def _scaled(shape: Sequence[int], whole: Sequence[int], dim: int, count: int, samples: int) -> bool:
    """Whether `shape` is `whole`, but that `dim` has `count` samples instead of `samples`."""
    if len(shape) != len(whole) or shape[dim] * samples != whole[dim] * count:
        return False
    return all(own == other for place, (own, other) in enumerate(zip(shape, whole)) if place != dim)
