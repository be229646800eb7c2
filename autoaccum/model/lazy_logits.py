"""A head whose logits are computed when somebody asks for them: a cross entropy never does.

The head is a linear layer over many classes. What its forward returns knows the hidden states and the layer, and holds
no memory. It lets itself be reshaped, cut along its rows and cast; where it meets `cross_entropy`, the loss is computed
in chunks (chunked_loss.py). Whatever else is done with it is done with the logits themselves, computed there and then:
the result is the same, and nothing is saved. Once something writes to the logits or hangs a hook on them, they are all
that counts. So a model's own code, a trainer's and a user's loss are served alike, and none of them is touched.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import GetSetDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from autoaccum.model.chunked_loss import ChunkedCrossEntropy, logits_format
from autoaccum.model.forward import StandIn

__all__ = ["LEAST_CLASSES", "LazyHead", "Logits", "chunked", "heads"]

LEAST_CLASSES = 2048  # below, the buffer for a chunk is no smaller than the logits of most batches


def heads(model: nn.Module) -> list[nn.Linear]:
    """The linear layers with the most outputs, if these are many and more than the inputs: heads, unless they are none.

    Whether one is shows when it runs.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and _is_plain(layer)]
    most = max((layer.out_features for layer in layers), default=0)
    return [layer for layer in layers if layer.out_features == most >= max(LEAST_CLASSES, layer.in_features + 1)]


def _is_plain(layer: nn.Linear) -> bool:
    sharded = any(hasattr(part, "device_mesh") for part in layer.parameters())  # its weight is not there later
    return type(layer).forward is nn.Linear.forward and not sharded


@contextmanager
def chunked(model: nn.Module) -> Iterator[None]:
    """The heads of `model` are lazy inside."""
    with ExitStack() as stack:
        for head in heads(model):
            stack.enter_context(LazyHead(head))
        yield


class LazyHead(StandIn):
    """A linear layer that returns Logits."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward, put off; as it is where it is compiled."""
        if torch.compiler.is_compiling() or len(args) != 1 or kwargs:
            return self.forward(*args, **kwargs)
        (hidden,), head = args, self.module
        assert isinstance(head, nn.Linear)
        format_ = logits_format(hidden)
        return _put_off(hidden, head.weight, head.bias, format_, format_)


def _put_off(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, computed: torch.dtype, format_: torch.dtype
) -> "Logits":
    """What `linear(hidden, weight, bias)` will be, computed in one format and cast to another."""
    made: Logits = _PutOff.apply(hidden, weight, bias, computed, format_)  # type: ignore[no-untyped-call]
    made.hidden, made.weight, made.bias, made.computed = hidden, weight, bias, computed
    return made


class Logits(Tensor):
    """(…, classes): outputs of a linear layer that have not been computed.

    Attributes:
        hidden: (…, width), with its graph.
        weight, bias: the layer's.
        computed: the format that the layer computes in; `dtype` is what that was cast to since.
        whole, part: the Logits whose memory these are in, None where they have their own; what makes these of those.
        fixed: whether `made` may hold what no hidden state says.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    computed: torch.dtype
    made: Tensor | None = None
    whole: "Logits | None" = None
    part: Callable[[Tensor], Tensor]
    fixed = False

    def themselves(self) -> Tensor:
        """The logits, computed once."""
        if self.whole is not None and self.whole.is_fixed and not self.fixed:
            with torch.enable_grad():
                self.made, self.fixed = self.part(self.whole.themselves()), True
        if self.made is not None and self.fixed:
            return self.made
        if self.made is None or (torch.is_grad_enabled() and not self.made.requires_grad):
            with torch.autocast(self.hidden.device.type, enabled=False):
                bias = None if self.bias is None else self.bias.to(self.computed)
                made = functional.linear(self.hidden.to(self.computed), self.weight.to(self.computed), bias)
                self.made = made.to(self.dtype)
        return self.made

    def rows(self, change: Callable[[Tensor], Tensor]) -> "Logits":
        """The logits of other rows of the hidden states."""
        rows = _put_off(change(self.hidden), self.weight, self.bias, self.computed, self.dtype)
        if rows.hidden.untyped_storage().data_ptr() == self.hidden.untyped_storage().data_ptr():
            rows.whole, rows.part = self, change
        return rows

    @property
    def is_fixed(self) -> bool:
        """Whether these, or any that they are part of, were written to: then nothing is put off any more."""
        return self.fixed or (self.whole is not None and self.whole.is_fixed)

    def make(self) -> None:
        """Computes the logits, and those that they are part of: somebody is about to write to them, or hook them."""
        if self.whole is not None:
            self.whole.make()
        with torch.enable_grad():
            self.themselves()
        self.fixed = True

    def cast(self, format_: torch.dtype) -> "Logits":
        """The logits in another format."""
        return self if format_ == self.dtype else _put_off(self.hidden, self.weight, self.bias, self.computed, format_)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Put off further, in chunks, or with the logits themselves."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FACTS:
                return func(*args, **kwargs)
            first = args[0] if args and isinstance(args[0], Logits) else None
            if first is not None and func in _PUT_OFF and not first.is_fixed:
                result = _PUT_OFF[func](*args, **kwargs)
                if result is not None:
                    return result
            for each in (first, kwargs.get("out")):
                if isinstance(each, Logits) and (each is not first or _changes(func)):
                    each.make()
        return func(*_computed(args), **_computed(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Code below Python, which has no other way: with the logits themselves, whose gradient comes back here."""
        return func(*_computed(args), **_computed(kwargs or {}))


