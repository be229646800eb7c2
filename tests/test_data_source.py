"""Whatever the user calls data is opened; trials are real samples and leave no trace; bad data is named."""

import random
from collections import UserDict
from collections.abc import Iterator
from itertools import islice
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    get_worker_info,
)

from autoaccum.data import tree
from autoaccum.data.draws import Lane, mix, preserved
from autoaccum.data.orders import permutation, shared_order
from autoaccum.data.source import Source, open_source
from autoaccum.data.trial_samples import spread
from autoaccum.data.windows import windows
from autoaccum.errors import CheckpointError, DataError
from autoaccum.planning.plan import plan
from autoaccum.ranks import Ranks


class Squares(Dataset):
    """index -> (row, index), counting how often each is read."""

    def __init__(self, length: int = 20, widths: Any = None) -> None:
        self.length, self.widths, self.reads = length, widths, []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        self.reads.append(index)
        return torch.full((self.widths(index) if self.widths else 3,), float(index)), index


class Stream(IterableDataset):
    def __init__(self, length: int = 20) -> None:
        self.length, self.reads = length, 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        for index in range(self.length):
            self.reads += 1
            yield torch.full((3,), float(index)), index


def rows(length: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(length).float().unsqueeze(1).expand(length, 3).clone(), torch.arange(length)


def padded(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.nn.utils.rnn.pad_sequence([sample[0] for sample in samples], batch_first=True)
    return inputs, torch.tensor([sample[1] for sample in samples])


def last_leaf(batch: Any) -> list[int]:
    return [tensor for _, tensor in tree.tensors(batch)][-1].flatten().int().tolist()


def seen(source: Source, target: int = 8, limit: int = 3, epoch: int = 0, start: int = 0) -> list[int]:
    cut = plan(limit, target)
    return [
        i for window in windows(source, lambda: cut, epoch, start=start) for b in window.batches for i in last_leaf(b)
    ]


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ready = BatchSampler(range(20), 6, False)
KINDS = {
    "tensor": lambda: torch.arange(20),
    "tuple of tensors": rows,
    "dict of tensors": lambda: dict(zip("xy", rows())),
    "encoding": lambda: UserDict(zip("xy", rows())),
    "nested tensors": lambda: ({"x": rows()[0]}, rows()[1]),
    "tensor dataset": lambda: TensorDataset(*rows()),
    "dataset": Squares,
    "list": lambda: list(zip(*rows())),
    "subset": lambda: Subset(Squares(40), range(20)),
    "iterable dataset": Stream,
    "iterable": {3.0: 0, 4.0: 1, 5.0: 2}.keys,
    "generator": lambda: iter(list(zip(*rows()))),
    "loader": lambda: DataLoader(Squares(), batch_size=4, shuffle=True),
    "loader of a list": lambda: DataLoader(list(zip(*rows())), batch_size=4),
    "loader of tensors": lambda: DataLoader(TensorDataset(*rows()), batch_size=4, shuffle=True),
    "loader of tensors with a collate": lambda: DataLoader(TensorDataset(*rows()), batch_size=4, collate_fn=padded),
    "loader with a sampler": lambda: DataLoader(Squares(), batch_size=4, sampler=RandomSampler(range(20))),
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=4),
    "loader with a batch sampler": lambda: DataLoader(Squares(), batch_sampler=ready),
    "loader of ready batches": lambda: DataLoader(
        [tree.split(rows(), (6, 7, 7))[i] for i in range(3)], batch_size=None
    ),
}
EVERYTHING = list(range(20))


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_every_sample_is_seen_once_an_epoch(make):
    source = open_source(make(), seed=1)
    expected = [3, 4, 5] if isinstance(make(), type({}.keys())) else EVERYTHING
    assert sorted(seen(source)) == expected


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_trial_has_as_many_real_samples_as_asked_for_and_uses_none_up(make):
    source = open_source(make(), seed=1)
    everything = [3, 4, 5] if isinstance(make(), type({}.keys())) else EVERYTHING
    for size in (1, 2, 5, 20, 23):
        batch = source.trial(size)
        assert tree.batch_size(batch) == size
        distinct = set(last_leaf(batch))
        assert distinct <= set(everything)
        assert len(distinct) == min(size, len(everything))
    assert sorted(seen(source)) == everything


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_opening_and_trying_leave_every_generator_as_it_was(make):
    numpy = pytest.importorskip("numpy")

    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()

    before = states()
    source = open_source(make())
    source.trial(4)
    assert states() == before


def test_lengths_and_batch_sizes_are_known_where_they_can_be():
    assert open_source(rows()).length == 20
    assert open_source(Stream()).length is None
    loader = open_source(DataLoader(Squares(), batch_size=4, drop_last=True))
    assert (loader.length, loader.loader_batch, loader.drop_last, loader.one_shot) == (20, 4, True, False)
    oversampled = DataLoader(Squares(), 4, sampler=RandomSampler(range(20), replacement=True, num_samples=50))
    assert open_source(oversampled).length == 50
    batches = open_source(DataLoader(Squares(), batch_sampler=ready))
    assert (batches.loader_batch, batches.length) == (6, 20)
    assert open_source(DataLoader(Squares(), batch_sampler=BatchSampler(range(20), 6, True))).length == 18
    assert open_source(DataLoader([torch.zeros(6)], batch_size=None)).length is None
    assert open_source(rows()).fingerprint() == {"kind": "tensors", "length": 20}
    assert open_source(open_source(rows())).length == 20


# --- trials ---


def test_a_trials_samples_are_fetched_once_and_without_the_sampler():
    class Forbidden(RandomSampler):
        def __iter__(self):
            raise AssertionError("a trial asked the sampler")

    dataset = Squares()
    source = open_source(DataLoader(dataset, batch_size=4, sampler=Forbidden(dataset)))
    source.trial(2)
    source.trial(8)
    source.trial(16)
    assert len(dataset.reads) == len(set(dataset.reads)) == 16


@pytest.mark.parametrize("indices", [[3, 7, 11], torch.tensor([3, 7, 11])])
@pytest.mark.parametrize("dataset", [Squares(), TensorDataset(*rows())])
def test_a_trials_samples_are_among_those_that_the_sampler_may_show(dataset, indices):
    loader = DataLoader(dataset, batch_size=4, sampler=SubsetRandomSampler(indices))
    assert sorted(last_leaf(open_source(loader).trial(3))) == [3, 7, 11]
    assert sorted(seen(open_source(loader))) == [3, 7, 11]


def test_trials_take_the_largest_samples_and_say_that_sizes_vary():
    dataset = Squares(500, widths=lambda index: 2 + index % 7)
    source = open_source(DataLoader(dataset, batch_size=4, collate_fn=padded))
    assert source.varies is None
    assert {source.trial(size)[0].size(1) for size in (1, 2, 5, 30)} == {8}
    assert "samples differ in size" in source.varies
    assert len(dataset.reads) <= 64


def test_samples_of_one_size_are_not_searched_for_larger_ones():
    dataset = Squares(500)
    source = open_source(dataset)
    source.trial(2)
    assert len(dataset.reads) == 16
    assert source.varies is None


def test_looking_at_samples_begins_all_over_the_dataset_and_misses_none():
    assert sorted(spread(1000)) == list(range(1000))
    first = sorted(list(spread(1000))[:16])
    assert first[0] < 100
    assert first[-1] > 900
    assert list(spread(1000, 10)) == list(spread(1000))[10:]


def test_a_collate_function_that_takes_samples_apart_gets_whole_ones_each_time():
    def collate(samples: list[dict[str, Any]]) -> Any:
        return torch.stack([sample.pop("x") for sample in samples])

    source = open_source(DataLoader([{"x": torch.ones(2)} for _ in range(3)], batch_size=2, collate_fn=collate))
    assert [source.trial(size).shape for size in (2, 5, 5)] == [(2, 2), (5, 2), (5, 2)]


def test_a_trial_leaves_the_datasets_own_generators_as_they_were():
    numpy = pytest.importorskip("numpy")

    class Noisy(Squares):
        def __init__(self) -> None:
            super().__init__()
            self.torch, self.python, self.numpy = generator(), random.Random(0), numpy.random.default_rng(0)
            self.old = numpy.random.RandomState(0)

        def __getitem__(self, index: int) -> float:
            draw = float(torch.rand(1, generator=self.torch)) + self.python.random() + self.numpy.random()
            return draw + self.old.rand()

    dataset = Noisy()
    source = open_source(Subset(dataset, range(10)))
    source.trial(4)
    assert dataset[0] == Noisy()[0]


def test_a_trial_of_tensors_is_a_copy():
    x, y = rows()
    open_source((x, y)).trial(20)[0].zero_()
    assert x[5, 0] == 5


def test_the_worst_case_wins():
    batch = {"x": torch.arange(3)}
    assert open_source(rows(), worst_case=batch).trial(4)["x"].tolist() == [0, 1, 2, 0]
    assert open_source(rows(), worst_case=lambda n: torch.zeros(n, 7)).trial(5).shape == (5, 7)
    with pytest.raises(DataError, match=r"worst_case\(4\) returned a batch of 5"):
        open_source(rows(), worst_case=lambda n: torch.zeros(n + 1)).trial(4)
    with pytest.raises(DataError, match="at least one"):
        open_source(rows()).trial(0)


def test_trials_of_ready_batches_begin_with_the_largest():
    batches = [torch.zeros(4, 2), torch.zeros(3, 9), torch.zeros(4, 5)]
    source = open_source(DataLoader(batches, batch_size=None))
    assert source.trial(2).shape == (2, 9)
    assert source.trial(7).shape == (7, 9)
    assert "ready batches" in source.varies


# --- data that can be read only once ---


@pytest.mark.parametrize("size", [1, 5, 20, 30])
def test_what_a_trial_drew_of_a_generator_is_trained_on_first(size):
    source = open_source(iter(list(zip(*rows()))))
    assert source.one_shot
    source.trial(size)
    source.trial(2)
    assert seen(source) == EVERYTHING


def test_a_generator_has_no_second_epoch():
    source = open_source(iter(list(zip(*rows()))))
    seen(source)
    with pytest.raises(DataError, match=r"only once: window 0 of epoch 1 .*epochs=1"):
        seen(source, epoch=1)


def test_a_generator_goes_on_where_the_loop_was_left():
    source = open_source(iter(list(zip(*rows()))))
    cut = plan(4, 4)
    first = list(islice(windows(source, lambda: cut, 0), 2))
    assert [last_leaf(window.batches) for window in first] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    rest = list(windows(source, lambda: cut, 0, start=2))
    assert [window.index for window in rest] == [2, 3, 4]
    assert last_leaf(rest[0].batches) == [8, 9, 10, 11]


def test_an_iterable_that_hands_out_one_iterator_is_read_once():
    class Shared(IterableDataset):
        def __init__(self) -> None:
            self.samples = iter(range(20))

        def __iter__(self):
            return self.samples

    source = open_source(Shared())
    assert source.one_shot
    source.trial(7)
    assert seen(source) == EVERYTHING
    in_workers = open_source(DataLoader(Shared(), batch_size=4, num_workers=0))
    in_workers.trial(7)
    assert seen(in_workers) == EVERYTHING


def test_an_iterable_of_its_own_epochs_is_read_again():
    source = open_source(Stream())
    assert not source.one_shot
    source.trial(3)
    assert [seen(source, epoch=epoch) for epoch in range(2)] == [EVERYTHING, EVERYTHING]


# --- bad data ---


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "NoneType"),
        (5, "int"),
        ("train.csv", "str"),
        (lambda: iter([]), "call it"),
        ((), "empty tuple"),
        ({}, "empty dict"),
        ((torch.zeros(4), [1, 2, 3, 4]), r"\[1\]\[0\] is int"),
        ({"train": Squares(), "test": Squares()}, r"\['train'\] is Squares"),
        ((torch.zeros(4), torch.tensor(1.0)), "without dimensions"),
        (torch.tensor(1.0), "it is a tensor without dimensions"),
        ((torch.zeros(4), torch.zeros(5)), r"\[0\] has 4 .*\[1\] has 5"),
        ([], "empty"),
        (torch.zeros(0, 3), "empty"),
        (Squares(0), "empty"),
        (TensorDataset, r"type type cannot be read .*TensorDataset.*; call it, and pass what it returns"),
        (DataLoader, "class .*DataLoader.*; call it"),
        (DataLoader(Squares, sampler=[0]), "class .*Squares.*; call it"),
    ],
)
def test_data_that_cannot_be_read_is_refused_when_it_is_opened(data, message):
    with pytest.raises(DataError, match=message):
        open_source(data)


