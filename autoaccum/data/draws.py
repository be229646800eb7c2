"""Random numbers for the data: whose generator is used when, and how it comes back.

Choices made here:

- What an epoch draws follows from one number, its base: a function of (seed, epoch), or without a seed drawn as
  `iter(DataLoader)` draws it, so that a loader shows its samples in the order that a loop by hand would have seen.
- The user's samplers and streams that draw from the global generators draw from a `Lane` instead: those generators as
  they would be if only the data used them. So dropout does not change the order of the data, nor the data the dropout.
- Samples that workers fetch are seeded one by one from (base, position in the epoch): neither the number of
  micro-batches, nor of workers, nor a restart changes an augmentation. Not by the index, which a sampler with
  replacement may show twice.

What the user's samplers, datasets, transforms and collate functions draw from is found by a protocol, by which an epoch
that is gone on with draws what it would have drawn:

- A generator of torch's, Python's or numpy's is an attribute of such an object, as `.generator` is of a DataLoader.
- A dataset with indices or a collate function that draws in another way has `state_dict()` and
  `load_state_dict(state)`, in plain values and tensors.

Objects are reached by the attributes that torch and torchvision nest them by (`_NESTED`, `_LISTED`), and by a method's
own object; anew each time, since a sampler may make itself another generator for each epoch. What a closure or a global
variable holds is not seen, and draws on after a restart. The global generators are nobody's own.
"""

import contextlib
import copy
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from autoaccum.interrupts import uninterrupted
from autoaccum.random_state import RandomState, numpy_random, seed_everything

__all__ = ["Lane", "draw", "held", "is_generator", "mix", "preserved", "restore", "state_of"]

_MASK = 2**64 - 1
_CPU = torch.device("cpu")  # a worker must not touch an accelerator
_NESTED = frozenset(["dataset", "sampler", "batch_sampler", "collate_fn", "transform", "target_transform"])
_LISTED = frozenset(["datasets", "transforms"])  # other lists are full of samples, as a rule


def mix(*numbers: int) -> int:
    """One number below 2**63 from several; any change of any of them changes it at random.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014), applied after each number.
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def draw(generator: torch.Generator) -> int:
    """A number below 2**63, drawn as `iter(DataLoader)` draws its base seed."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator))


class Lane:
    """Inside `with lane:` the global generators are the lane's own, and go on where its last use left them."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inside: RandomState | None = None
        self._outside: RandomState | None = None

    @uninterrupted
    def __enter__(self) -> None:
        self._outside = RandomState(_CPU)
        if self._inside is None or (not self._inside.has_numpy and numpy_random() is not None):
            seed_everything(self._seed, cpu_only=True)
        if self._inside is not None:
            self._inside.restore()

    @uninterrupted
    def __exit__(self, *raised: object) -> None:
        self._inside = RandomState(_CPU)
        if self._outside is not None:
            self._outside.restore()


@contextlib.contextmanager
def preserved(held: Iterable[Any] = ()) -> Iterator[None]:
    """Leaves what is drawn from as it was: the global generators, and what of the user's objects was `held`."""
    before, own = RandomState(_CPU), [(each, state_of(each)) for each in held]
    try:
        yield
    finally:
        _put_back(before, own)


@uninterrupted
def _put_back(before: RandomState, own: list[tuple[Any, dict[str, Any]]]) -> None:
    before.restore()
    for each, state in own:
        restore(each, state)


# --- what the user's own objects draw from


def held(owners: Mapping[str, Any], *, states: bool = False) -> dict[str, Any]:
    """The generators that `owners` hold, each once, by the way to it; with `states` also objects that have a state."""
    found: dict[str, Any] = {}
    waiting = [(path, owner) for path, owner in owners.items() if owner is not None]
    if not waiting:
        return found
    numpy = numpy_random()
    own = [torch.default_generator, random.getstate.__self__]  # type: ignore[attr-defined]
    seen = set(map(id, own if numpy is None else [*own, numpy.mtrand._rand]))
    for path, given in waiting:  # grows meanwhile
        owner = getattr(given, "__self__", given)  # of a method
        if id(owner) in seen or isinstance(owner, type):
            continue
        seen.add(id(owner))
        methods = (getattr(owner, name, None) for name in ("state_dict", "load_state_dict"))
        # A module's state is its weights.
        if is_generator(owner) or (states and all(map(callable, methods)) and not isinstance(owner, nn.Module)):
            found[path] = owner
        for name, value in list(getattr(owner, "__dict__", {}).items()):
            if name in _LISTED and isinstance(value, (list, tuple)):
                waiting += [(f"{path}.{name}[{place}]", each) for place, each in enumerate(value)]
            elif name in _NESTED or is_generator(value):
                waiting.append((f"{path}.{name}", value))
    return found


def state_of(owner: Any) -> dict[str, Any]:
    """The state of what `held` found, as plain values and tensors."""
    if isinstance(owner, torch.Generator):
        return {"kind": "torch.Generator", "state": owner.get_state()}
    if isinstance(owner, random.Random):
        version, words, gauss = owner.getstate()
        return {"kind": "random.Random", "version": version, "words": torch.tensor(words), "gauss": gauss}
    if not is_generator(owner):
        return {"kind": f"state of a {type(owner).__name__}", "state": copy.deepcopy(owner.state_dict())}
    own = hasattr(owner, "bit_generator")  # a RandomState keeps more than its bit generator does
    state = owner.bit_generator.state if own else owner.get_state(legacy=False)
    return {"kind": f"numpy {type(owner).__name__} of {state['bit_generator']}", "state": _plain(state)}


def restore(owner: Any, state: Mapping[str, Any]) -> None:
    """Puts back what `state_of` gave for one of its kind."""
    if isinstance(owner, random.Random):
        owner.setstate((state["version"], tuple(state["words"].tolist()), state["gauss"]))
    elif hasattr(owner, "bit_generator"):
        owner.bit_generator.state = state["state"]
    elif is_generator(owner):
        owner.set_state(state["state"])
    else:
        owner.load_state_dict(copy.deepcopy(state["state"]))


def is_generator(value: Any) -> bool:
    """Whether `value` is a random generator whose state can be read and set: torch's, Python's or numpy's."""
    if isinstance(value, torch.Generator):
        return True
    if isinstance(value, random.Random):
        return type(value).getstate is random.Random.getstate  # SystemRandom and its like have no state
    numpy = numpy_random()
    return numpy is not None and isinstance(value, (numpy.Generator, numpy.RandomState))


def _plain(value: Any) -> Any:
    """A state of numpy's with lists for its arrays, some of which torch's tensors could not hold."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if type(value).__module__ == "numpy" else value
