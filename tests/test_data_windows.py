"""Windows hold exactly the target, each sample once; ranks, restarts and smaller micro-batches change nothing of it."""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from autoaccum.data import tree
from autoaccum.data.source import Source, open_source
from autoaccum.data.windows import Window, windows
from autoaccum.errors import AutoaccumError, DataError, PlanError
from autoaccum.planning.plan import Plan, plan
from autoaccum.planning.split import Windows
from autoaccum.ranks import Ranks


class Indices(Dataset):
    """index -> index, remembering what was read."""

    def __init__(self, length: int = 20) -> None:
        self.length, self.reads = length, []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        self.reads.append(index)
        return index


class Augmented(Indices):
    """index -> (index, noise from torch, noise from Python)."""

    def __getitem__(self, index: int) -> tuple[int, float, float]:
        return index, float(torch.rand(1)), random.random()


class Counting(IterableDataset):
    """Numbers, sharded among workers; each with noise from torch's global generator."""

    def __init__(self, length: int = 20) -> None:
        self.length = length

    def __iter__(self) -> Iterator[tuple[int, float]]:
        info = get_worker_info()
        for number in range(info.id if info else 0, self.length, info.num_workers if info else 1):
            yield number, float(torch.rand(1))


class InTurn(Ranks):
    """Several ranks in one process, one after the other: rank 0's messages are kept for the others."""

    def __init__(self, rank: int, size: int, messages: list[Any]) -> None:
        self.rank, self.size = rank, size
        self._kept, self._inbox = messages, deque(messages)

    def broadcast(self, what: str, tensor: torch.Tensor) -> torch.Tensor:
        if self.rank == 0:
            self._kept.append(tensor.clone())
            return tensor
        return tensor.copy_(self._inbox.popleft())

    def fail(self) -> None:
        self.meet("an error", failed=True)

    def meet(
        self, what: str, values: Sequence[float] = (), own: float = 0, *, failed: bool = False
    ) -> tuple[list[float], list[float]]:
        if self.rank == 0:
            self._kept.append((list(values), failed))
            return list(values), [own]
        sums, down = self._inbox.popleft()
        if down:
            raise AutoaccumError("rank 0 of 2 failed")
        return [a + b for a, b in zip(sums, values)], [own]


def of_rank(make: Callable[[], Any], limits: Sequence[int], target: int, **options: Any) -> list[list[Window]]:
    """The windows of every rank."""
    messages: list[Any] = []
    result = []
    for rank in range(len(limits)):
        torch.manual_seed(100 + rank)  # ranks do not agree by themselves
        cut = plan(list(limits), target, world_size=len(limits), rank=rank, **options)
        source = open_source(make(), ranks=InTurn(rank, len(limits), messages))
        result.append(list(windows(source, lambda cut=cut: cut, 0)))
    return result


def numbers(batch: Any) -> list[int]:
    first = next(tensor for _, tensor in tree.tensors(batch))
    return first.reshape(first.size(0), -1)[:, 0].int().tolist()


def drawn(source: Source, cut: Plan | Callable[[], Plan], epoch: int = 0, start: int = 0) -> list[list[int]]:
    """The samples of each window."""
    ask = (lambda: cut) if isinstance(cut, Plan) else cut
    found = []
    for window in windows(source, ask, epoch, start=start):
        assert tuple(map(tree.batch_size, window.batches)) == window.sizes
        assert sum(window.sizes) == window.samples
        found.append([number for batch in window.batches for number in numbers(batch)])
    return found


def flat(parts: list[list[int]]) -> list[int]:
    return [number for part in parts for number in part]


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ready(sizes: Sequence[int], width: Callable[[int], int] = lambda number: 2) -> DataLoader:
    total, batches = 0, []
    for number, size in enumerate(sizes):
        batches.append(torch.arange(total, total + size).unsqueeze(1).expand(size, width(number)).clone())
        total += size
    return DataLoader(batches, batch_size=None)