@pytest.mark.parametrize("data", [iter([]), Stream(0), DataLoader(Stream(0), batch_size=2)])
def test_an_empty_stream_is_refused_when_it_is_read(data):
    source = open_source(data)
    with pytest.raises(DataError, match="empty"):
        seen(source)
    with pytest.raises(DataError, match="empty"):
        source.trial(1)


def test_samples_that_do_not_collate_are_named():
    source = open_source([torch.zeros(2), torch.zeros(3)], shuffle=False)
    with pytest.raises(DataError, match=r"samples 0, 1 could not be made into one batch.*collate_fn") as caught:
        seen(source)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_loader_without_batching_over_single_samples_is_refused():
    for dataset in (Squares(), [{"x": torch.zeros(3), "label": torch.tensor(1)}]):
        source = open_source(DataLoader(dataset, batch_size=None))
        with pytest.raises(DataError, match="single sample"):
            seen(source)
        with pytest.raises(DataError, match="single sample"):
            source.trial(2)
    with pytest.raises(DataError, match=r"disagree.*ready batch"):
        seen(open_source(DataLoader([(torch.zeros(3), torch.zeros(4))], batch_size=None)))


class Broken(Squares):
    """One sample cannot be read, with an error that does not survive pickling."""

    class OddError(Exception):
        def __init__(self, code: int, text: str) -> None:
            super().__init__(f"{text} {code}")

    def __getitem__(self, index: int) -> Any:
        if index == 13:
            raise self.OddError(5, "damaged file")
        if index == 14:
            raise StopIteration
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_is_named_and_the_cause_kept(workers):
    source = open_source(DataLoader(Broken(), batch_size=4, num_workers=workers))
    with pytest.raises(DataError, match=r"sample 13 of the dataset \(Broken\) .*damaged file 5") as caught:
        seen(source)
    cause = caught.value.__cause__
    assert "damaged file 5" in str(cause)
    if workers:
        assert "raise self.OddError" in str(cause)


