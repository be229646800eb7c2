"""What objects hold, and what is in that: found by walking, put back in place, so that objects keep their identity.

A model changes itself in more than one place at its first forward: it registers hooks and keeps a flag of that, makes
a layer and lists it, fills a cache. Putting back one place without the other leaves a model that nobody made. So a
module is kept with all that it holds: attributes, parameters, buffers, submodules, hooks of every kind, also on
tensors, and what stands in lists, dicts, sets and small objects of the model's own package, however deep.

A lazy layer is left as its first forward makes it. Not walked into: functions, classes, datasets and loaders, and
objects of other packages (a logger, a trainer), which have lives of their own.
"""

import enum
import functools
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, Sampler

from autoaccum.data.draws import is_generator, restore, state_of
from autoaccum.model.shards import local, reset_all

__all__ = ["Contents"]

_DEEPEST = 12  # containers and objects inside each other; deeper there is no state of a model, but somebody's tree
_MOST = 10_000  # a longer container is data, or a vocabulary: its items are kept, and not looked into
_ABSENT = object()  # a slot without a value
_PLAIN = (int, float, str, bytes, type(None))
_OWN_LIVES = (type, types.ModuleType, types.FunctionType, enum.Enum, Dataset, DataLoader, Sampler)
_ANYBODYS = frozenset({"collections", "types"})  # packages whose objects are containers: UserDict, SimpleNamespace
_HOOKS_OF_A_TENSOR = ("_backward_hooks", "_post_accumulate_grad_hooks")
_GLOBAL_HOOKS = [held for name, held in vars(torch_modules).items() if name.startswith("_global_") and "hooks" in name]


class Contents:
    """All that some objects hold at one moment.

    Attributes:
        tensors: those found, each once; what their numbers are is the owner's to keep.
    """

    def __init__(self, *roots: Any) -> None:
        """Walks through `roots`: modules, optimizers, or other objects with a state."""
        self.tensors: list[Tensor] = []
        self._roots = roots
        reset_all(roots)
        self._put_back: list[Callable[[], None]] = []
        self._seen: set[int] = set()
        self._waiting: list[tuple[Any, str, int]] = [(hooks, "torch", 0) for hooks in _GLOBAL_HOOKS]
        for root in roots:
            owner = root.__self__ if isinstance(root, types.MethodType) else root
            noted = getattr(owner, "_autoaccum_noted", None)
            if noted is not None:  # by a trainer's step, on the trainer
                self._put_back.append(noted().restore)
            if not isinstance(owner, nn.Module):
                self._open(owner, _package(owner), 0)
            self._waiting.append((owner, _package(owner), 0))
            self._walk()

    def restore(self) -> None:
        """Puts everything back that is no longer as it was; what still is, is not touched."""
        reset_all(self._roots)
        for put_back in self._put_back:
            put_back()

    def _walk(self) -> None:
        while self._waiting:
            value, package, depth = self._waiting.pop()
            if isinstance(value, _PLAIN) or id(value) in self._seen or depth > _DEEPEST:
                continue
            if isinstance(value, Tensor):
                self._add_tensor(value, package, depth)
            elif isinstance(value, nn.Module):
                self._open(value, _package(value), 0)
            elif isinstance(value, (dict, list, set, deque)):
                self._seen.add(id(value))
                self._put_back.append(_items(value))
                self._look_into(value.values() if isinstance(value, dict) else value, package, depth)
            elif isinstance(value, tuple):
                self._seen.add(id(value))
                self._look_into(value, package, depth)
            elif isinstance(value, types.MethodType):
                self._waiting.append((value.__self__, package, depth + 1))
            elif is_generator(value):
                self._seen.add(id(value))
                self._put_back.append(functools.partial(restore, value, state_of(value)))
            elif _is_walked(value, package):
                self._open(value, package, depth)

    def _look_into(self, values: Iterable[Any], package: str, depth: int) -> None:
        items = list(values)
        if len(items) <= _MOST:
            self._waiting.extend((item, package, depth + 1) for item in items)

    def _open(self, value: Any, package: str, depth: int) -> None:
        """Keeps an object's attributes and class, and goes on with what they hold."""
        self._seen.add(id(value))
        if isinstance(value, nn.Module) and _is_shapeless(value):
            self._look_into(value.children(), package, 0)
            return
        attributes = dict(getattr(value, "__dict__", {}))
        self._put_back.append(_attributes(value, attributes))
        self._look_into(attributes.values(), package, depth)
        if isinstance(value, torch.jit.ScriptModule):  # whose registries are views, and no containers
            inside = [*value.parameters(recurse=False), *value.buffers(recurse=False), *value.children()]
            self._look_into(inside, package, depth)

    def _add_tensor(self, tensor: Tensor, package: str, depth: int) -> None:
        if is_lazy(tensor):
            return
        self._open(tensor, package, depth)
        self.tensors.append(tensor)
        if tensor.is_leaf:
            self._put_back.append(_numbers(tensor))
            self._put_back.extend(_hooks(tensor, name) for name in _HOOKS_OF_A_TENSOR)


