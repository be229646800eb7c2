"""Models compiled to TorchScript: their buffers lie in C++, and no function mode sees into them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.checking.diagnosis import Cause
from autoaccum.model.given_model import layer_class
from autoaccum.model.snapshot import Snapshot
from autoaccum.window.determinism import Determinism
from autoaccum.window.noise_scale import NoiseScale

CPU = torch.device("cpu")
ROWS = [[0, 1, 2], [7, 6], [3]]


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))


class Moving(nn.Module):
    """A buffer that each forward makes anew."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen = self.seen + x.shape[0]
        return self.layer(x)


class Rows(nn.Module):
    """A container, which has no code of its own."""

    def __init__(self):
        super().__init__()
        self.rows = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 4)])

    def forward(self, x):
        for row in self.rows:
            x = row(x)
        return x


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        assert x.shape[0] == 8, "eight samples are wanted"
        return self.layer(x)


MODELS = {
    "scripted": lambda: torch.jit.script(layers()),
    "traced": lambda: torch.jit.trace(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), torch.randn(4, 6)),
    "a part of another": lambda: nn.Sequential(torch.jit.script(layers()), nn.Linear(4, 4)),
    "with a moving buffer": lambda: torch.jit.script(Moving()),
    "with a list of layers": lambda: torch.jit.script(Rows()),
}


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_probed_verified_and_trained(name, micro_batch, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path))
    data = torch.randn(32, 6), torch.randint(0, 4, (32,))
    loop = autoaccum.prepare(
        MODELS[name](), data, loss=F.cross_entropy, target_batch=8, micro_batch=micro_batch, device="cpu"
    )
    assert loop.verify.verifiable
    assert loop.verify.ok
    assert [record.samples for record in loop] == [8] * 4


@pytest.mark.parametrize("make", [layers, Moving])
def test_buffers_come_back(make):
    model = torch.jit.script(make())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Snapshot(model, torch.optim.SGD(model.parameters(), lr=0.1), device=CPU):
        model(torch.randn(4, 6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_samples_are_held_apart_as_in_any_other_model():
    model, inputs = torch.jit.script(layers()), torch.randn(8, 6)
    with Determinism(model, samples=8, device=CPU) as fixed:
        assert fixed.normalises
        fixed.begin(range(8))
        whole = model(inputs)
        for rows in ROWS:
            fixed.begin(rows)
            assert torch.allclose(model(inputs[rows]), whole[rows], atol=1e-6)
    assert torch.allclose(layers().eval()(inputs), whole, atol=1e-6)
    assert all(module.training for module in model.modules())


def test_a_layer_is_known_by_what_it_was():
    scripted = torch.jit.script(layers())
    assert layer_class(scripted[1]) is nn.BatchNorm1d
    assert layer_class(torch.jit.script(Moving())) is torch.jit.RecursiveScriptModule
    assert layer_class(nn.Linear(1, 1)) is nn.Linear
    assert "BatchNorm" in NoiseScale(scripted, list(scripted.parameters())).why_not


def test_a_part_that_cannot_be_run_is_no_crash():
    """A fixed view: TorchScript's own error says so."""
    model = torch.jit.script(Fixed())
    report = autoaccum.verify(model, (torch.randn(8, 6), torch.randint(0, 4, (8,))), loss=F.cross_entropy, device="cpu")
    assert not report.ok
    assert report.cause == Cause.SIZE_BOUND


def test_the_smallest_micro_batch_is_found():
    data = torch.randn(33, 6), torch.randint(0, 4, (33,))
    report = autoaccum.probe(torch.jit.script(layers()), data, loss=F.cross_entropy, cache=False, device="cpu")
    assert report.floor == 2
