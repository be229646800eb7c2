"""Memory savers: the update under each against the whole batch's gradient, as without."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.model.compiled import BUDGETS, Compiled
from autoaccum.model.memory_savers import CHANGES, RUNGS, installed
from autoaccum.model.step_in_backward import StepInBackward
from tests.conformance.models import IGNORED, seeded, tokens

WORDS = 2100
CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.outside = nn.Linear(10, 20), nn.Linear(20, 10)

    def forward(self, x):
        return x + self.outside(F.gelu(self.inside(x)))


class Language(nn.Module):
    """Four blocks, and a head over many words."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 10)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(10, WORDS)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(model, batch):
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


# A budget of a fifth is computed as one of a half is.
SAVERS = [rung for rung in RUNGS if rung not in CHANGES and not rung.endswith("/0.2")]


@pytest.mark.case(27, "memory savers: the update of a window of unequal token counts", trainers=("autoaccum",))
@pytest.mark.parametrize("saver", SAVERS)
def test_an_update_under_a_saver_is_the_whole_batchs(figures, saver):
    """At stake: what is computed twice, elsewhere, in pieces or earlier is still the same gradient, summed the same."""
    batch = torch.utils.data.default_collate(tokens(8, words=WORDS))
    model, whole = seeded(Language), seeded(Language)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    loss(whole, batch).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    inside = StepInBackward(optimizer) if saver == "step_in_backward" else None
    plan = autoaccum.plan(limit=3 if inside is None else 8, target_batch=8)
    accumulator = autoaccum.Accumulator(model, optimizer, plan, precision="fp32")
    accumulator.step_inside(inside)
    forward = Compiled(model, lambda text: None, backend="aot_eager") if saver in BUDGETS else None
    with forward or installed(None, model, CPU), installed(saver, model, CPU, optimizers=[optimizer], compiled=forward):
        for piece in accumulator.window(batch):
            accumulator.backward(loss(model, piece), denominator=float((piece["labels"] != IGNORED).sum()))
    moved = [before - now.detach() for before, now in zip(start, model.parameters(), strict=True)]
    figures.compare(saver, [moved], [[parameter.grad for parameter in whole.parameters()]])
