"""Random numbers that belong to their samples, whatever micro-batch these come in.

A dispatch mode sees every draw, also those inside torch. In the first run, over the whole batch, it notes their shapes.
A micro-batch, whose draw is smaller along one dimension, then gets its samples' rows of the draw that the whole batch
would make. Generators move as they would there, so that later draws agree as well. Draws are told apart by the state of
the generator before them, which is the same in the whole batch, in its micro-batches, and where activation
checkpointing runs a forward again. What is drawn alike for all samples (a layer that is left out) stays as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["SampleNoise"]

_Draw = Callable[[Sequence[int]], Tensor]  # a shape -> random numbers
_aten = torch.ops.aten


class SampleNoise(TorchDispatchMode):
    """While it is entered, each micro-batch gets its samples' rows of what the whole batch would draw.

    Attributes:
        rows: the places in the whole batch of the samples that run; set before each micro-batch.
        unexplained: a draw was seen that could not be given to single samples.
        formats: the floating-point formats that were computed in.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.formats: set[torch.dtype] = set()
        self.rows: Sequence[int] = range(samples)
        self.unexplained = False
        self._samples = samples
        self._shapes: dict[Any, tuple[int, ...]] = {}
        self._dims: dict[Any, int] = {}
        self._own: dict[int, tuple[torch.Generator, Tensor]] = {}

    def restart(self) -> None:
        """Puts generators that the model brought itself back to where they were first seen."""
        for generator, state in self._own.values():
            generator.set_state(state)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _CASTS:
            self.formats.update(arg.dtype for arg in args if isinstance(arg, Tensor) and arg.is_floating_point())
        if func is torch.ops.aten._local_scalar_dense.default and not isinstance(args[0], Tensor):
            return args[0]  # a number that the graph has kept as a tensor comes here as the number itself
        handler = _HANDLERS.get(func)
        if handler is None:
            self.unexplained = self.unexplained or func in _OPAQUE
            return func(*args, **(kwargs or {}))
        made = handler(self, func, args, kwargs or {})
        return args[0].copy_(made) if func._schema.is_mutable else made

    def drawn(self, shape: Sequence[int], device: torch.device, generator: Any, draw: _Draw) -> Tensor:
        """Random numbers for the samples that run, where `shape` was asked for; `draw` draws in any shape."""
        key, shape, count = self._key(device, generator), tuple(shape), len(self.rows)
        whole = self._shapes.setdefault(key, shape) if count == self._samples else self._shapes.get(key, ())
        if shape != whole:
            dims = [dim for dim in range(len(shape)) if _scaled(shape, whole, dim, count, self._samples)]
            if len(dims) != 1 or count == self._samples:
                self.unexplained = True
                return draw(shape)
            self._dims[key] = dims[0]
        dim = self._dims.get(key)
        if dim is None:
            return draw(shape)
        samples = draw(whole).movedim(dim, 0).reshape(self._samples, -1)
        rows = torch.tensor(list(self.rows), device=samples.device)
        moved = (shape[dim], *shape[:dim], *shape[dim + 1 :])
        return samples.index_select(0, rows).reshape(moved).movedim(0, dim)

    def _key(self, device: torch.device, generator: Any) -> tuple[Any, ...]:
        if generator is not None:
            state = generator.get_state()
            self._own.setdefault(id(generator), (generator, state))
        elif device.type == "cpu":
            state = torch.get_rng_state()
        else:
            state = torch.get_device_module(device).get_rng_state(device)
        # One number for the state: a weighted sum that wraps around, as a hash does.
        weights = torch.arange(1, state.numel() + 1, dtype=torch.int64) * 0x9E3779B97F4A7C1
        return str(device), id(generator), int((state.long() * weights).sum())