KINDS: dict[str, Callable[[int], Any]] = {
    "tensors": lambda n: (torch.arange(n), torch.arange(n)),
    "dataset": Indices,
    "loader": lambda n: DataLoader(Indices(n), batch_size=3, shuffle=True),
    "loader of tensors": lambda n: DataLoader(TensorDataset(torch.arange(n)), batch_size=3, shuffle=True),
    "lone sampler": lambda n: DataLoader(Indices(n), batch_size=3, sampler=[n - 1 - i for i in range(n)]),
    "stream": Counting,
    "loader of a stream": lambda n: DataLoader(Counting(n), batch_size=3),
    "generator": lambda n: iter(range(n)),
    "ready batches": lambda n: ready([7] * (n // 7) + ([n % 7] if n % 7 else [])),
    "batch sampler": lambda n: DataLoader(Indices(n), batch_sampler=BatchSampler(RandomSampler(range(n)), 5, False)),
}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
indexed = pytest.mark.parametrize("name", ["tensors", "dataset", "loader", "loader of tensors", "batch sampler"])


# --- sizes ---


@kinds
def test_every_window_but_the_last_has_exactly_the_target(make):
    found = drawn(open_source(make(23)), plan(3, 8))
    assert [len(window) for window in found] == [8, 8, 7]
    assert sorted(flat(found)) == list(range(23))


@kinds
def test_a_dropped_tail_is_not_trained_on(make):
    found = drawn(open_source(make(23)), plan(3, 8, tail="drop"))
    assert [len(window) for window in found] == [8, 8]
    assert len(set(flat(found))) == 16


@kinds
def test_a_tail_that_cannot_be_cut_joins_the_window_before_it(make):
    source = open_source(make(17))
    if source.kind == "ready batches":
        return  # these are cut where they end; see below
    found = list(windows(source, lambda: plan(4, 8, minimum=2), 0))
    assert [window.total for window in found] == [8, 9]
    assert min(size for window in found for size in window.sizes) >= 2


def test_a_loader_that_drops_its_last_batch_drops_the_last_window():
    for loader in (DataLoader(Indices(), 3, drop_last=True), DataLoader(Counting(), 3, drop_last=True)):
        assert [len(window) for window in drawn(open_source(loader), plan(3, 8))] == [8, 8]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["tensors", "dataset", "stream", "lone sampler"]),
    st.integers(1, 40),
    st.integers(1, 15),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from(["step", "drop"]),
)
def test_lists_and_streams_are_cut_as_the_arithmetic_says(name, length, target, limit, minimum, tail):
    try:
        cut = plan(limit, target, minimum=minimum, tail=tail)
    except PlanError:
        assume(False)
    expected = list(Windows(target, tail=tail, minimum=minimum, limit=limit).sizes(length))
    source = open_source(KINDS[name](length), seed=0)
    found = list(windows(source, lambda: cut, 0))
    assert [window.total for window in found] == expected
    assert [window.sizes for window in found] == [cut.split(total) for total in expected]
    trained = [number for window in found for batch in window.batches for number in numbers(batch)]
    assert len(set(trained)) == len(trained) == sum(expected)


def test_an_endless_sampler_and_an_endless_stream_are_read_as_far_as_wanted():
    class Endless(Sampler):
        reads = 0

        def __iter__(self):
            while True:
                self.reads += 1
                yield self.reads % 5

    def counting():
        number = 0
        while True:
            yield (number := number + 1)

    sampler = Endless()
    source = open_source(DataLoader(Indices(5), batch_size=2, sampler=sampler))
    assert source.length is None
    assert len(list(islice(windows(source, lambda: plan(4, 8), 0), 3))) == 3
    assert sampler.reads == 24
    assert len(list(islice(windows(open_source(counting()), lambda: plan(4, 8), 0), 3))) == 3


# --- order ---


def test_a_seed_decides_the_order_whatever_the_global_generator_did():
    orders = []
    for state in (1, 2):
        torch.manual_seed(state)
        source = open_source(Indices(), seed=7)
        orders.append([flat(drawn(source, plan(4, 8), epoch)) for epoch in range(2)])
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[0][1]
    assert flat(drawn(open_source(Indices(), seed=8), plan(4, 8))) != orders[0][0]


@pytest.mark.parametrize("name", ["dataset", "tensors"])
def test_datasets_are_shuffled_alike_and_only_if_wanted(name):
    assert flat(drawn(open_source(KINDS[name](20), shuffle=False), plan(4, 8))) == list(range(20))
    assert flat(drawn(open_source(KINDS[name](20), seed=7), plan(4, 8))) == flat(
        drawn(open_source(Indices(), seed=7), plan(4, 8))
    )


