"""Random numbers that belong to their samples, whatever micro-batch these come in.

A dispatch mode sees every draw, also those inside torch. In the first run, over the whole batch, it keeps what was
drawn. A micro-batch, whose draw is smaller along one dimension, then gets its samples' rows of that, and generators
move as they did there, so that later draws agree as well. Draws are told apart by their operator, its numbers and the
state of the generator before them, which are the same in the whole batch, in its micro-batches, and where activation
checkpointing runs a forward again. What is drawn alike for all samples (a layer that is left out) stays as it is.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autoaccum.ranks import digest

__all__ = ["SampleNoise"]

_aten = torch.ops.aten


class SampleNoise(TorchDispatchMode):
    """While it is entered, each micro-batch gets its samples' rows of what the whole batch has drawn.

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
        self._drawn: dict[Any, tuple[list[Tensor], Tensor]] = {}  # by the whole batch, on the host; the state after it
        self._dims: dict[Any, int] = {}
        self._own: dict[int, tuple[torch.Generator, Tensor]] = {}

    def restart(self) -> None:
        """Puts generators that the model brought itself back to where they were first seen."""
        for generator, state in self._own.values():
            generator.set_state(state)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _CASTS:
            self.formats.update(arg.dtype for arg in args if isinstance(arg, Tensor) and arg.is_floating_point())
        if func is _aten._local_scalar_dense.default and not isinstance(args[0], Tensor):
            return args[0]  # a number that the graph has kept as a tensor comes here as the number itself
        if func in _DRAWS:
            return self._draw(func, args, kwargs)
        self.unexplained = self.unexplained or func in _OPAQUE
        return func(*args, **kwargs)

    def _draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator draws, with the rows of the samples that run in the place of its own."""
        devices = [arg.device for arg in args if isinstance(arg, Tensor)]
        device = devices[0] if devices else torch.device(kwargs.get("device") or "cpu")
        own: Any = kwargs.get("generator")
        if own is not None or device.type == "cpu":
            source = own if own is not None else torch.default_generator
            get, put = source.get_state, source.set_state
        else:
            module = torch.get_device_module(device)
            get, put = partial(module.get_rng_state, device), partial(module.set_rng_state, device=device)
        state, count = get(), len(self.rows)
        if own is not None:
            self._own.setdefault(id(own), (own, state))
        # A number may be that of the samples, which choose among themselves: such draws are none of single ones.
        numbers = tuple(arg for arg in args if isinstance(arg, (int, float)))
        key = str(device), id(own), digest(state), func, numbers
        made = func(*args, **kwargs)
        # Of a dropout only the mask is drawn: its values must show where samples act on each other.
        results = made[1:] if isinstance(made, tuple) else (made,)
        if key not in self._drawn:
            self.unexplained = self.unexplained or count < self._samples
            if count == self._samples:
                self._drawn[key] = [each.detach().to("cpu", copy=True) for each in results], get()
            return made
        whole, after = self._drawn[key]
        shape = results[0].shape
        if shape != whole[0].shape:
            dims = [dim for dim in range(len(shape)) if _scaled(shape, whole[0].shape, dim, count, self._samples)]
            if len(dims) != 1 or count == self._samples:
                self.unexplained = True
                return made
            self._dims[key] = dims[0]
        put(after)
        dim = self._dims.get(key)
        if dim is not None:
            rows, moved = torch.tensor(list(self.rows)), (shape[dim], *shape[:dim], *shape[dim + 1 :])
            for result, each in zip(results, whole, strict=True):
                chosen = each.movedim(dim, 0).reshape(self._samples, -1).index_select(0, rows)
                result.copy_(chosen.reshape(moved).movedim(0, dim))
            if isinstance(made, tuple) and args[2] is not False and 0 < args[1] < 1:
                made[0].copy_(args[0] * made[1] * (1 / (1 - args[1])))
        return made


def _scaled(shape: Sequence[int], whole: Sequence[int], dim: int, count: int, samples: int) -> bool:
    """Whether `shape` is `whole`, but that `dim` has `count` samples instead of `samples`."""
    if len(shape) != len(whole) or shape[dim] * samples != whole[dim] * count:
        return False
    return all(own == other for place, (own, other) in enumerate(zip(shape, whole)) if place != dim)


def _overloads(*names: str) -> set[Any]:
    """The overloads of these operators that exist in this torch, without those that write to `out`."""
    packets = [getattr(_aten, name) for name in names if hasattr(_aten, name)]
    found = [(packet, overload) for packet in packets for overload in packet.overloads()]
    return {getattr(packet, overload) for packet, overload in found if not overload.endswith("out")}


_DRAWS = _overloads(
    "uniform_", "normal_", "exponential_", "log_normal_", "cauchy_", "geometric_", "random_", "bernoulli_", "rand",
    "randn", "randint", "rand_like", "randn_like", "randint_like", "bernoulli", "normal", "native_dropout",
)  # fmt: skip
_CASTS = _overloads("_to_copy", "copy_")
# One sample's part of these cannot be told from the outside.
_OPAQUE = _overloads("multinomial", "randperm", "poisson", "binomial", "_standard_gamma", "_sample_dirichlet")
