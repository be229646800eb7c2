"""What every source of samples has in common: what is known of it, trials, and an epoch's base.

Choices made here:

- A source draws nothing when it is opened or tried, so that probing leaves the generators alone. Each epoch draws one
  number when it begins, and nothing where nothing depends on it.
- The state that makes an epoch repeatable is that of the generators it drew from, at its start. It is kept for the
  epoch in progress and goes into checkpoints; an epoch that is entered again in the middle (`start > 0`) begins from it
  and leaves the global generators as they are.
- Generators that the user's own objects hold (see `held.py`) are of two kinds. What is asked again for the windows
  passed over, as a sampler is, begins again where the epoch began. What is not, as a dataset whose samples are not
  fetched again, goes on from where it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoaccum.data import tree
from autoaccum.data.cuts import Cutter
from autoaccum.data.draws import draw, mix, preserved
from autoaccum.data.held import held, restore, state_of
from autoaccum.data.per_sample import ListReader
from autoaccum.data.sample_lengths import ByLength, Padding, Ruler, find_ruler, measured
from autoaccum.errors import CheckpointError, DataError, shown
from autoaccum.interrupts import interruptible
from autoaccum.planning.plan import Plan
from autoaccum.ranks import Ranks

__all__ = ["Read", "Source"]


class Read(NamedTuple):
    """A window as a source reads it."""

    total: int
    """Samples over all ranks."""
    sizes: tuple[int, ...]
    """Of this rank's micro-batches."""
    batches: list[Any]
    padding: Padding | None = None
    """Where it was cut by length."""