def _scaled(shape: Sequence[int], whole: Sequence[int], dim: int, count: int, samples: int) -> bool:
    """Whether `shape` is `whole`, but that `dim` has `count` samples instead of `samples`."""
    if len(shape) != len(whole) or shape[dim] * samples != whole[dim] * count:
        return False
    return all(own == other for place, (own, other) in enumerate(zip(shape, whole)) if place != dim)


# One function a kind of operator: (mode, operator, args, kwargs) -> what the operator returns, or fills with.


def _like(noise: SampleNoise, func: Any, args: Any, kwargs: Any) -> Tensor:
    like: Tensor = args[0]
    return noise.drawn(
        like.shape, like.device, kwargs.get("generator"), lambda shape: func(like.new_empty(shape), *args[1:], **kwargs)
    )


def _sized(noise: SampleNoise, func: Any, args: Any, kwargs: Any) -> Tensor:
    place = next(place for place, argument in enumerate(func._schema.arguments) if argument.name == "size")
    device = torch.device(kwargs.get("device") or "cpu")

    def draw(shape: Sequence[int]) -> Tensor:
        made: Tensor = func(*args[:place], list(shape), *args[place + 1 :], **kwargs)
        return made

    return noise.drawn(args[place], device, kwargs.get("generator"), draw)


def _bernoulli(noise: SampleNoise, func: Any, args: Any, kwargs: Any) -> Tensor:
    """The chances are a tensor: of other samples they are not known, so uniform numbers are drawn."""
    made: Tensor = (_standard(noise, torch.rand, args[0], kwargs) < args[-1]).to(args[0].dtype)
    return made


def _normal(noise: SampleNoise, func: Any, args: Any, kwargs: Any) -> Tensor:
    mean, std = (*args, 1.0)[:2]
    like = torch.as_tensor(mean) + torch.zeros_like(torch.as_tensor(std))
    made: Tensor = mean + std * _standard(noise, torch.randn, like, kwargs)
    return made


def _dropout(noise: SampleNoise, func: Any, args: Any, kwargs: Any) -> Any:
    values, chance, train = args
    if train is False or not 0 < chance < 1:
        return func(*args, **kwargs)
    keep = _standard(noise, torch.rand, values, kwargs) >= chance
    return values * keep / (1 - chance), keep


def _standard(noise: SampleNoise, draw: Callable[..., Tensor], like: Tensor, kwargs: Any) -> Tensor:
    """Standard numbers in the shape of `like`, on its device."""
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    generator = kwargs.get("generator")
    return noise.drawn(
        like.shape,
        like.device,
        generator,
        lambda shape: draw(list(shape), dtype=dtype, device=like.device, generator=generator),
    )


def _overloads(*names: str) -> set[Any]:
    """The overloads of these operators that exist in this torch, without those that write to `out`."""
    packets = [getattr(_aten, name) for name in names if hasattr(_aten, name)]
    found = [(packet, overload) for packet in packets for overload in packet.overloads()]
    return {getattr(packet, overload) for packet, overload in found if not overload.endswith("out")}


_FILLS = ("uniform_", "normal_", "exponential_", "log_normal_", "cauchy_", "geometric_", "random_", "bernoulli_")
_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_overloads(*_FILLS, "rand_like", "randn_like", "randint_like"), _like),
    **dict.fromkeys(_overloads("rand", "randn", "randint"), _sized),
    _aten.bernoulli.p: _like,
    _aten.bernoulli.default: _bernoulli,
    _aten.bernoulli_.Tensor: _bernoulli,
    _aten.normal.float_float: _sized,
    _aten.normal.Tensor_Tensor: _normal,
    _aten.normal.Tensor_float: _normal,
    _aten.normal.float_Tensor: _normal,
    _aten.native_dropout.default: _dropout,
}
_CASTS = _overloads("_to_copy", "copy_")
# One sample's part of these cannot be told from the outside.
_OPAQUE = _overloads("multinomial", "randperm", "poisson", "binomial", "_standard_gamma", "_sample_dirichlet")