@pytest.mark.parametrize("own_generator", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda g: DataLoader(Indices(), batch_size=4, shuffle=True, generator=g),
        lambda g: DataLoader(TensorDataset(torch.arange(20)), batch_size=4, shuffle=True, generator=g),
        lambda g: DataLoader(Indices(), 4, sampler=WeightedRandomSampler(torch.ones(20), 30, generator=g), generator=g),
        lambda g: DataLoader(Indices(), 4, shuffle=True, generator=g, num_workers=1),
    ],
    ids=["dataset", "tensors", "weighted", "worker"],
)
def test_a_loader_shows_the_order_of_a_loop_by_hand(make, own_generator):
    torch.manual_seed(11)
    by_hand = [
        [i for batch in loader for i in numbers(batch)] for loader in [make(generator() if own_generator else None)] * 2
    ]
    after = torch.rand(1)
    torch.manual_seed(11)
    source = open_source(make(generator() if own_generator else None))
    assert [flat(drawn(source, plan(3, 8), epoch)) for epoch in range(2)] == by_hand
    assert torch.equal(torch.rand(1), after)


def test_a_seed_decides_the_order_of_a_loaders_sampler_too():
    orders = set()
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        orders.add(tuple(flat(drawn(open_source(KINDS["loader"](20), seed=7), plan(4, 8)))))
        assert torch.equal(torch.get_rng_state(), before)
    assert len(orders) == 1


def test_a_distributed_sampler_keeps_its_shuffle_and_seed_and_loses_its_sharding():
    dataset = Indices(21)
    for sampler in (
        DistributedSampler(dataset, num_replicas=4, rank=2, shuffle=True, seed=5),
        DistributedSampler(dataset, num_replicas=4, rank=2, shuffle=False),
    ):
        alone = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=sampler.shuffle, seed=sampler.seed)
        for epoch in range(2):
            alone.set_epoch(epoch)
            for loader in (
                DataLoader(dataset, batch_size=4, sampler=sampler),
                DataLoader(dataset, batch_sampler=BatchSampler(sampler, 4, False)),
            ):
                assert flat(drawn(open_source(loader), plan(3, 8), epoch)) == list(alone)
        assert len(sampler) == 6


# --- ranks ---


@kinds
@pytest.mark.parametrize("limits", [(3, 3), (5, 2), (4, 4, 4)])
def test_the_ranks_parts_tile_every_window(make, limits):
    alone = open_source(make(23))
    lengths = [len(window) for window in drawn(alone, plan(3, 9))]
    ranks = of_rank(lambda: make(23), limits, 9)
    assert [[window.total for window in rank] for rank in ranks] == [lengths] * len(limits)
    trained = [n for rank in ranks for window in rank for batch in window.batches for n in numbers(batch)]
    assert sorted(trained) == list(range(23))
    for parts in zip(*ranks):
        assert sum(window.samples for window in parts) == parts[0].total
        assert all(size <= limit for window, limit in zip(parts, limits) for size in window.sizes)


def test_the_ranks_together_see_what_one_would_have_seen():
    orders = []
    for make in (lambda: KINDS["loader"](20), lambda: KINDS["dataset"](20), lambda: KINDS["batch sampler"](20)):
        ranks = of_rank(make, (2, 2), 8)
        together = [
            [n for window in parts for batch in window.batches for n in numbers(batch)] for parts in zip(*ranks)
        ]
        torch.manual_seed(100)
        orders.append(together == drawn(open_source(make()), plan(2, 8)))
    assert orders == [True, True, True]


def test_ready_batches_are_the_same_on_ranks_whose_generators_differ():
    def make() -> DataLoader:
        own = torch.Generator().manual_seed(torch.initial_seed())
        return DataLoader(Indices(), batch_sampler=BatchSampler(RandomSampler(range(20), generator=own), 5, False))

    ranks = of_rank(make, (2, 2), 8)
    assert sorted(n for rank in ranks for window in rank for batch in window.batches for n in numbers(batch)) == list(
        range(20)
    )


def test_a_rank_without_samples_gets_a_window_without_batches():
    first, second = of_rank(lambda: torch.arange(5), (4, 4), 4)
    assert [(window.total, window.sizes) for window in first] == [(4, (2,)), (1, (1,))]
    assert [(window.total, window.sizes, window.batches) for window in second][1] == (1, (), [])
    workers = lambda: DataLoader(Indices(5), batch_size=2, num_workers=1)  # noqa: E731
    assert [window.sizes for window in of_rank(workers, (4, 4), 4)[1]] == [(2,), ()]