class Source(ABC):
    """The user's data. `open_source` makes it; `windows` reads it.

    Attributes:
        kind: what it was made from, in a word.
        length: samples in an epoch; None where it has no known end.
        loader_batch: the DataLoader's batch size, where there is one.
        drop_last: the DataLoader drops a short last batch.
        one_shot: it can be read only once.
        varies: one line on samples that differ in size, once a trial has looked at some; None where they do not.
        mixed: why no one length tells the memory, where samples differ in size in more than one way.
    """

    kind: str
    length: int | None = None
    loader_batch: int | None = None
    drop_last: bool = False
    one_shot: bool = False
    varies: str | None = None
    mixed: str | None = None

    def __init__(self, *, seed: int | None, ranks: Ranks, worst_case: Any) -> None:
        self._seed, self._ranks, self._worst_case = seed, ranks, worst_case
        self._epoch: int | None = None
        self._starts: list[Tensor] = []
        self._held_starts: dict[str, Any] = {}
        self._ruler: Ruler | None = None
        self._lengths: tuple[int, ...] | None = None
        self._measured: list[tuple[int, Any]] = []  # the samples looked at, each after its length
        self._lists = ListReader()

    def trial(self, size: int, length: int | None = None) -> Any:
        """`size` real samples as one batch on the host; where there are fewer, they are repeated.

        Nothing is used up, and no generator is changed. Where samples differ in size, the largest of those looked at
        are taken, or those of a `length`, one of `lengths()`. `worst_case` is taken instead, where it was given.

        Raises:
            DataError: there are no samples, or they cannot be read or collated.
        """
        if size < 1:
            raise DataError(f"a trial of {size} samples: it needs at least one")
        if length is not None:
            if not self._measured:
                self._measure()
            alike = [sample for own, sample in self._measured if own == length]
            with self._untouched():
                chosen = [tree.map_tensors(_itself, alike[number % len(alike)]) for number in range(size)]
                return self.marked(self._collated(chosen))
        if self._worst_case is None:
            return _filled(self.marked(interruptible(self._trial, size)), size)
        if not callable(self._worst_case):
            given = self._worst_case
            if isinstance(given, (list, tuple)) and all(isinstance(each, Number) for each in given):
                raise DataError(
                    f"worst_case={shown(given)} is a list of numbers: give a batch as the data's own are, or f(n) -> "
                    "such a batch of n samples"
                )
            return tree.repeat(self._worst_case, size)
        batch = interruptible(self._worst_case, size)
        found = tree.batch_size(batch)
        if found != size:
            raise DataError(
                f"worst_case({size}) returned a batch of {found} samples: it must have as many as asked for"
            )
        return batch

    def marked(self, batch: Any) -> Any:
        """A batch of this data in which lists that could be mistaken say by their type what they hold.

        Raises:
            DataError: nothing tells whether a list holds one item a sample.
        """
        return self._lists.read(batch, self._trial)

    def lengths(self) -> tuple[int, ...]:
        """The lengths of the samples looked at, rising, where one size of a batch follows from its samples; else none.

        With a `worst_case` there are none: what to make room for was said.
        """
        if self._lengths is None:
            interruptible(self._measure)
        return self._lengths or ()

    def short_and_long(self) -> tuple[tuple[Any, Any], Any] | None:
        """A short and a long sample, each as a batch alone, and both in one; None where that cannot be compared.

        A collate function that draws, to mask words for example, makes another batch each time.
        """
        lengths = self.lengths()
        if not lengths:
            return None
        if not self._measured:
            self._measure()
        chosen = [lengths[len(lengths) // 4], lengths[-1]]
        pair = [next(sample for own, sample in self._measured if own == length) for length in chosen]
        with self._untouched():
            groups = [pair[:1], pair[1:], pair, pair]
            short, long, both, again = (
                self._collated([tree.map_tensors(_itself, sample) for sample in group]) for group in groups
            )
        same = all(torch.equal(a, b) for (_, a), (_, b) in zip(tree.tensors(both), tree.tensors(again)))
        return ((short, long), both) if same else None

    def by_length(self, plan: Plan) -> ByLength | None:
        """How windows are cut by length; None where the plan does not say so, or samples do not differ."""
        rule = plan.length_rule
        if rule is None:
            return None
        self.lengths()
        self._measured = []  # trials are over: what was kept for them is let go
        return None if self._ruler is None else ByLength(rule, self._ruler)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this data from other data, for checkpoints and caches: plain values."""
        return {"kind": self.kind, "length": self.length}

    def state_dict(self) -> dict[str, Any]:
        """What makes the epoch in progress repeatable: its number, and generators' states as byte tensors."""
        return {
            "epoch": self._epoch,
            "starts": list(self._starts),
            "generators": [generator.get_state() for generator in self._own_generators()],
            "held": {name: state_of(generator) for name, generator in self._held(self._owners()).items()},
            "held_starts": dict(self._held_starts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on as the source that gave `state` would have.

        Raises:
            CheckpointError: that source drew from other generators.
        """
        here = self._held(self._owners())
        kept_of = state.get("held", {})  # older checkpoints have none
        for name, kept in kept_of.items():
            kind = state_of(here[name])["kind"] if name in here else "none"
            if kind != kept["kind"]:
                raise CheckpointError(
                    f"the checkpoint's data drew from {name}, a {kept['kind']}, and here that is {kind}: give the same "
                    "data, with its generators made when it is made, or start a training of its own"
                )
        own, starts = self._own_generators(), list(state["starts"])
        expected = len(self._generators())
        if len(own) != len(state["generators"]) or (state["epoch"] is not None and len(starts) not in (0, expected)):
            raise CheckpointError(
                f"the checkpoint's data drew from {len(starts)} random generators and this data draws from {expected}: "
                "give the same data, with the same seed and generators, or start a training of its own"
            )
        for generator, kept in zip(own, state["generators"]):
            generator.set_state(kept)
        for name, kept in kept_of.items():
            restore(here[name], kept)
        self._epoch, self._starts, self._held_starts = state["epoch"], starts, dict(state.get("held_starts", {}))

    def expect_ranks(self, rank: int, world_size: int) -> None:
        """Checks that a plan for one of several ranks is for this one.

        Raises:
            DataError: it is for another, so that samples would be lost or seen twice.
        """
        here = (self._ranks.rank, self._ranks.size)
        if here != (rank, world_size):
            raise DataError(
                f"the plan is for rank {rank} of {world_size}, and rank {here[0]} of {here[1]} reads the data: make "
                f"the plan with rank={here[0]} and world_size={here[1]}"
            )

    @abstractmethod
    def first(self) -> Any:
        """A few samples as the data gives them, read anew at each call where that can be done."""

    @abstractmethod
    def read(self, epoch: int, cutter: Cutter, start: int) -> Iterator[Read]:
        """The epoch's windows from the one numbered `start`; those before it are passed over."""

    def indices(self, epoch: int, cutter: Cutter, index: int) -> Sequence[Any] | None:
        """The dataset's indices of one window of the epoch in progress, this rank's part; for saying what is wrong.

        None where samples have none, and on several ranks, where the others would have to be asked.
        """
        return None

    @abstractmethod
    def _trial(self, size: int) -> Any:
        """`size` samples of the data as one batch."""

    # --- lengths ---

    def _some_samples(self) -> list[Any]:
        """A few of the samples, those that trials are made of; none where they do not differ in size."""
        return []

    def _collated(self, samples: list[Any]) -> Any:
        """The samples as one batch."""
        raise DataError(f"{self.kind} are not collated here")

    def _measure(self) -> None:
        samples = [] if self._worst_case is not None else self._some_samples()
        with self._untouched():
            self._ruler, self.mixed = find_ruler(samples, self._collated) if samples else (None, None)
            if self._ruler is not None:
                self._measured = list(zip(measured(samples, self._collated, self._ruler), samples))
        self._lengths = tuple(sorted({length for length, _ in self._measured}))

    # --- an epoch's base ---

    def _own_generators(self) -> list[torch.Generator]:
        """Generators of the user's that reading the data draws from."""
        return []

    def _base_generator(self) -> torch.Generator | None:
        """What a base is drawn from; None: it follows from the seed."""
        return torch.default_generator if self._seed is None else None

    def _generators(self) -> list[torch.Generator]:
        found = [*self._own_generators(), self._base_generator()]
        return list({id(generator): generator for generator in found if generator is not None}.values())

    def _replayed(self) -> dict[str, Any]:
        """The user's objects that are asked again where an epoch is entered in its middle, by name."""
        return {}

    def _continued(self) -> dict[str, Any]:
        """Those that are not, by name."""
        return {}

    def _owners(self) -> dict[str, Any]:
        return {**self._replayed(), **self._continued()}

    def _held(self, owners: Mapping[str, Any]) -> dict[str, Any]:
        """What they hold beside the generators that are known without looking."""
        known = set(map(id, self._own_generators()))
        return {name: generator for name, generator in held(owners).items() if id(generator) not in known}

    def _untouched(self) -> AbstractContextManager[None]:
        """Where samples are looked at: no generator changes, neither a global one nor one that the user holds."""
        return preserved(*self._owners().values())

    def _beginning(self, again: bool) -> AbstractContextManager[None]:
        """Where an epoch is begun: the second time without a trace in the global generators."""
        return preserved() if again else nullcontext()

    def _begin(self, epoch: int, again: bool) -> int:
        """The epoch's base; `again` where its windows up to some were read before."""
        generators, replayed = self._generators(), self._held(self._replayed())
        if again and epoch == self._epoch and len(self._starts) == len(generators):
            for name, state in self._held_starts.items():
                if name in replayed:
                    restore(replayed[name], state)
            for generator, state in zip(generators, self._starts):
                generator.set_state(state)
        else:
            self._epoch, self._starts = epoch, [generator.get_state() for generator in generators]
            self._held_starts = {name: state_of(generator) for name, generator in replayed.items()}
        source = self._base_generator()
        base = mix(self._seed or 0, epoch) if source is None else draw(source)
        if self._ranks.size > 1:
            base = int(self._ranks.broadcast(f"epoch {epoch}'s beginning", torch.tensor(base, dtype=torch.int64)))
        return base


def _filled(batch: Any, size: int) -> Any:
    """The batch with `size` samples again, where a collate function dropped some."""
    if batch is None:
        raise DataError(
            f"the collate function dropped all {size} samples of a trial: repair the data, or leave out what cannot be "
            "read with a Subset"
        )
    return tree.repeat(batch, size) if 0 < tree.batch_size(batch) < size else batch


def _itself(tensor: Tensor) -> Tensor:
    return tensor