class _PutOff(torch.autograd.Function):
    """Gives Logits a place in the graph, for what reaches them there and not through torch's functions."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, computed: torch.dtype, format_: torch.dtype
    ) -> Logits:
        """Logits without what makes them."""
        ctx.save_for_backward(hidden, weight)
        ctx.computed, ctx.has_bias = computed, bias is not None
        shape = (*hidden.shape[:-1], weight.shape[0])
        logits: Logits = Tensor._make_wrapper_subclass(Logits, shape, dtype=format_, device=hidden.device)
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """As a linear layer's."""
        hidden, weight = ctx.saved_tensors
        gradient = gradient.to(ctx.computed)
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_weight = rows.t() @ hidden.reshape(-1, hidden.shape[-1]).to(ctx.computed)
        for_bias = rows.sum(0) if ctx.has_bias else None
        return gradient @ weight.to(ctx.computed), for_weight, for_bias, None, None


_CHANGES = {"__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ipow__",
            "register_hook", "retain_grad"}  # fmt: skip


def _changes(function: Any) -> bool:
    """Whether one of torch's functions writes to its first argument, hangs something on it, or gives `.data` to."""
    name = getattr(function, "__name__", "")
    return name in _CHANGES or (name.endswith("_") and not name.endswith("__")) or function == _DATA


_DATA = vars(torch._C.TensorBase)["data"].__get__


def _computed(arguments: Any) -> Any:
    """Arguments of one of torch's functions with the logits themselves in the place of Logits."""
    return tree_map_only(Logits, Logits.themselves, arguments)


# What can be put off: each gives None where it cannot.


def _cross_entropy(
    logits: Logits, target: Tensor, weight: Tensor | None = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor | None:  # fmt: skip
    plain = size_average is None and reduce is None and reduction in ("mean", "sum")
    if not plain or logits.dim() != 2 or target.dtype != torch.int64 or target.shape != logits.shape[:1]:
        return None
    half = logits.dtype.itemsize == 2
    computed = torch.float32 if half else logits.dtype
    loss: Tensor = ChunkedCrossEntropy.apply(
        logits.hidden, logits.weight, logits.bias, target, weight, ignore_index, label_smoothing, reduction, None,
        logits.computed, computed,
    )  # type: ignore[no-untyped-call]  # fmt: skip
    under_autocast = torch.is_autocast_enabled(logits.device.type)  # computes this loss in float32
    return loss.to(logits.dtype) if half and not under_autocast else loss


def _reshape(logits: Logits, *shape: Any, **named: Any) -> Logits | None:
    shape = shape or tuple(named.values())
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape
    if not all(isinstance(size, int) for size in sizes) or not sizes or sizes[-1] != logits.shape[-1]:
        return None
    return logits.rows(lambda hidden: hidden.reshape(*sizes[:-1], hidden.shape[-1]))


def _flatten(logits: Logits, start_dim: int = 0, end_dim: int = -1) -> Logits | None:
    last = end_dim % logits.dim()
    return None if last == logits.dim() - 1 else logits.rows(lambda hidden: hidden.flatten(start_dim, last))


def _index(logits: Logits, index: Any) -> Logits | None:
    """Where the classes are all left in their place."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is Ellipsis or isinstance(part, (int, slice, Tensor)) for part in parts):
        return None
    taken = sum(_dimensions(part) for part in parts)
    rest = parts[-1] is Ellipsis or (isinstance(parts[-1], slice) and parts[-1] == slice(None))
    if not rest and (taken >= logits.dim() or any(part is Ellipsis for part in parts)):
        return None
    return logits.rows(lambda hidden: hidden[index])


def _dimensions(part: Any) -> int:
    if part is None or part is Ellipsis:
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def _to(logits: Logits, *args: Any, **kwargs: Any) -> Logits | None:
    """To another format; or to the device where they are."""
    if kwargs or len(args) != 1:
        return None
    if isinstance(args[0], torch.dtype):
        return logits.cast(args[0]) if args[0].is_floating_point else None
    return logits if isinstance(args[0], (str, torch.device)) and torch.device(args[0]) == logits.device else None


_PUT_OFF: dict[Any, Callable[..., Any]] = {
    functional.cross_entropy: _cross_entropy,
    Tensor.view: _reshape,
    Tensor.reshape: _reshape,
    torch.reshape: _reshape,
    Tensor.flatten: _flatten,
    torch.flatten: _flatten,
    Tensor.__getitem__: _index,
    Tensor.to: _to,
    Tensor.float: lambda logits, **how: logits.cast(torch.float32),
    Tensor.double: lambda logits, **how: logits.cast(torch.float64),
    Tensor.contiguous: lambda logits, **how: logits,
}
_FACTS = frozenset(
    found.__get__ if isinstance(found, GetSetDescriptorType) else found
    for found in (
        getattr(Tensor, name)
        for name in ("size", "dim", "numel", "is_floating_point", "is_complex", "__len__", "shape", "dtype", "device",
                     "ndim", "requires_grad", "layout", "is_cuda", "is_cpu", "is_leaf", "grad_fn", "is_sparse",
                     "is_nested", "is_meta")
    )
)  # fmt: skip
"""What is known of the logits without them."""
