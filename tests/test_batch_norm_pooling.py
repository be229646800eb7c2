"""Pooling: parts of any sizes, in any split over layers and ranks, give the statistics of the whole."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoaccum.batch_norm.norm_layer import NormLayer
from autoaccum.batch_norm.pooling import Pool
from autoaccum.ranks import Ranks

CHANNELS = (2, 3)


def data(seed, elements, channels):
    generator = torch.Generator().manual_seed(seed)
    offset, scale = 10 ** (3 * torch.rand(2, channels, generator=generator, dtype=torch.float64))
    return torch.randn(elements, channels, generator=generator, dtype=torch.float64) * scale + offset


def pool_of():
    modules = [nn.BatchNorm1d(channels, dtype=torch.float64) for channels in CHANNELS]
    for module, count in zip(modules, (torch.tensor(4), None), strict=True):
        module.running_var.zero_()
        module.num_batches_tracked = count
    pool = Pool([NormLayer(None, "", module) for module in modules])
    pool.begin()
    return pool


def enter(pool, parts):
    """Enters calls (layer, elements [n, channels]), several layers at a time where they come in turn."""
    for place, part in parts:
        if pool.layers[place].call is not None:
            pool.collect(counts_only=False)
        pool.layers[place].call = (len(part), part.mean(0), part.var(0))
    pool.collect(counts_only=False)


def update(pool, totals, momenta=(1.0, 1.0), ranks=None):
    for layer, momentum in zip(pool.layers, momenta, strict=True):
        layer.momentum = momentum
    pool.commit(totals, ranks or Ranks(), averages=False)


def assert_statistics(pool, wholes):
    for mean, variance, whole in zip(pool.means, pool.variances, wholes, strict=True):
        torch.testing.assert_close(mean, whole.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(variance, whole.var(0), rtol=1e-10, atol=1e-12)


CALLS = st.lists(st.tuples(st.integers(0, 1), st.integers(2, 9)), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(calls=CALLS, seed=st.integers(0, 10**6))
def test_calls_in_any_order_and_of_any_sizes_pool_to_the_whole(calls, seed):
    calls = [(0, 2), (1, 3), *calls]
    parts = [(place, data(seed + at, size, CHANNELS[place])) for at, (place, size) in enumerate(calls)]
    wholes = [torch.cat([part for place, part in parts if place == wanted]) for wanted in range(2)]
    pool = pool_of()
    enter(pool, parts)
    assert pool.elements == [len(whole) for whole in wholes]
    update(pool, pool.elements)
    assert_statistics(pool, wholes)


@settings(max_examples=15, deadline=None)
@given(shares=st.lists(CALLS, min_size=2, max_size=4), seed=st.integers(0, 10**6))
def test_pools_of_several_ranks_add_up_to_the_whole(shares, seed):
    """A rank may have seen only one of the layers."""
    shares[0] = [(0, 2), (1, 3), *shares[0]]
    pools, everything = [], []
    for rank, calls in enumerate(shares):
        parts = [(place, data(seed + 100 * rank + at, size, CHANNELS[place])) for at, (place, size) in enumerate(calls)]
        pools.append(pool_of())
        enter(pools[-1], parts)
        everything += parts
    totals = [sum(pool.elements[place] for pool in pools) for place in range(2)]
    brought, barrier = {}, threading.Barrier(len(pools))

    class Rank(Ranks):
        """One of several threads, which add up tensors where all have come."""

        def __init__(self, pool):
            self.size, self.pool = len(pools), pool

        def sum(self, what, tensors):
            brought[id(self.pool)] = [tensor.clone() for tensor in tensors]
            barrier.wait()
            for place, tensor in enumerate(tensors):
                tensor.copy_(sum(each[place] for each in brought.values()))
            barrier.wait()

    with ThreadPoolExecutor(len(pools)) as threads:
        list(threads.map(lambda pool: update(pool, totals, ranks=Rank(pool)), pools))
    for pool in pools:
        assert_statistics(
            pool, [torch.cat([part for place, part in everything if place == wanted]) for wanted in range(2)]
        )


def test_a_layer_without_calls_is_put_back_and_keeps_its_count():
    pool = pool_of()
    enter(pool, [(1, torch.tensor([[0.0] * 3, [2.0] * 3, [1.0] * 3], dtype=torch.float64))])
    pool.means[0].fill_(7)
    update(pool, pool.elements)
    assert pool.means[0].tolist() == [0, 0]
    assert pool.means[1].tolist() == [1, 1, 1]
    assert pool.batches[0] == 4


def test_momentum_none_beside_a_number_takes_the_average_so_far():
    pool = pool_of()  # layer 0 has counted 4 batches
    enter(pool, [(0, torch.ones(4, 2, dtype=torch.float64)), (1, torch.ones(4, 3, dtype=torch.float64))])
    update(pool, pool.elements, momenta=(None, 0.25))
    assert pool.means[0].tolist() == [0.2, 0.2]
    assert pool.means[1].tolist() == [0.25, 0.25, 0.25]