def test_an_index_error_or_a_stop_inside_a_dataset_is_no_silent_end():
    class Short(Squares):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index + 10)

    with pytest.raises(DataError, match="sample 10"):
        seen(open_source(Short(), shuffle=False))
    with pytest.raises(DataError, match=r"sample 0 of the dataset \(Subset\).*StopIteration"):
        seen(open_source(Subset(Broken(), [14])))


def test_a_stream_that_fails_says_how_far_it_came():
    def failing():
        yield from range(7)
        raise OSError("connection lost")

    with pytest.raises(DataError, match=r"after 7 items: OSError: connection lost") as caught:
        seen(open_source(failing()))
    assert isinstance(caught.value.__cause__, OSError)


def test_indices_outside_the_tensors_are_named():
    loader = DataLoader(TensorDataset(torch.zeros(4)), batch_size=2, sampler=[0, 1, 2, 9])
    with pytest.raises(DataError, match=r"rows \[0, 1, 2, 9\]"):
        seen(open_source(loader))


# --- a DataLoader's settings ---


def test_a_sampler_with_other_keys_than_numbers_is_followed():
    class Named(Dataset):
        def __getitem__(self, key: str) -> int:
            return ord(key)

    source = open_source(DataLoader(Named(), batch_size=2, sampler=list("dab")))
    assert [chr(code) for code in seen(source, target=2)] == ["d", "a", "b"]
    with pytest.raises(DataError, match="worst_case="):
        source.trial(1)