def test_a_rank_whose_first_one_fails_does_not_wait_for_it():
    class Failing(Sampler):
        def __iter__(self):
            raise OSError("no order today")

    messages: list[Any] = []
    for rank, error in ((0, DataError), (1, AutoaccumError)):
        source = open_source(DataLoader(Indices(), 4, sampler=Failing()), ranks=InTurn(rank, 2, messages))
        with pytest.raises(error):
            drawn(source, plan(4, 8, world_size=2, rank=rank))


def test_keys_that_are_no_integers_are_refused_on_several_ranks():
    source = open_source(DataLoader({"a": 1, "b": 2}, 4, sampler=["a", "b"]), ranks=InTurn(0, 2, []))
    with pytest.raises(DataError, match="integers"):
        drawn(source, plan(4, 8, world_size=2))


def test_a_plan_for_other_ranks_is_refused():
    with pytest.raises(DataError, match="rank 1 of 2, and rank 0 of 1"):
        drawn(open_source(torch.arange(20)), plan(4, 8, world_size=2, rank=1))


# --- the plan changes on the way ---


@kinds
@pytest.mark.parametrize("workers", [0, 2])
def test_smaller_micro_batches_on_the_way_lose_and_repeat_nothing(make, workers):
    data = make(40)
    if workers:
        if not isinstance(data, DataLoader) or data.batch_size is None:
            return
        data = (
            DataLoader(data.dataset, data.batch_size, sampler=data.sampler, num_workers=workers)
            if not isinstance(data.dataset, IterableDataset)
            else DataLoader(data.dataset, data.batch_size, num_workers=workers)
        )
    plans = [plan(8, 8)]
    found = []
    for window in windows(open_source(data), lambda: plans[-1], 0):
        found.append(window)
        if len(found) == 2:
            plans.append(plans[0].with_limit(3, "out of memory"))
    assert [window.total for window in found] == [8] * 5
    assert all(window.sizes == (3, 3, 2) or len(window.sizes) >= 3 for window in found[2:])
    assert sorted(n for window in found for batch in window.batches for n in numbers(batch)) == list(range(40))


@pytest.mark.parametrize("persistent", [False, True])
def test_what_workers_fetched_ahead_is_collated_in_the_new_sizes(persistent):
    loader = DataLoader(Indices(64), batch_size=4, num_workers=2, collate_fn=with_count, persistent_workers=persistent)
    plans = [plan(8, 8)]
    source = open_source(loader)
    for epoch in range(2):
        found = []
        for window in windows(source, lambda: plans[-1], epoch):
            found.append([(batch[0].tolist(), int(batch[1][0])) for batch in window.batches])
            plans.append(plans[-1].with_limit(8 if len(found) < 3 else 4, "out of memory"))
        counts = [[count for _, count in window] for window in found]
        assert counts == ([[8]] * 3 + [[4, 4]] * 5 if epoch == 0 else [[4, 4]] + [[8]] * 2 + [[4, 4]] * 5)
        assert [n for window in found for part, _ in window for n in part] == list(range(64))


