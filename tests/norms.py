"""Windows over normalisation layers, in float64: what the tests of pooled statistics share."""

import contextlib

import pytest
import torch
from torch import nn

from autoaccum.batch_norm.pooled_statistics import PooledStatistics
from autoaccum.ranks import Ranks

SIZES = (5, 4, 4)  # ragged: 13 is prime


@pytest.fixture(autouse=True)
def float64():
    """Runs each test in float64, from the same seed."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch(*shape, samples=13, seed=1):
    """Samples whose mean and spread differ from one to the next, so that micro-batches disagree."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(samples, *shape, generator=generator)
    slope = torch.linspace(-2, 3, samples).view(-1, *(1 for _ in shape))
    return data * (1 + slope.abs()) + 4 * slope


def pooled(model, mode="pooled"):
    """A model's pooled statistics, whose hooks leave it at the end."""
    return contextlib.closing(PooledStatistics(model, mode))


def train_window(statistics, model, samples, sizes=SIZES):
    micros = samples.split(sizes)
    statistics.begin(len(micros))
    for micro in micros:
        model(micro.clone().requires_grad_()).sum().backward()
    statistics.commit(Ranks())


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(module, expected, tolerance=0.0):
    """Every buffer and parameter equals `expected`: bit for bit, or relatively to `tolerance`."""
    found = module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if tolerance:
            torch.testing.assert_close(
                found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert torch.equal(found[name], value), f"{name}: {found[name]} is not {value}"


class Force(nn.Module):
    """A force field in small: asks for gradients inside its forward, with a BatchNorm on the way."""

    def __init__(self, spatial: bool) -> None:
        """`spatial`: BatchNorm sees several values a channel in each sample."""
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 1)
        self.norm = nn.BatchNorm2d(8) if spatial else nn.BatchNorm1d(8)
        self.spatial = spatial

    def forward(self, x):
        x = x.detach().requires_grad_()
        hidden = self.first(x)
        if self.spatial:
            hidden = self.norm(torch.stack((hidden, 2 * hidden), -1)[..., None]).mean((2, 3))
        else:
            hidden = self.norm(hidden)
        energy = self.last(torch.tanh(hidden)).sum()
        return -torch.autograd.grad(energy, x, create_graph=self.training)[0]
