"""Losses of a user's own, undeclared, over few and many marked samples and ragged pieces: exact, or refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoaccum.data import tree
from autoaccum.errors import LossError
from autoaccum.loss.objective import Objective
from autoaccum.planning.plan import plan
from autoaccum.window.accumulate import Accumulator

D, C, SIZES = 6, 4, (9, 9, 5, 1, 14, 2)
WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C)).double()
        self.s = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x):
        return self.net(x)


class Kept(torch.optim.SGD):
    """Keeps the gradient that a step was given."""

    gradient = None

    def step(self, closure=None):
        held = [p for group in self.param_groups for p in group["params"]]
        self.gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in held])


def per(m, b):
    return (m(b["x"]) - b["z"]).square().mean(1)


def ce(m, b, **more):
    return F.cross_entropy(m(b["x"]), b["y"], **more)


def marked(m, b):
    return (per(m, b) * b["k"]).sum()


def penalty(m):
    return sum(p.square().sum() for p in m.net.parameters())


def kept(b, ignored=-100):
    return torch.where(b["k"] > 0, b["y"], ignored)


def confident(m, b):
    chosen = (m(b["x"]).detach().amax(1) > 0.3).double()
    return (per(m, b) * chosen).sum() / chosen.sum()


LOSSES = {
    "masked mean": lambda m, b: marked(m, b) / b["k"].sum(),
    "chosen samples": lambda m, b: per(m, b)[b["k"].bool()].mean(),
    "nanmean": lambda m, b: torch.nanmean(torch.where(b["k"][:, None] > 0, (m(b["x"]) - b["z"]).square(), torch.nan)),
    "an ignored class": lambda m, b: F.cross_entropy(m(b["x"]), kept(b, 3), ignore_index=3),
    "two terms": lambda m, b: ce(m, b) + 0.3 * marked(m, b) / b["k"].sum(),
    "clamped": lambda m, b: marked(m, b) / b["k"].sum().clamp(min=1),
    "a small number added": lambda m, b: marked(m, b) / (b["k"].sum() + 1e-8),
    "one added": lambda m, b: marked(m, b) / (b["k"].sum() + 1),
    "a Python number": lambda m, b: marked(m, b) / b["k"].sum().item(),
    "a Python floor": lambda m, b: marked(m, b) / max(1, int(b["k"].sum())),
    "class weights, ignored": lambda m, b: F.cross_entropy(m(b["x"]), kept(b), weight=WEIGHTS),
    "smoothing": lambda m, b: F.cross_entropy(m(b["x"]), kept(b), weight=WEIGHTS, label_smoothing=0.1),
    "a penalty": lambda m, b: marked(m, b) / b["k"].sum() + 1e-2 * penalty(m),
    "a list of terms": lambda m, b: torch.stack([ce(m, b), per(m, b).mean(), marked(m, b) / b["k"].sum()]).mean(),
    "a list of samples": lambda m, b: torch.stack([F.mse_loss(m(x), z) for x, z in zip(b["x"], b["z"])]).mean(),
    "a learned weight": lambda m, b: torch.exp(-m.s) * ce(m, b) + m.s + torch.exp(-m.s) * marked(m, b) / b["k"].sum(),
    "guarded by where": lambda m, b: torch.where(b["k"].sum() > 0, marked(m, b) / b["k"].sum(), torch.zeros(())),
    "by the outputs": confident,
    "weights of samples": lambda m, b: (per(m, b) * b["w"]).sum() / b["w"].sum(),
    "grows with the batch": lambda m, b: ce(m, b) * len(b["x"]),
    "a sum over a constant": lambda m, b: per(m, b).sum() / 16,
    "mean over samples, sum over outputs": lambda m, b: (m(b["x"]) - b["z"]).square().mean(0).sum(),
    "two masks with floors": lambda m, b: (
        marked(m, b) / b["k"].sum().clamp(min=1) + (per(m, b) * (1 - b["k"])).sum() / (1 - b["k"]).sum().clamp(min=1)
    ),
    "kl": lambda m, b: F.kl_div(m(b["x"]).log_softmax(1), b["z"].softmax(1), reduction="batchmean"),
}
COUPLED = {
    "a root": lambda m, b: F.mse_loss(m(b["x"]), b["z"]).sqrt(),
    "contrastive": lambda m, b: F.cross_entropy(m(b["x"]) @ b["z"].T, torch.arange(len(b["x"]))),
    "a ratio of sums": lambda m, b: 1 - (m(b["x"]).sigmoid() * b["k"][:, None]).sum() / m(b["x"]).sigmoid().sum(),
    "a term that comes and goes": lambda m, b: ce(m, b) + (per(m, b)[b["k"] > 0].mean() if b["k"].any() else 0),
    "a floor that nothing counts": lambda m, b: marked(m, b) / (b["w"] * b["k"]).sum().clamp(min=1),
}


def samples(share, seed=1, count=2 * 40):
    chance = torch.Generator().manual_seed(seed)
    k = torch.zeros(count, dtype=torch.float64)
    k[torch.randperm(count, generator=chance)[: max(1, round(share * count))]] = 1
    draw = {"generator": chance, "dtype": torch.float64}
    return {
        "x": torch.randn(count, D, **draw),
        "y": torch.randint(0, C, (count,), generator=chance),
        "z": torch.randn(count, C, **draw),
        "k": k,
        "w": torch.rand(count, **draw),
    }


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_the_whole_batchs_or_the_loss_is_refused(name, share):
    torch.manual_seed(0)
    model, loss, ran = Net(), LOSSES[name], 0
    optimizer = Kept(model.parameters(), lr=0.0)
    made = Accumulator(model, optimizer, plan(14, sum(SIZES)), objective=Objective(model, step=loss), precision="fp32")
    for window in tree.split(samples(share), [sum(SIZES)] * 2):
        found = torch.autograd.grad(loss(model, window), list(model.parameters()), allow_unused=True)
        pairs = zip(found, model.parameters())
        whole = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        if not whole.isfinite().all():
            continue  # nothing is marked: the whole batch's own mean is 0 / 0
        pieces, optimizer.gradient = tree.split(window, SIZES), None
        try:
            made.open(pieces)
            made.run(pieces)
            made.finish()
        except LossError:
            assert share < 0.1, "two marked samples tell a floor from a count"
            made.discard()
            continue
        got = torch.zeros_like(whole) if optimizer.gradient is None else optimizer.gradient
        assert float((got - whole).norm()) <= 1e-10 * float(whole.norm())
        ran += 1
    assert ran or share < 0.1


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_is_no_mean_is_not_taken_for_one(name):
    torch.manual_seed(0)
    objective = Objective(Net(), step=COUPLED[name])
    objective.settle([samples(0.3)])
    assert objective.uncountable is not None