def set_up_worker(worker: int) -> None:
    info = get_worker_info()
    info.dataset.offset = 100 + len(info.dataset)


class Offset(Squares):
    offset = 0

    def __getitem__(self, index: int) -> int:
        return index + self.offset


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_are_set_up_by_the_loaders_function(persistent):
    loader = DataLoader(
        Offset(), batch_size=4, num_workers=1, worker_init_fn=set_up_worker, persistent_workers=persistent
    )
    source = open_source(loader)
    for epoch in range(2):
        assert seen(source, epoch=epoch) == [index + 120 for index in range(20)]


def test_a_loader_that_iterates_in_its_own_way_is_taken_at_its_word():
    class Doubling(DataLoader):
        def __iter__(self):
            return (2 * batch for batch in super().__iter__())

    source = open_source(Doubling(torch.arange(20), batch_size=5))
    assert seen(source) == [2 * index for index in range(20)]
    assert max(last_leaf(source.trial(3))) <= 38


def test_a_samplers_and_a_streams_epoch_is_set():
    class Told(RandomSampler):
        epochs: ClassVar[list[int]] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    class ToldStream(Stream):
        set_epoch = Told.set_epoch
        epochs: ClassVar[list[int]] = []

    sampler, stream = Told(range(20)), ToldStream()
    for source in (open_source(DataLoader(Squares(), batch_size=4, sampler=sampler)), open_source(stream)):
        seen(source, epoch=0)
        seen(source, epoch=3)
    assert Told.epochs == ToldStream.epochs == [0, 3]


