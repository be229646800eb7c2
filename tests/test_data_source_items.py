"""What is not a Dataset or a DataLoader is read as what it plainly is, or asked about; and pieces without samples."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

import autoaccum
from autoaccum.data import tree
from autoaccum.data.source import open_source
from autoaccum.data.windows import windows
from autoaccum.errors import DataError
from autoaccum.planning.plan import plan

X = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 3
BATCHES = [(X[start : start + 8], Y[start : start + 8]) for start in range(0, 40, 8)]


class OwnLoader:
    """As people write them: an __iter__, and what it was made with."""

    def __init__(self, batch_size):
        self.batch_size = batch_size

    def __iter__(self):
        return ((X[start : start + self.batch_size], Y[start : start + self.batch_size]) for start in range(0, 40, 8))


class Yielding:
    """An __iter__ and nothing beside it."""

    def __iter__(self):
        return iter(BATCHES)


def read(data, target=16, limit=4):
    found = list(windows(open_source(data, shuffle=False), lambda: plan(limit, target), 0))
    assert all(size == tree.batch_size(b) for window in found for size, b in zip(window.sizes, window.batches))
    return found


def samples_of(found):
    return torch.cat([batch[0] for window in found for batch in window.batches])


@pytest.mark.parametrize(
    "make",
    [
        lambda: OwnLoader(8),
        lambda: DataLoader(BATCHES, batch_size=None),
        lambda: (batch for (batch,) in zip(DataLoader(TensorDataset(X, Y), 8))),
    ],
    ids=["a loader of one's own", "a list in a DataLoader", "a generator over zip"],
)
def test_ready_batches_are_cut_into_windows_of_samples(make):
    data = make()
    if hasattr(data, "send"):
        with pytest.raises(DataError, match="may be a ready batch of 8 or one sample"):
            read(data)
        return
    found = read(data)
    assert [window.total for window in found] == [16, 16, 8]
    assert torch.equal(samples_of(found), X)


@pytest.mark.parametrize("data", [BATCHES, iter(BATCHES), Yielding(), zip(*map(list, zip(*BATCHES)))])
def test_what_may_be_a_batch_or_a_sample_is_asked_about(data):
    with pytest.raises(DataError, match=r"\[0\] of shape \(8, 5\) and \[1\] of shape \(8,\), and may be a ready batch"):
        read(data)
    with pytest.raises(DataError, match="may be a ready batch of 8"):
        autoaccum.prepare(nn.Linear(5, 3), BATCHES, loss=nn.CrossEntropyLoss(), target_batch=16, device="cpu")


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


@pytest.mark.parametrize(
    "data",
    [
        list(zip(X, Y)),
        list(zip(X, Y.tolist())),
        [{"ids": torch.zeros(8), "labels": torch.zeros(8)} for _ in range(40)],
        [(torch.zeros(3, 4, 4), torch.zeros(3, 8, 8)) for _ in range(40)],
        [(torch.zeros(3, 4, 4), torch.zeros(4, 4)) for _ in range(40)],
        TensorDataset(torch.zeros(40, 8, 5), torch.zeros(40, 8)),
        Stream([(torch.zeros(8, 5), torch.zeros(8))] * 40),
        DataLoader([(torch.zeros(8, 5), torch.zeros(8))] * 40, batch_size=2),
    ],
    ids=["rows", "labels", "sequences", "images", "masks", "dataset", "stream", "loader of a list"],
)
def test_what_is_plainly_samples_is_not_asked_about(data):
    assert [window.total for window in read(data)] == [16, 16, 8]


# --- other libraries' ways of holding data


def test_arrays_are_read_as_tensors_are():
    numpy = pytest.importorskip("numpy")
    for data in ((X.numpy(), Y.numpy()), {"x": X.numpy(), "labels": Y.numpy()}, X.numpy()):
        found = read(data)
        first = found[0].batches[0]
        rows = first["x"] if isinstance(data, dict) else first[0] if isinstance(data, tuple) else first
        assert torch.equal(rows, X[:4])
        assert [window.total for window in found] == [16, 16, 8]
    locked = X.numpy().copy()
    locked.flags.writeable = False
    assert torch.equal(read((locked, Y.numpy()))[0].batches[0][0], X[:4])
    with pytest.raises(DataError, match="array of object, which no tensor can hold"):
        open_source((numpy.array([{}, {}]), numpy.zeros(2)))
    with pytest.raises(DataError, match="disagree"):
        open_source((X.numpy(), Y.numpy()[:7]))


def test_a_table_is_refused_with_what_to_give():
    table = SimpleNamespace(columns=["a", "b"], to_numpy=X.numpy, iloc=None)
    with pytest.raises(DataError, match=r"a table.*give \(torch\.tensor\(table\[features\]"):
        open_source(table)


class Graphs:
    """As PyTorch Geometric joins graphs: nodes of all in one tensor, and which graph each belongs to."""

    def __init__(self, x, batch, y):
        self.x, self.batch, self.y, self.num_graphs = x, batch, y, len(y)

    @classmethod
    def from_data_list(cls, graphs):
        sizes = torch.tensor([len(graph["x"]) for graph in graphs])
        return cls(
            torch.cat([graph["x"] for graph in graphs]), torch.arange(len(graphs)).repeat_interleave(sizes),
            torch.stack([graph["y"] for graph in graphs]),
        )  # fmt: skip

    def to_data_list(self):
        return [{"x": self.x[self.batch == graph], "y": self.y[graph]} for graph in range(self.num_graphs)]

    def to(self, device, non_blocking=False):
        return Graphs(self.x.to(device), self.batch.to(device), self.y.to(device))


class DataGraphs(Graphs):
    """The class that joins makes subclasses, one for each sort of graph."""


GRAPHS = [{"x": torch.full((index % 4 + 1, 5), float(index)), "y": torch.tensor(index % 3)} for index in range(24)]


def classified(model, graphs):
    sums = torch.zeros(graphs.num_graphs, 5).index_add(0, graphs.batch, graphs.x)
    return nn.functional.cross_entropy(model(sums), graphs.y)


def test_a_lone_batch_of_graphs_is_cut_between_graphs():
    def trained(micro_batch):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        loader = DataLoader(GRAPHS, 4, collate_fn=Graphs.from_data_list)
        result = autoaccum.fit(model, loader, step=classified, target_batch=8, micro_batch=micro_batch, epochs=1,
                               optimizer="sgd", lr=0.01, lr_rule="none", seed=0, device="cpu")  # fmt: skip
        assert [record.samples for record in result.history] == [8, 8, 8]
        return model.weight.detach()

    assert torch.allclose(trained(3), trained(8), rtol=1e-5)
    whole = DataGraphs.from_data_list(GRAPHS[:5])
    parts = tree.split(whole, (2, 3))
    assert [part.num_graphs for part in parts] == [2, 3]
    assert torch.equal(tree.join(parts).x, whole.x)
    assert tree.repeat(whole, 7).num_graphs == 7


# --- a collate function that drops samples


def whole_ones(samples):
    return default_collate([sample for sample in samples if sample is not None])


def or_none(samples):
    kept = [sample for sample in samples if sample is not None]
    return default_collate(kept) if kept else None


def or_no_rows(samples):
    return or_none(samples) or (torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))


def corrupt(broken):
    return [None if index in broken else (X[index], Y[index]) for index in range(40)]


@pytest.mark.parametrize("collate", [whole_ones, or_none, or_no_rows])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_micro_batch_that_is_left_empty_counts_as_none(collate, workers):
    broken = {0, 5, 8, 9, 10, 11, *range(24, 32)}
    loader = DataLoader(corrupt(broken), 4, collate_fn=collate, num_workers=workers)
    found = read(loader, target=8)
    kept = [index for index in range(40) if index not in broken]
    assert torch.equal(samples_of(found), X[kept])
    assert [len(window.batches) for window in found] == [2, 1, 2, 0, 2]


def test_a_training_goes_on_where_micro_batches_are_left_empty():
    broken = {0, 5, 8, 9, 10, 11, *range(24, 32)}

    def trained(data, micro_batch, target):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        result = autoaccum.fit(
            model, DataLoader(data, 4, collate_fn=whole_ones), loss=nn.CrossEntropyLoss(), target_batch=target,
            micro_batch=micro_batch, epochs=1, optimizer="sgd", lr=0.1, lr_rule="none", device="cpu",
        )  # fmt: skip
        return model.weight.detach(), [record.samples for record in result.history]

    weights, samples = trained(corrupt(broken), 4, 40)
    by_hand, _ = trained([sample for sample in corrupt(broken) if sample is not None], 26, 26)
    assert samples == [26]
    assert torch.allclose(weights, by_hand, rtol=1e-5)
    _, samples = trained(corrupt(broken), 4, 8)
    assert sum(samples) == 26


def test_a_trial_has_as_many_samples_as_it_was_asked_for_though_some_are_dropped():
    source = open_source(DataLoader(corrupt(set(range(0, 40, 3))), 4, collate_fn=whole_ones))
    assert [tree.batch_size(source.trial(size)) for size in (1, 2, 7, 16)] == [1, 2, 7, 16]
    with pytest.raises(DataError, match="dropped all 4 samples"):
        open_source(DataLoader(corrupt(set(range(40))), 4, collate_fn=whole_ones)).trial(4)


def test_a_collate_function_that_joins_samples_to_one_row_is_refused():
    texts = [torch.arange(1, 3 + index % 5) for index in range(12)]
    joining = DataLoader(texts, 4, collate_fn=lambda samples: {"tokens": torch.cat(samples)[None]})
    assert tree.batch_size(open_source(joining).trial(1)) == 1
    with pytest.raises(DataError, match=r"joined 3 samples to one row.*pad samples.*attach"):
        open_source(joining).trial(3)
    alone = DataLoader(texts, 4, collate_fn=lambda samples: {"tokens": samples[0][None]})  # drops all but one
    assert tree.batch_size(open_source(alone).trial(3)) == 3


def test_a_collate_function_that_fails_with_nothing_left_is_told_so_and_not_about_padding():
    def stacking(samples):
        return torch.stack([sample[0] for sample in samples if sample is not None])

    with pytest.raises(DataError, match="let it return None") as caught:
        read(DataLoader(corrupt({0, 1, 2, 3}), 4, collate_fn=stacking))
    assert "pads" not in str(caught.value)


def test_ready_batches_that_can_be_read_once_are_tried_and_all_trained_on():
    class Once(IterableDataset):
        def __init__(self):
            self.batches = iter([torch.arange(start, start + 4) for start in range(0, 80, 4)])

        def __iter__(self):
            return self.batches

    source = open_source(DataLoader(Once(), batch_size=None))
    assert source.trial(3).tolist() == [0, 1, 2]
    assert source.trial(50).tolist() == list(range(50))
    found = [batch for window in windows(source, lambda: plan(8, 16), 0) for batch in window.batches]
    assert torch.cat(found).tolist() == list(range(80))