def with_count(samples: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(samples), torch.full((len(samples),), len(samples))


# --- going on in the middle ---


@kinds
def test_the_rest_of_an_epoch_is_as_it_would_have_been(make):
    torch.manual_seed(1)
    source = open_source(make(23))
    whole = drawn(source, plan(3, 8))
    if source.one_shot:
        source = open_source(make(23))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert drawn(source, plan(4, 8), start=1) == whole[1:]
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn(source, plan(4, 8), start=2) == whole[2:] if not source.one_shot else True


@indexed
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_new_process_goes_on_with_the_same_order(name, seed, start):
    def opened() -> Source:
        data = KINDS[name](23)
        if isinstance(data, DataLoader) and data.batch_size is not None:
            data = DataLoader(data.dataset, 3, shuffle=True, generator=own)
        return open_source(data, seed=seed)

    torch.manual_seed(1)
    own = generator()
    source = opened()
    drawn(source, plan(3, 8), 0)
    expected: list[list[int]] = []
    iterator = windows(source, lambda: plan(3, 8), 1)
    expected = [[n for batch in window.batches for n in numbers(batch)] for window in islice(iterator, start)]
    state, rng = source.state_dict(), torch.get_rng_state()
    rest = [[n for batch in window.batches for n in numbers(batch)] for window in iterator]
    following = drawn(source, plan(3, 8), 2)

    torch.manual_seed(99)
    own = generator(99)
    resumed = opened()
    resumed.load_state_dict(state)
    torch.set_rng_state(rng)
    assert drawn(resumed, plan(3, 8), 1, start=start) == rest
    assert drawn(resumed, plan(3, 8), 2) == following
    assert len(expected) == start


def test_windows_passed_over_are_not_fetched():
    dataset = Indices(1000)
    for loader in (dataset, DataLoader(dataset, batch_size=4, shuffle=True)):
        dataset.reads.clear()
        assert len(drawn(open_source(loader), plan(4, 8), start=120)) == 5
        assert len(dataset.reads) == 40


def test_a_stream_that_shuffles_with_the_global_generators_repeats_itself():
    class Shuffling(IterableDataset):
        def __iter__(self):
            order = torch.randperm(20).tolist()
            random.shuffle(order)
            return iter(order)

    for data in (Shuffling(), DataLoader(Shuffling(), batch_size=4)):
        source = open_source(data)
        whole = drawn(source, plan(3, 8))
        torch.rand(5)
        random.random()
        fresh = open_source(data)
        fresh.load_state_dict(source.state_dict())
        assert drawn(fresh, plan(3, 8), start=1) == whole[1:]
        assert drawn(source, plan(3, 8), 1) != whole


def test_a_sampler_of_the_users_that_draws_on_the_way_repeats_itself():
    class Drawing(Sampler):
        def __len__(self):
            return 20

        def __iter__(self):
            for _ in range(20):
                yield int(torch.randint(20, ())) if random.random() < 0.5 else random.randrange(20)

    source = open_source(DataLoader(Indices(), 4, sampler=Drawing()))
    whole = []
    for window in windows(source, lambda: plan(3, 8), 0):
        torch.rand(3)  # the model's dropout
        random.random()
        whole.append([n for batch in window.batches for n in numbers(batch)])
    assert drawn(source, plan(2, 8), start=1) == whole[1:]


# --- what workers draw ---


def noise(source: Source, cut: Plan, epoch: int = 0, start: int = 0) -> list[tuple[float, ...]]:
    return [
        tuple(sample)
        for window in windows(source, lambda: cut, epoch, start=start)
        for batch in window.batches
        for sample in zip(*(part.tolist() for part in batch))
    ]


def test_augmentation_in_workers_does_not_depend_on_micro_batches_workers_or_restarts():
    def source(workers: int) -> Source:
        return open_source(DataLoader(Augmented(), 4, shuffle=True, num_workers=workers), seed=3)

    whole = noise(source(1), plan(8, 8))
    assert noise(source(2), plan(3, 8)) == whole
    assert noise(source(2), plan(3, 8), start=1) == whole[8:]
    assert len({sample[1] for sample in whole}) == len({sample[2] for sample in whole}) == 20
    assert {sample[1] for sample in noise(source(1), plan(8, 8), epoch=1)}.isdisjoint({sample[1] for sample in whole})


def test_a_sample_that_is_shown_twice_is_augmented_in_two_ways():
    loader = DataLoader(Augmented(), 4, sampler=[5] * 12, num_workers=1)
    assert len({sample[1] for sample in noise(open_source(loader, seed=3), plan(4, 4))}) == 12


def test_without_a_seed_a_restart_still_repeats_the_workers_draws():
    source = open_source(DataLoader(Augmented(), 4, shuffle=True, num_workers=1))
    whole = noise(source, plan(4, 8))
    resumed = open_source(DataLoader(Augmented(), 4, shuffle=True, num_workers=2))
    resumed.load_state_dict(source.state_dict())
    assert noise(resumed, plan(4, 8), start=1) == whole[8:]


def test_in_this_process_samples_draw_from_the_generators_as_they_are():
    torch.manual_seed(4)
    expected = [float(torch.rand(1)) for _ in range(20)]
    torch.manual_seed(4)
    found = noise(open_source(Augmented(), shuffle=False), plan(3, 8))
    assert [sample[1] for sample in found] == pytest.approx(expected)


def masking(samples: list[tuple[int, float, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([sample[0] for sample in samples]), torch.rand(len(samples))


def test_a_collate_function_that_draws_repeats_itself_after_a_restart():
    def source() -> Source:
        return open_source(DataLoader(Augmented(), 4, shuffle=True, num_workers=2, collate_fn=masking), seed=3)

    assert noise(source(), plan(3, 8), start=1) == noise(source(), plan(3, 8))[8:]


class Together(Indices):
    """Fetches several at once and draws nothing, as a Hugging Face dataset without a transform."""

    format = {"type": None}  # noqa: RUF012

    def __getitems__(self, indices: list[int]) -> list[tuple[int, float, float]]:
        return [(index, 0.0, 0.0) for index in indices]


def test_a_collate_function_that_draws_repeats_itself_where_samples_are_fetched_together():
    def source(state: int) -> Source:
        torch.manual_seed(state)
        return open_source(DataLoader(Together(), 4, num_workers=2, collate_fn=masking), seed=3)

    assert noise(source(1), plan(3, 8), start=1) == noise(source(2), plan(3, 8))[8:]


def test_a_stream_in_workers_repeats_itself_with_a_seed():
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        found.append(noise(open_source(DataLoader(Counting(), 4, num_workers=2), seed=3), plan(3, 8)))
    assert found[0] == found[1]
    assert sorted(int(sample[0]) for sample in found[0]) == list(range(20))


# --- ready batches ---


def test_ready_batches_are_cut_where_a_window_ends_and_evenly_where_they_do_not_fit():
    source = open_source(ready([10, 10, 10], width=lambda number: number + 1))
    found = list(windows(source, lambda: plan(4, 12), 0))
    assert [window.sizes for window in found] == [(4, 3, 3, 2), (4, 4, 4), (3, 3)]
    assert [[batch.size(1) for batch in window.batches] for window in found] == [[1, 1, 1, 2], [2, 2, 3], [3, 3]]


def test_a_part_below_the_minimum_joins_its_neighbour():
    source = open_source(ready([9, 9, 9]))
    found = list(windows(source, lambda: plan(5, 10, minimum=2), 0))
    assert min(size for window in found for size in window.sizes) >= 2
    assert flat([numbers(batch[:, 0]) for window in found for batch in window.batches]) == list(range(27))


def test_a_part_below_the_minimum_that_cannot_be_joined_is_an_error():
    source = open_source(ready([9, 9, 9], width=lambda number: number + 1))
    with pytest.raises(DataError, match="cannot be joined"):
        list(windows(source, lambda: plan(5, 10, minimum=2), 0))
    with pytest.raises(DataError, match="3 samples of a ready batch"):
        list(windows(open_source(ready([3, 3])), lambda: plan(2, 6, minimum=2), 0))


# --- tensors ---


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_model_that_writes_to_its_input_does_not_write_to_the_data(shuffle):
    x = torch.arange(40.0).unsqueeze(1)
    original = x.clone()
    source = open_source((x, torch.arange(40)), shuffle=shuffle, seed=1)
    for epoch in range(2):
        for window in windows(source, lambda: plan(4, 8), epoch):
            for batch in window.batches:
                assert batch[0][:, 0].tolist() == batch[1].tolist()
                batch[0].neg_()
    assert torch.equal(x, original)


def test_tensors_made_in_inference_mode_are_data_too():
    with torch.inference_mode():
        x = torch.arange(20)
    assert flat(drawn(open_source(x, shuffle=False), plan(4, 8))) == list(range(20))


@pytest.mark.parametrize("shuffle", [True, False])
def test_sparse_tensors_are_data_too(shuffle):
    x = torch.eye(10).to_sparse()
    found = list(windows(open_source((x, torch.arange(10)), shuffle=shuffle), lambda: plan(2, 4), 0))
    for window in found:
        for rows, label in window.batches:
            assert torch.equal(rows.to_dense().argmax(1), label)
    assert [window.sizes for window in found] == [(2, 2), (2, 2), (2,)]


def test_a_want_of_memory_while_samples_are_read_is_called_one():
    class Huge(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.empty(2**60)

    with pytest.raises(DataError, match="the host's memory ran out, in which all samples of a step wait: lower"):
        next(windows(open_source(Huge()), lambda: plan(2, 4), 0))
