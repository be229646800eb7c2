"""The ladder and compilation on a GPU: what waits on the host frees the device, at the same gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.model.memory_savers import installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB = 2**20


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inside, self.outside = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.outside(F.gelu(self.inside(x)))


def make(width=256):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(8)), nn.Linear(width, 10)).cuda()


def step(model, batch):
    """Gradients on the host, and what the device held when the forward was done, above the weights."""
    before = torch.cuda.memory_allocated()
    loss = model(batch).float().square().mean()
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    return [parameter.grad.cpu() for parameter in model.parameters()], held


# Of what a block keeps as it is, 9 times its input: nothing where it is checkpointed, but the products selectively.
HOLDS = {"checkpointing/4": 0.85, "checkpointing/2": 0.65, "selective_checkpointing": 0.75, "checkpointing": 0.25,
         "save_on_cpu": 0.05, "checkpointing+save_on_cpu": 0.05}  # fmt: skip


@pytest.mark.parametrize("rung", HOLDS)
def test_a_rung_holds_less_at_the_same_gradients(rung):
    batch = torch.randn(4096, 256, device="cuda")
    expected, plain = step(make(), batch)
    model = make()
    with installed(rung, model, torch.device("cuda")):
        found, held = step(model, batch)
    assert held < plain * HOLDS[rung]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_where_one_sample_does_not_fit_the_ladder_is_climbed(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path))
    images = torch.randn(8, 16384, 256)
    result = autoaccum.fit(
        nn.Sequential(make(), nn.Flatten(), nn.AdaptiveAvgPool1d(10)), (images, torch.randint(0, 10, (8,))),
        loss=nn.CrossEntropyLoss(), optimizer="sgd", target_batch=4, memory=600 * MIB, precision="fp32", ladder="auto",
        check=False, max_steps=2,
    )  # fmt: skip
    assert result.plan.ladder is not None
    assert [record.samples for record in result.history] == [4, 4]


def test_a_compiled_training_has_one_graph(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path))
    torch.compiler.reset()
    notes = []
    autoaccum.fit(
        make(), (torch.randn(203, 256), torch.randint(0, 10, (203,))), loss=nn.CrossEntropyLoss(), target_batch=100,
        max_batch=40, compile=True, check=False,
        callbacks=[lambda event: notes.append(event.text) if event.name == "note" else None],
    )  # fmt: skip
    assert len([note for note in notes if note.startswith("torch.compile")]) == 1
