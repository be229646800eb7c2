"""Random numbers for the data: whose generator is used when, and how it comes back.

Choices made here:

- What an epoch draws follows from one number, its base. With a seed the base is a function of (seed, epoch); without
  one it is drawn as `iter(DataLoader)` draws it, from the loader's generator or else from torch's, so that a loader
  shows its samples in the order that a loop by hand would have seen.
- Code of the user's that draws from the global generators while data is read (samplers, streams) draws from a `Lane`
  instead: the global generators as they would be if only the data used them. So dropout does not change the order of
  the data, nor the data the dropout, and reading an epoch again gives what it gave before.
- Samples that workers fetch are seeded one by one from (base, position in the epoch): neither the number of
  micro-batches, nor of workers, nor a restart changes an augmentation. The position rather than the index, because a
  sampler with replacement may show an index twice in an epoch, and should see it augmented in two ways.
"""

from collections.abc import Iterable
from typing import Any

import torch

from autoaccum.data.held import restore, state_of
from autoaccum.interrupts import uninterrupted
from autoaccum.random_state import RandomState, numpy_random, seed_everything

__all__ = ["Lane", "draw", "mix", "preserved"]

_MASK = 2**64 - 1
_CPU = torch.device("cpu")  # a worker must not touch an accelerator


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


class preserved:
    """Leaves what is drawn from as it was: the global generators, and what of the user's objects was `held`."""

    def __init__(self, held: Iterable[Any] = ()) -> None:
        self._before = RandomState(_CPU)
        self._own = [(each, state_of(each)) for each in held]

    def __enter__(self) -> None:
        """Nothing is to be done here: `__init__` has kept the states."""

    @uninterrupted
    def __exit__(self, *raised: object) -> None:
        self._before.restore()
        for each, state in self._own:
            restore(each, state)
