"""Random generators that the user's objects hold: a sampler's, a dataset's, a transform's, a collate function's.

Choices made here:

- They are found by looking, whatever their attribute is called: torch's, Python's and numpy's, in an object and in what
  it is made of (a dataset in a Subset, the transforms in a Compose, the object of a bound method, what a function
  closes over). Each has a name, the way to it, by which a checkpoint knows it again.
- Looked for anew each time: a sampler may make itself another one for each epoch.
- The global generators are nobody's own, even where an attribute leads to one.
- numpy is never imported, only looked up.
"""

import random
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch

__all__ = ["held", "is_generator", "restore", "state_of"]

_DEPTH = 6
_FOLLOWED = frozenset(["dataset", "sampler", "batch_sampler", "collate_fn", "transform", "target_transform"])
_SEVERAL = frozenset(["datasets", "transforms"])


def held(owners: Mapping[str, Any]) -> dict[str, Any]:
    """The generators that `owners` hold, by name; each once."""
    found: dict[str, Any] = {}
    seen = {id(generator) for generator in _globals()}
    for name, owner in owners.items():
        _look(name, owner, _DEPTH, found, seen)
    return found


def state_of(generator: Any) -> dict[str, Any]:
    """The state of a generator, as plain values and tensors."""
    if isinstance(generator, torch.Generator):
        return {"kind": "torch.Generator", "state": generator.get_state()}
    if isinstance(generator, random.Random):
        version, words, gauss = generator.getstate()
        return {"kind": "random.Random", "version": version, "words": torch.tensor(words), "gauss": gauss}
    own = hasattr(generator, "bit_generator")  # a RandomState keeps more than its bit generator does
    state = generator.bit_generator.state if own else generator.get_state(legacy=False)
    return {"kind": f"numpy {type(generator).__name__} of {state['bit_generator']}", "state": _plain(state)}


def restore(generator: Any, state: Mapping[str, Any]) -> None:
    """Sets a generator to what `state_of` gave for one of its kind."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state["state"])
    elif isinstance(generator, random.Random):
        generator.setstate((state["version"], tuple(state["words"].tolist()), state["gauss"]))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = _numpys(state["state"])
    else:
        generator.set_state(_numpys(state["state"]))


def _look(path: str, owner: Any, depth: int, found: dict[str, Any], seen: set[int]) -> None:
    if id(owner) in seen:
        return
    if is_generator(owner):
        seen.add(id(owner))
        found[path] = owner
    elif depth:
        for step, value in _inside(owner):
            _look(path + step, value, depth - 1, found, seen)


def _inside(owner: Any) -> Iterator[tuple[str, Any]]:
    """What of an object is looked into, each after the step to it."""
    if isinstance(owner, MethodType):
        yield from ((".__self__", owner.__self__), (".__func__", owner.__func__))
    elif isinstance(owner, partial):
        yield ".func", owner.func
        yield from _each(".args", owner.args)
        yield from _each(".keywords", owner.keywords)
    elif isinstance(owner, FunctionType):
        for name, cell in zip(owner.__code__.co_freevars, owner.__closure__ or ()):
            if cell != CellType():  # an empty one, of a name without a value yet
                yield f".{name}", cell.cell_contents
    elif not isinstance(owner, type):
        for name, value in list(getattr(owner, "__dict__", {}).items()):
            if name in _SEVERAL:
                yield from _each(f".{name}", value)
            elif name in _FOLLOWED or is_generator(value):
                yield f".{name}", value


def _each(path: str, values: Any) -> Iterator[tuple[str, Any]]:
    """The items of a container. Lists are not looked into elsewhere: they are full of samples, as a rule."""
    if isinstance(values, Mapping):
        yield from ((f"{path}[{key!r}]", value) for key, value in values.items())
    elif isinstance(values, (list, tuple)):
        yield from ((f"{path}[{place}]", value) for place, value in enumerate(values))
    else:
        yield path, values


def is_generator(value: Any) -> bool:
    """Whether `value` is a random generator whose state can be read and set: torch's, Python's or numpy's."""
    if isinstance(value, torch.Generator):
        return True
    if isinstance(value, random.Random):
        return type(value).getstate is random.Random.getstate  # SystemRandom and its like have no state
    numpy = _numpy()
    return numpy is not None and isinstance(value, (numpy.Generator, numpy.RandomState))


def _globals() -> list[Any]:
    numpy = _numpy()
    own = [] if numpy is None else [numpy.mtrand._rand]
    return [torch.default_generator, random.getstate.__self__, *own]  # type: ignore[attr-defined]


def _plain(value: Any) -> Any:
    """A state of numpy's without its arrays, some of which torch's tensors could not hold."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if type(value).__module__ != "numpy":
        return value
    return {"dtype": str(value.dtype), "values": value.tolist()} if value.ndim else value.item()


def _numpys(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"dtype", "values"}:
        return sys.modules["numpy"].array(value["values"], dtype=value["dtype"])
    return {key: _numpys(item) for key, item in value.items()}


def _numpy() -> Any:
    """numpy.random, where something has loaded it."""
    return sys.modules.get("numpy.random")
