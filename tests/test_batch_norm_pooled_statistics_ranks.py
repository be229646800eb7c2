"""Pooled statistics over ranks: two real processes over gloo, started once; each test looks at what they found."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from autoaccum.ranks import here
from tests.norms import pooled
from tests.ranks_started import started

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")

UNEQUAL = ((5, 2, 3), (4,))  # micro-batches of rank 0 and of rank 1
IDLE = ((5, 4), ())
SYNCHRONISED = ((5, 2, 3), (1, 4, 2))


class Gathering(nn.SyncBatchNorm):
    """SyncBatchNorm without a GPU: gathers all ranks' input, and uses torch's own update on it."""

    def forward(self, data):
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, data.detach())
        self.num_batches_tracked.add_(1)
        nn.functional.batch_norm(
            torch.cat(parts), self.running_mean, self.running_var, training=True, momentum=self.momentum
        )
        return data


class Parallel(nn.Module):
    """Layers that all see the input itself, so that each is a first layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            [
                nn.BatchNorm1d(3),
                nn.InstanceNorm1d(3, momentum=0.3, track_running_stats=True),
                nn.BatchNorm1d(3, momentum=None),
            ]
        ).double()
        self.seldom = nn.BatchNorm1d(3).double()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, data, seldom=False):
        data = sum(layer(data) for layer in self.layers) * self.scale
        return self.seldom(data) if seldom else data


def data(rank, sizes, seed=0):
    torch.manual_seed(100 * seed + rank)
    return [torch.randn(size, 3, 4, dtype=torch.float64) * (1 + rank) + 10 * rank + at for at, size in enumerate(sizes)]


def window(statistics, model, batches):
    statistics.begin(len(batches))
    for at, micro in enumerate(batches):
        model(micro, seldom=at == 0 and len(batches) == 1) if isinstance(model, Parallel) else model(micro)
    statistics.commit(here())


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}

    for name, sizes in (("unequal", UNEQUAL), ("idle", IDLE)):
        model = Parallel()
        with pooled(model) as statistics:
            for seed in range(2):
                window(statistics, model, data(rank, sizes[rank], seed))
        found[name] = model.state_dict()

    model = nn.Sequential(Gathering(3, momentum=0.4).double())
    with pooled(model) as statistics:
        found["talks"] = statistics.synchronised
        window(statistics, model, data(rank, SYNCHRONISED[rank]))
    found["synchronised"] = model.state_dict()

    model = DistributedDataParallel(
        Parallel(), find_unused_parameters=True
    )  # broadcasts rank 0's buffers before each forward
    with pooled(model) as statistics:
        statistics.begin(1)
        for micro in data(rank, SYNCHRONISED[rank]):
            model(micro).sum().backward()
        statistics.commit(here())
    found["ddp"] = model.module.state_dict()

    model = Parallel()
    with pooled(model, "momentum") as statistics:
        window(statistics, model, data(rank, UNEQUAL[rank]))
    found["momentum"] = model.state_dict()

    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    started(work, 2, folder)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


def whole(sizes, windows=1):
    """What one process with all samples at once is left with."""
    model = Parallel()
    for seed in range(windows):
        model(torch.cat([micro for rank in range(2) for micro in data(rank, sizes[rank], seed)]))
    return model.state_dict()


def assert_same(states, expected, names=None):
    for state in states:
        for name, value in expected.items():
            if names is None or name.startswith(names):
                torch.testing.assert_close(
                    state[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.slow
@pytest.mark.parametrize("case", ["unequal", "idle"])
def test_ranks_with_unequal_windows_end_as_one_process_with_the_whole_batch(found, case):
    sizes = {"unequal": UNEQUAL, "idle": IDLE}[case]
    assert_same([rank[case] for rank in found], whole(sizes, windows=2), "layers")


@pytest.mark.slow
def test_a_layer_called_on_one_rank_only_is_updated_on_all(found):
    assert found[0]["unequal"]["seldom.num_batches_tracked"] == 2
    assert torch.equal(found[0]["unequal"]["seldom.running_mean"], found[1]["unequal"]["seldom.running_mean"])


@pytest.mark.slow
def test_synchronised_statistics_count_no_element_twice(found):
    expected = nn.Sequential(nn.BatchNorm1d(3, momentum=0.4).double())
    expected(torch.cat([micro for rank in range(2) for micro in data(rank, SYNCHRONISED[rank])]))
    assert_same([rank["synchronised"] for rank in found], expected.state_dict())
    assert found[0]["talks"]


@pytest.mark.slow
def test_the_buffers_that_ddp_broadcasts_in_mid_window_spoil_nothing(found):
    assert_same([rank["ddp"] for rank in found], whole(SYNCHRONISED), "layers")


@pytest.mark.slow
def test_mode_momentum_leaves_the_same_average_on_all_ranks(found):
    for name in ("layers.0.running_mean", "layers.0.running_var"):
        ends = []
        for rank in range(2):
            layer = nn.BatchNorm1d(3, momentum=1 - 0.9 ** (1 / len(UNEQUAL[rank]))).double()
            for micro in data(rank, UNEQUAL[rank]):
                layer(micro)
            ends.append(layer.state_dict()[name.removeprefix("layers.0.")])
        counts = [sum(sizes) for sizes in UNEQUAL]
        expected = (counts[0] * ends[0] + counts[1] * ends[1]) / sum(counts)
        for rank in range(2):
            torch.testing.assert_close(found[rank]["momentum"][name], expected, rtol=1e-12, atol=1e-12)
