"""Everything a step touches comes back bit for bit."""

import random

import pytest
import torch
from torch import nn

from autoaccum.errors import StateNotRestoredError
from autoaccum.model.snapshot import Snapshot
from autoaccum.random_state import RandomState

CPU = torch.device("cpu")


class Counting(nn.Module):
    """Tied and frozen weights, BatchNorm, dropout, a counter, a list and a plain tensor that forward changes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("codebook", torch.zeros(8))
        self.calls = 0
        self.seen = []
        self.cache = torch.zeros(3)

    def forward(self, x):
        self.calls += 1
        self.seen.append(self.calls)
        self.cache += 1
        self.codebook.add_(x.mean(0).detach())
        self.new_attribute = torch.ones(1)
        return self.head(self.drop(self.norm(self.frozen(self.embed(x)))))


def step(model, optimizer):
    model(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()


def bytes_of(model, optimizer):
    """All state, as comparable values."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [
        {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in optimizer.state[p].items()}
        for p in model.parameters()
        if p in optimizer.state
    ]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return state, moments, gradients, model.calls, list(model.seen), model.cache.clone(), torch.get_rng_state()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


OPTIMIZERS = {
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)),
}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_state_comes_back(name, used):
    torch.manual_seed(0)
    model = Counting()
    optimizer = OPTIMIZERS[name](p for p in model.parameters() if p.requires_grad)
    if used:
        step(model, optimizer)
    else:
        model.calls = 7
    before = bytes_of(model, optimizer)
    identities = [id(tensor) for state in optimizer.state.values() for tensor in state.values()]
    seen, lr = model.seen, float(optimizer.param_groups[0]["lr"])
    with Snapshot(model, optimizer, device=CPU):
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for _ in range(3):
            step(model, optimizer)
            optimizer.zero_grad(set_to_none=True)
        model.eval()
        model.frozen.requires_grad_(True)
        model.head.weight.requires_grad_(False)
    after = bytes_of(model, optimizer)
    assert same(before, after)
    assert model.training
    assert not model.frozen.weight.requires_grad
    assert model.head.weight is model.embed.weight
    assert model.head.weight.requires_grad
    assert model.seen is seen
    assert float(optimizer.param_groups[0]["lr"]) == lr
    if used:
        assert [id(tensor) for state in optimizer.state.values() for tensor in state.values()] == identities
    else:
        assert not optimizer.state
        assert not hasattr(model, "new_attribute")


def test_gradients_that_were_there_come_back_and_none_stays_none():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.grad = torch.full((2, 2), 3.0)
    kept = model[0].weight.grad
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Snapshot(model, optimizer, device=CPU):
        model(torch.randn(4, 2)).sum().backward()
        optimizer.step()
    assert model[0].weight.grad is kept
    assert torch.equal(kept, torch.full((2, 2), 3.0))
    assert model[1].weight.grad is None


def test_strides_and_views_survive():
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    before, strides = layer.weight.detach().clone(), layer.weight.stride()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with Snapshot(layer, optimizer, device=CPU):
        layer(torch.randn(1, 3, 5, 5)).sum().backward()
        optimizer.step()
    assert torch.equal(layer.weight, before)
    assert layer.weight.stride() == strides


def test_an_error_inside_still_restores():
    torch.manual_seed(0)
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = bytes_of(model, optimizer)
    with pytest.raises(KeyboardInterrupt), Snapshot(model, optimizer, device=CPU):
        step(model, optimizer)
        raise KeyboardInterrupt
    assert same(before, bytes_of(model, optimizer))


def test_a_scaler_comes_back():
    model = nn.Linear(2, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    with Snapshot(model, torch.optim.SGD(model.parameters(), lr=0.1), scaler, device=CPU):
        scaler.update(8.0)
    assert scaler.get_scale() == 64.0


def test_a_tensor_resized_in_a_trial_is_reported_not_hidden():
    model = nn.Linear(2, 2)
    snapshot = Snapshot(model, torch.optim.SGD(model.parameters(), lr=0.1), device=CPU)
    model.weight.untyped_storage().resize_(400)
    with pytest.raises(StateNotRestoredError, match="16 bytes was resized to 400"):
        snapshot.restore()
    snapshot.close()


def test_all_random_generators_come_back():
    numpy = pytest.importorskip("numpy")
    state = RandomState(CPU)
    drawn = torch.rand(3).tolist(), random.random(), numpy.random.rand()
    state.restore()
    assert (torch.rand(3).tolist(), random.random(), numpy.random.rand()) == drawn


def test_the_copy_is_kept_out_of_torchs_memory():
    """The copy of a CPU model lies in a file: the process's data segment does not grow by it."""
    model = nn.Linear(2000, 2000)  # 16 MB

    def segment():
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = segment()
    snapshot = Snapshot(model, optimizer, device=CPU)
    grown = segment() - before
    snapshot.close()
    assert grown < 4_000_000
