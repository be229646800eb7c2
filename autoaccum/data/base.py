"""What every source of samples has in common: what is known of it, trials, and an epoch's base.

Choices made here:

- A source draws nothing when it is opened or tried: probing leaves the generators alone. Each epoch draws one number
  when it begins, its base (see `draws.py`), where something depends on it.
- The states at an epoch's start make it repeatable. They go into checkpoints; an epoch that is entered again in the
  middle (`start > 0`) begins from them.
- Of the user's own objects, what is asked again for the windows passed over, as a sampler is, begins again where the
  epoch began; what is not, as a dataset whose samples are not fetched again, goes on from where it is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from autoaccum.data import tree
from autoaccum.data.cuts import Cutter
from autoaccum.data.draws import draw, held, mix, preserved, restore, state_of
from autoaccum.data.per_sample import ListReader
from autoaccum.data.sample_lengths import ByLength, Padding, Ruler, find_ruler
from autoaccum.data.trial_samples import Pool
from autoaccum.errors import CheckpointError, DataError
from autoaccum.interrupts import interruptible
from autoaccum.planning.plan import Plan
from autoaccum.ranks import Ranks

__all__ = ["Read", "Source"]


class Read(NamedTuple):
    """A window as a source reads it: samples over all ranks, and this rank's micro-batches.

    `indices` are those of this rank's samples in the dataset, as they stand in the micro-batches, where they have some.
    """

    total: int
    batches: list[Any]
    padding: Padding | None = None
    indices: Any = None


class Source(ABC):
    """The user's data. `open_source` makes it; `windows` reads it.

    Attributes:
        kind: what it was made from, in a word.
        length: samples in an epoch; None where it has no known end.
        loader_batch: the DataLoader's batch size, where there is one.
        drop_last: the DataLoader drops a short last batch.
        one_shot: it can be read only once.
        varies: one line on samples that differ in size, once a trial has looked at some; None where they do not.
        ranks: this process among others.
        draws: whether reading on in an epoch may draw from the global generators, or run what does.
        mixed: why no one length tells the memory, where samples differ in size in more than one way.
    """

    kind: str
    length: int | None = None
    loader_batch: int | None = None
    drop_last: bool = False
    one_shot: bool = False
    draws: bool = True
    varies: str | None = None
    mixed: str | None = None
    _pool: Pool | None = None  # of samples for trials, where the data gives single ones
    _generator: torch.Generator | None = None  # a DataLoader's own
    _collated: Callable[[list[Any]], Any]  # samples -> a batch

    def __init__(self, *, seed: int | None, ranks: Ranks, worst_case: Any) -> None:
        self._seed, self.ranks, self._worst_case = seed, ranks, worst_case
        # The user's objects by name: what is asked again where an epoch is entered in its middle, and what is not.
        self._replayed: dict[str, Any] = {}
        self._continued: dict[str, Any] = {}
        self._epoch: int | None = None
        self._starts: dict[str, Any] = {}  # states at the beginning of the epoch in progress
        self._ruler: Ruler | None = None
        self._lengths: tuple[int, ...] | None = None
        self._measured: list[tuple[int, Any]] = []  # the samples looked at, each after its length
        self._lists = ListReader()

    def trial(self, size: int, length: int | None = None) -> Any:
        """`size` real samples as one batch on the host; where there are fewer, they are repeated.

        Nothing is used up, and no generator is changed. Where samples differ in size, the largest of those looked at
        are taken, or those of a `length`, one of `lengths()`. `worst_case` is taken instead, where it was given. A
        DataError where there are no samples, or they cannot be read or collated.
        """
        if size < 1:
            raise DataError(f"a trial of {size} samples: it needs at least one")
        if length is not None:
            alike = [sample for own, sample in self._samples_measured() if own == length]
            with self._untouched():
                return self.marked(self._collated([tree.copied(alike[place % len(alike)]) for place in range(size)]))
        if self._worst_case is None:
            batch = self.marked(interruptible(self._trial, size))
            if batch is None:
                raise DataError(
                    f"the collate function dropped all {size} samples of a trial: repair the data, or leave out what "
                    "cannot be read with a Subset"
                )
            # Some may have been dropped.
            return tree.repeat(batch, size) if 0 < tree.batch_size(batch) < size else batch
        if not callable(self._worst_case):
            return tree.repeat(self._worst_case, size)
        batch = interruptible(self._worst_case, size)
        found = tree.batch_size(batch)
        if found != size:
            raise DataError(
                f"worst_case({size}) returned a batch of {found} samples: it must have as many as asked for"
            )
        return batch

    def marked(self, batch: Any) -> Any:
        """A batch of this data in which lists that could be mistaken are marked, or a DataError; see `ListReader`."""
        return self._lists.read(batch, self._trial)

    def lengths(self) -> tuple[int, ...]:
        """The lengths of the samples looked at, rising, where one size of a batch follows from its samples; else none.

        With a `worst_case` there are none: what to make room for was said.
        """
        if self._lengths is None:
            interruptible(self._samples_measured)
        return self._lengths or ()

    def short_and_long(self) -> tuple[tuple[Any, Any], Any] | None:
        """A short and a long sample, each as a batch alone, and both in one; None where that cannot be compared.

        A collate function that draws, to mask words for example, makes another batch each time.
        """
        lengths = self.lengths()
        if not lengths:
            return None
        chosen = (lengths[len(lengths) // 4], lengths[-1])
        pair = [next(sample for own, sample in self._samples_measured() if own == length) for length in chosen]
        with self._untouched():
            short, long, both, again = (
                self._collated([tree.copied(sample) for sample in group]) for group in (pair[:1], pair[1:], pair, pair)
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
        """What makes the epoch in progress repeatable: its number, and what it and its samples are drawn from."""
        now = {name: state_of(each) for name, each in self._held().items()}
        return {"epoch": self._epoch, "starts": dict(self._starts), "held": now}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on as the source that gave `state`; a CheckpointError where that drew from other generators."""
        here, kept = self._held(), state["held"]
        for name, before in kept.items():
            kind = state_of(here[name])["kind"] if name in here else "none"
            if kind != before["kind"]:
                raise CheckpointError(
                    f"the checkpoint's data drew from {name}, a {before['kind']}, and here that is {kind}: give the "
                    "same data, with its random generators made when it is made, or start a training of its own"
                )
        for name, before in kept.items():
            restore(here[name], before)
        self._epoch, self._starts = state["epoch"], dict(state["starts"])

    @abstractmethod
    def first(self) -> Any:
        """A few samples as the data gives them, read anew at each call where that can be done."""

    @abstractmethod
    def read(self, epoch: int, cutter: Cutter, start: int) -> Iterator[Read]:
        """The epoch's windows from the one numbered `start`; those before it are passed over."""

    # --- samples looked at ---

    def _trial(self, size: int) -> Any:
        """`size` samples of the data as one batch."""
        assert self._pool is not None
        with self._untouched():
            samples, self.varies = self._pool.choose(size)
            batch = self._collated(samples)
            if size > 1 and batch is not None and tree.batch_size(batch) == 1:
                largest = self._collated(tree.copied(samples[:1]))
                if tree.nbytes(batch) > tree.nbytes(largest) > 0:  # else all but one were dropped
                    raise DataError(
                        f"the collate function joined {size} samples to one row, and a batch is cut and counted by its "
                        "rows: pad samples to one row each (windows are cut by length, so that little is padded); a "
                        "Transformers Trainer with autoaccum.attach() cuts samples before they are joined"
                    )
            return batch

    def _samples_measured(self) -> list[tuple[int, Any]]:
        """Those that trials are made of, each after its length; none where they have no one length."""
        if not self._measured:
            samples: list[Any] = []
            found: list[int] = []
            if self._worst_case is None and self._pool is not None:
                with self._untouched():
                    samples = self._pool.look()
                    self._ruler, found, self.mixed = find_ruler(samples, self._collated)
            self._measured, self._lengths = list(zip(found, samples)), tuple(sorted(set(found)))
        return self._measured

    # --- an epoch's base ---

    def _held(self) -> dict[str, Any]:
        """All that reading draws from, but the global generators."""
        return held(self._replayed) | held(self._continued, states=True)

    def _untouched(self) -> AbstractContextManager[None]:
        """Where samples are looked at: nothing changes that is drawn from."""
        return preserved(self._held().values())

    def _beginning(self, again: bool) -> AbstractContextManager[None]:
        """Where an epoch is begun: the second time without a trace in what goes on from where it is."""
        # A sampler that leads to its dataset leads to generators that the windows passed over have used already.
        return preserved(held(self._continued, states=True).values()) if again else nullcontext()

    def _begin(self, epoch: int, again: bool) -> int:
        """The epoch's base; `again` where its windows up to some were read before."""
        # What the base is drawn from; None: it follows from the seed.
        source = self._generator or (torch.default_generator if self._seed is None else None)
        drawn_from = held(self._replayed) | ({} if source is None else {"base": source})
        if again and epoch == self._epoch:
            for name in drawn_from.keys() & self._starts.keys():
                restore(drawn_from[name], self._starts[name])
        else:
            self._epoch, self._starts = epoch, {name: state_of(each) for name, each in drawn_from.items()}
        base = mix(self._seed or 0, epoch) if source is None else draw(source)
        if self.ranks.size > 1:
            base = int(self.ranks.broadcast(f"epoch {epoch}'s beginning", torch.tensor(base, dtype=torch.int64)))
        return base