def _is_shapeless(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) and any(
        tensor is not None and is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())
    )


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _is_walked(value: Any, package: str) -> bool:
    own = _package(value)
    if isinstance(value, _OWN_LIVES) or own == "torch" or not (own == package or own in _ANYBODYS):
        return False
    return hasattr(value, "__dict__") or any(_slots(type(value)))


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        names = base.__dict__.get("__slots__", ())
        names = (names,) if isinstance(names, str) else names
        yield from (name for name in names if name not in ("__dict__", "__weakref__"))


# Each keeps something of an object, and returns what puts it back.


def _attributes(owner: Any, saved: dict[str, Any]) -> Callable[[], None]:
    """An object's attributes, of which `saved` are in a dict, and its class, which a lazy module changes."""
    kind, script = type(owner), isinstance(owner, torch.jit.ScriptModule)
    names = () if isinstance(owner, (nn.Module, Tensor)) else _slots(kind)
    slots = {name: getattr(owner, name, _ABSENT) for name in names}
    buffers = dict(owner._buffers.items()) if script else {}

    def put_back() -> None:
        if type(owner) is not kind:
            owner.__class__ = kind
        _set_items(getattr(owner, "__dict__", {}), saved, dict)
        for name, value in slots.items():
            if getattr(owner, name, _ABSENT) is not value:
                if value is _ABSENT:
                    object.__delattr__(owner, name)
                else:
                    object.__setattr__(owner, name, value)
        if script:
            # TorchScript's registry is a view of the module in C++, which can be neither cleared nor added to, and is
            # no iterable but for keys().
            for name in [name for name in owner._buffers.keys() if name not in buffers]:  # noqa: SIM118
                del owner._buffers[name]
            for name, buffer in buffers.items():
                owner._buffers[name] = buffer

    return put_back


def _items(container: Any) -> Callable[[], None]:
    """The items of a list, dict, set or deque, or of an heir, whose own methods may do more than to hold them."""
    kind: Any = next(kind for kind in (OrderedDict, dict, list, set, deque) if isinstance(container, kind))
    saved = dict(container.items()) if isinstance(container, dict) else list(container)

    def put_back() -> None:
        if isinstance(saved, dict):
            _set_items(container, saved, kind)
        elif len(container) != len(saved) or any(a is not b for a, b in zip(container, saved)):
            kind.clear(container)
            (kind.update if kind is set else kind.extend)(container, saved)

    return put_back


def _numbers(tensor: Tensor) -> Callable[[], None]:
    """Where a tensor's numbers lie, which a layer may change under its name, and whether it wants a gradient."""
    requires_grad, numbers = tensor.requires_grad, tensor.detach()

    def put_back() -> None:
        if not tensor.is_leaf:  # something with a graph was added to it
            tensor.detach_()
        if tensor.requires_grad != requires_grad:
            tensor.requires_grad_(requires_grad)
        if _place(tensor) != _place(numbers):
            tensor.data = numbers

    return put_back


def _place(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.layout != torch.strided:
        return (tensor.shape,)
    return tensor.shape, tensor.stride(), tensor.dtype, local(tensor).data_ptr()


def _hooks(tensor: Tensor, name: str) -> Callable[[], None]:
    """The hooks of one kind on a tensor: there are none, or a dict that handles refer to."""
    kept: dict[int, Any] | None = getattr(tensor, name)
    saved = dict(kept or {})

    def put_back() -> None:
        if kept is not None and getattr(tensor, name) is not kept:
            setattr(tensor, name, kept)
        hooks = getattr(tensor, name)
        if hooks is not None:  # one that was made meanwhile stays, empty, since torch holds it as well
            _set_items(hooks, saved, OrderedDict)

    return put_back


def _set_items(held: Any, saved: dict[Any, Any], kind: Any) -> None:
    """Gives a dict of that kind its items and their order again, unless it has them."""
    if len(held) == len(saved) and all(a is c and b is d for (a, b), (c, d) in zip(held.items(), saved.items())):
        return
    kind.clear(held)
    for key, value in saved.items():
        kind.__setitem__(held, key, value)
