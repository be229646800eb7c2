"""The code that people copy first: every Python block of the README and of the guide runs."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum

ROOT = Path(__file__).parent.parent
BLOCKS = [
    (name, index, block)
    for name in ("README.md", "examples/README.md")
    for index, block in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    )
]


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text, self.temperature = nn.Linear(8, 4), nn.Linear(8, 4), nn.Parameter(torch.zeros(()))


def names():
    """What the blocks take for granted."""
    torch.manual_seed(0)
    x, y = torch.randn(512, 8), torch.randint(3, (512,))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=256, shuffle=True)

    def accuracy(outputs, targets):
        return autoaccum.Mean((outputs.argmax(-1) == targets).sum(), len(targets))

    return {
        "torch": torch, "nn": nn, "F": F, "cross_entropy": F.cross_entropy, "autoaccum": autoaccum, "model": model,
        "data": (x, y), "criterion": nn.CrossEntropyLoss(), "accuracy": accuracy, "loader": loader,
        "train_loader": loader, "val_loader": loader, "optimizer": torch.optim.AdamW(model.parameters()),
        "towers": Towers(), "pairs": (x, x + 0.1), "optimizers": SimpleNamespace(),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "index", "block"), BLOCKS, ids=[f"{name}-{index}" for name, index, _ in BLOCKS])
def test_a_block_of_the_documentation_runs(name, index, block, tmp_path, monkeypatch):
    if "trainer" in block:
        pytest.importorskip("transformers", reason="the block is about another trainer, which is not installed")
    monkeypatch.chdir(tmp_path)
    space = names()
    if name == "examples/README.md":
        space.update(model=space["towers"], data=space["pairs"])
    exec(compile(block, f"{name}, block {index}", "exec"), space)
