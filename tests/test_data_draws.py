"""Generators that samplers, datasets and collate functions hold come back wherever reading goes on."""

import io
import random

import numpy
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Sampler, Subset, default_collate

from autoaccum.data.draws import held, restore, state_of
from autoaccum.data.source import open_source
from autoaccum.data.windows import windows
from autoaccum.errors import CheckpointError
from autoaccum.planning.plan import plan

MAKE = {
    "torch": lambda: torch.Generator().manual_seed(0),
    "python": lambda: random.Random(0),
    "numpy": lambda: numpy.random.default_rng(0),
    "philox": lambda: numpy.random.Generator(numpy.random.Philox(0)),
    "sfc": lambda: numpy.random.Generator(numpy.random.SFC64(0)),
    "old numpy": lambda: numpy.random.RandomState(0),
}
every_kind = pytest.mark.parametrize("kind", list(MAKE))


def draw(generator):
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    if isinstance(generator, random.Random):
        return generator.gauss(0, 1)
    return float(generator.normal() if isinstance(generator, numpy.random.Generator) else generator.randn())


def written_and_read(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Noisy:
    """Samples of an index and a number that its own generator drew."""

    def __init__(self, kind):
        self.rng = MAKE[kind]()

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.tensor([float(index), draw(self.rng)])


class Stream(Noisy, IterableDataset):
    def __iter__(self):
        return (self[index] for index in range(20))


class Own(Sampler):
    """Shuffles with its own generator: at its beginning, or index by index."""

    def __init__(self, kind, lazy=False):
        self.mine, self.lazy = MAKE[kind](), lazy

    def __len__(self):
        return 20

    def __iter__(self):
        if self.lazy:
            return iter(int(abs(draw(self.mine)) * 1000) % 20 for _ in range(20))
        return iter(sorted(range(20), key=lambda _: draw(self.mine)))


class Collate:
    def __init__(self, kind):
        self.rng = MAKE[kind]()

    def __call__(self, samples):
        return default_collate(samples) + draw(self.rng)


class Stateful:
    """Draws from what nobody can see, and says where it stands."""

    def __init__(self, kind):
        rng = MAKE[kind]()
        self.draw = lambda: draw(rng)
        self.state_dict = lambda: {"rng": state_of(rng)}
        self.load_state_dict = lambda state: restore(rng, state["rng"])

    def __call__(self, samples):
        return default_collate(samples) + self.draw()


class StatefulDataset(Stateful, Noisy):
    def __getitem__(self, index):
        return torch.tensor([float(index), self.draw()])


LOADERS = {
    "sampler": lambda kind: DataLoader(Noisy(kind), 4, sampler=Own(kind)),
    "lazy sampler": lambda kind: DataLoader(Noisy(kind), 4, sampler=Own(kind, lazy=True)),
    "dataset": lambda kind: DataLoader(ConcatDataset([Subset(Noisy(kind), range(10)), Noisy(kind)]), 4, shuffle=True),
    "list": Noisy,
    "collate": lambda kind: DataLoader(Noisy(kind), 4, collate_fn=Collate(kind)),
    "method": lambda kind: DataLoader(list(range(20)), 4, collate_fn=Collate(kind).__call__),
    "state": lambda kind: DataLoader(StatefulDataset(kind), 4, sampler=Own(kind), collate_fn=Stateful(kind)),
    "state of a stream's": lambda kind: DataLoader(Stream(kind), 4, collate_fn=Stateful(kind)),
    "stream": lambda kind: DataLoader(Stream(kind), 4, collate_fn=Collate(kind)),
    "iterable": Stream,
    "ready": lambda kind: DataLoader(
        Noisy(kind), batch_sampler=torch.utils.data.BatchSampler(Own(kind), 3, False), collate_fn=Collate(kind)
    ),
}


def read(source, epoch, start=0, stop=None):
    found = []
    for window in windows(source, lambda: plan(3, 4), epoch, start=start):
        found.append([batch.flatten().tolist() for batch in window.batches])
        if start + len(found) == stop:
            break
    return found


@every_kind
@pytest.mark.parametrize("name", list(LOADERS))
@pytest.mark.parametrize("stop", [1, 3])
def test_an_epoch_that_was_left_or_resumed_goes_on_as_if_it_had_not_been(name, kind, stop):
    torch.manual_seed(1)
    whole = open_source(LOADERS[name](kind))
    expected = [read(whole, epoch) for epoch in range(3)]

    torch.manual_seed(1)
    source = open_source(LOADERS[name](kind))
    source.trial(5)
    assert read(source, 0) == expected[0], "a trial leaves no trace"
    assert read(source, 1, 0, stop) == expected[1][:stop]
    state, rng = written_and_read(source.state_dict()), torch.get_rng_state()
    assert read(source, 1, stop) == expected[1][stop:]
    assert read(source, 2) == expected[2]

    torch.manual_seed(99)
    resumed = open_source(LOADERS[name](kind))
    resumed.trial(5)
    resumed.load_state_dict(state)
    torch.set_rng_state(rng)
    assert read(resumed, 1, stop) == expected[1][stop:]
    assert read(resumed, 2) == expected[2]


@pytest.mark.parametrize("name", ["lazy sampler", "list"])
def test_a_window_names_its_samples_by_their_indices(name):
    for window in windows(open_source(LOADERS[name]("numpy")), lambda: plan(3, 4), 0):
        assert list(window.indices) == [int(row[0]) for batch in window.batches for row in batch]


def test_indices_that_a_sampler_gives_as_tensors_are_plain_numbers_in_a_window():
    loader = DataLoader(list(range(6)), 4, sampler=torch.tensor([4, 2, 0, 5]))
    (window,) = windows(open_source(loader), lambda: plan(3, 4), 0)
    assert window.indices == [4, 2, 0, 5]
    assert all(type(index) is int for index in window.indices)


@every_kind
def test_a_state_is_plain_and_puts_back_what_is_drawn_next(kind):
    generator = MAKE[kind]()
    draw(generator)  # of a pair of normal values: the second is kept
    state = written_and_read(state_of(generator))
    want = [draw(generator) for _ in range(3)]
    other = MAKE[kind]()
    restore(other, state)
    assert [draw(other) for _ in range(3)] == want


def test_what_is_nobodys_own_or_has_no_state_is_passed_over():
    class Holds:
        def __init__(self):
            self.all = [torch.default_generator, numpy.random.mtrand._rand]
            self.a, self.b = self.all
            self.c, self.d = random.getstate.__self__, random.SystemRandom()
            self.e = self.f = random.Random(3)
            self.dataset = [random.Random(4)]
            self.transforms = [Collate("python").__call__, {}]

    owner = Holds()
    assert list(held({"it": owner})) == ["it.e", "it.transforms[0].rng"]
    owner.dataset = owner
    assert len(held({"it": owner})) == 2


def test_a_generator_of_another_kind_is_refused_by_its_name():
    state = open_source(LOADERS["sampler"]("numpy")).state_dict()
    with pytest.raises(CheckpointError, match=r"sampler\.mine, a numpy Generator of PCG64, and here that is random"):
        open_source(LOADERS["sampler"]("python")).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"sampler\.mine, .* and here that is none"):
        open_source(DataLoader(Noisy("numpy"), 4)).load_state_dict(state)