# --- random numbers ---


def test_a_lane_goes_on_where_it_was_and_does_not_touch_the_others():
    torch.manual_seed(5)
    outside = torch.rand(2)
    torch.manual_seed(5)
    lane = Lane(7)
    with lane:
        inside = [torch.rand(1), random.random()]
    first = torch.rand(1)
    with lane:
        inside += [torch.rand(1), random.random()]
    assert torch.equal(torch.cat([first, torch.rand(1)]), outside)
    with Lane(7):
        again = [torch.rand(1), random.random(), torch.rand(1), random.random()]
    assert inside == again


def test_generators_come_back_after_an_error_too():
    def fails() -> None:
        torch.rand(3)
        raise KeyError

    torch.manual_seed(5)
    state = torch.get_rng_state()
    with pytest.raises(KeyError), preserved():
        fails()
    assert torch.equal(torch.get_rng_state(), state)


def test_mixed_numbers_differ_in_every_argument():
    numbers = {mix(a, b, c) for a in range(6) for b in range(6) for c in range(6)}
    assert len(numbers) == 6**3
    assert all(0 <= number < 2**63 for number in numbers)


def test_a_state_of_other_generators_is_refused():
    state = open_source(DataLoader(Squares(), 4, shuffle=True, generator=generator())).state_dict()
    with pytest.raises(CheckpointError, match="drew from generator, a torch.Generator, and here that is none"):
        open_source(DataLoader(Squares(), 4, shuffle=True)).load_state_dict(state)


def test_a_hugging_face_dataset_gives_tensors():
    datasets = pytest.importorskip("datasets")
    columns = {"x": [[float(index)] * 3 for index in range(20)], "label": list(range(20))}
    source = open_source(datasets.Dataset.from_dict(columns))
    assert source.length == 20
    assert tuple(source.trial(4)["x"].shape) == (4, 3)
    assert sorted(seen(source)) == EVERYTHING
    streamed = open_source(datasets.Dataset.from_dict(columns).to_iterable_dataset())
    assert tuple(streamed.trial(4)["x"].shape) == (4, 3)
    assert seen(streamed) == EVERYTHING
    arrays = open_source(datasets.Dataset.from_dict(columns).with_format("numpy"))
    assert sorted(seen(arrays)) == EVERYTHING


@pytest.mark.parametrize(("data", "kind"), [([], "dataset"), (torch.zeros(0, 3), "tensors")])
def test_data_without_samples_is_said_to_have_none(data, kind):
    with pytest.raises(DataError, match=f"^the data is empty: no samples are in its {kind}, and training needs"):
        open_source(data)


def test_a_samplers_own_type_error_is_not_one_of_its_indices_on_several_ranks():
    def broken():
        raise TypeError("len() of an int")

    with pytest.raises(TypeError, match=r"len\(\) of an int"):
        shared_order(broken, 4, Ranks())
    order = permutation(4, 0)
    order.take = lambda count: ["a", "b", "c", "d"]
    with pytest.raises(DataError, match="indices such as 'a': on several ranks they must be integers"):
        shared_order(lambda: order, 4, Ranks())
