"""Losses of a user's own, undeclared, over few and many marked samples and ragged pieces: exact, or refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoaccum.data import tree
from autoaccum.errors import LossError
from autoaccum.loss.graph import read
from autoaccum.loss.mean import Sum
from autoaccum.loss.objective import Objective
from autoaccum.planning.plan import plan
from autoaccum.window.accumulate import Accumulator
from tests.test_loss_objective import error

D, C, SIZES = 6, 4, (9, 9, 5, 1, 14, 2)
NONE = {"reduction": "none"}
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
    "focal, by its positives": lambda m, b: (
        F.binary_cross_entropy_with_logits(m(b["x"])[:, 0], b["k"], reduction="sum") / b["k"].sum().clamp(min=1)
    ),
    "positives, in Python": lambda m, b: (
        F.binary_cross_entropy_with_logits(m(b["x"])[:, 0], b["k"], reduction="sum") / max(1, b["k"].sum().item())
    ),
    "a floor of two": lambda m, b: marked(m, b) / b["k"].sum().clamp(min=2),
    "a floor of ten": lambda m, b: marked(m, b) / b["k"].sum().clamp(min=10),
    "a floor of weights": lambda m, b: (per(m, b) * b["w"]).sum() / b["w"].sum().clamp(min=5),
    "a tiny floor": lambda m, b: marked(m, b) / b["k"].sum().clamp(min=1e-6),
    "a tiny floor of weights": lambda m, b: (per(m, b) * b["w"] * b["k"]).sum() / (b["w"] * b["k"]).sum().clamp(1e-6),
    "means with a floor": lambda m, b: (per(m, b) * b["k"]).mean() / b["k"].mean().clamp(min=1e-3),
    "normalised weights": lambda m, b: (per(m, b) * (b["w"] / b["w"].sum())).sum(),
    "a normalised mask": lambda m, b: (per(m, b) * (b["k"] / b["k"].sum())).sum(),
    "only where any": lambda m, b: per(m, b)[b["k"] > 0].mean() if b["k"].any() else per(m, b).sum() * 0,
    "summed in a loop": lambda m, b: sum(
        (F.mse_loss(o, z) for o, z, k in zip(m(b["x"]), b["z"], b["k"]) if k), m(b["x"]).sum() * 0
    ) / max(1, int(b["k"].sum())),
    "a factor in Python": lambda m, b: marked(m, b) * (1 / max(b["k"].sum().item(), 1)),
    "column by column": lambda m, b: (
        ((m(b["x"]) - b["z"]).square() * b["k"][:, None]).sum(0) / b["k"].sum().clamp(min=1)
    ).mean(),
    "focal": lambda m, b: ((1 - m(b["x"]).softmax(1).gather(1, b["y"][:, None])[:, 0]) ** 2 * ce(m, b, **NONE)).mean(),
    "cosine": lambda m, b: F.cosine_embedding_loss(m(b["x"]), b["z"], b["k"] * 2 - 1),
    "triplets with swap": lambda m, b: F.triplet_margin_loss(m(b["x"]), b["z"], b["z"].flip(1), swap=True),
    "huber of marked elements": lambda m, b: F.huber_loss(m(b["x"])[b["k"] > 0], b["z"][b["k"] > 0]),
    "dice of a sample": lambda m, b: (
        1 - 2 * (m(b["x"]).sigmoid() * b["k"][:, None]).sum(1) / (m(b["x"]).sigmoid().sum(1) + C * b["k"] + 1)
    ).mean(),
    "importance weighted": lambda m, b: -m(b["x"]).logsumexp(1).mean(),
    "ctc": lambda m, b: F.ctc_loss(
        m(b["x"])[None].expand(5, -1, -1).log_softmax(2), b["y"][:, None] % 3 + 1, torch.full((len(b["x"]),), 5),
        torch.ones(len(b["x"]), dtype=torch.long),
    ),
    "smoothing, ignored": lambda m, b: F.cross_entropy(m(b["x"]), kept(b), label_smoothing=0.1),
    "gaussian": lambda m, b: F.gaussian_nll_loss(m(b["x"]), b["z"], b["w"][:, None].expand(-1, C) + 0.1),
    "by the outputs' own sum": lambda m, b: (
        (per(m, b) * m(b["x"])[:, 0].detach().exp()).sum() / m(b["x"])[:, 0].detach().exp().sum()
    ),
}  # fmt: skip
COUPLED = {
    "a root": lambda m, b: F.mse_loss(m(b["x"]), b["z"]).sqrt(),
    "contrastive": lambda m, b: F.cross_entropy(m(b["x"]) @ b["z"].T, torch.arange(len(b["x"]))),
    "a ratio of sums": lambda m, b: 1 - (m(b["x"]).sigmoid() * b["k"][:, None]).sum() / m(b["x"]).sigmoid().sum(),
    "a term that comes and goes": lambda m, b: ce(m, b) + (per(m, b)[b["k"] > 0].mean() if b["k"].any() else 0),
    "a logarithm": lambda m, b: per(m, b).mean().log(),
    "an exponential": lambda m, b: per(m, b).mean().exp(),
    "a bound": lambda m, b: per(m, b).mean().clamp(max=1.2),
    "the larger of two": lambda m, b: torch.maximum(per(m, b).mean(), ce(m, b)),
    "a product of means": lambda m, b: per(m, b).mean() * marked(m, b) / b["k"].sum(),
    "a ratio of means": lambda m, b: marked(m, b) / per(m, b).sum(),
    "a maximum": lambda m, b: per(m, b).max(),
    "a quantile": lambda m, b: per(m, b).quantile(0.9),
    "a variance": lambda m, b: per(m, b).mean() + 0.1 * m(b["x"]).var(0).mean(),
    "a normalised mask and more": lambda m, b: (per(m, b) * (b["k"] / (b["k"].sum() + 1e-3))).sum(),
    "a softmax over samples": lambda m, b: (per(m, b) * b["w"].softmax(0)).sum(),
    "live weights": lambda m, b: (per(m, b) * m(b["x"])[:, 0].exp()).sum() / m(b["x"])[:, 0].exp().sum(),
    "pairs of a class": lambda m, b: torch.cdist(m(b["x"]), m(b["x"]))[b["y"][:, None] == b["y"]].mean(),
    "dice of a batch": lambda m, b: (
        1 - 2 * (m(b["x"]).sigmoid() * b["k"][:, None]).sum() / (m(b["x"]).sigmoid().sum() + C * b["k"].sum() + 1)
    ),
    "hard samples": lambda m, b: per(m, b)[per(m, b) > per(m, b).mean()].mean(),
    "centred": lambda m, b: (m(b["x"]) - m(b["x"]).mean(0) - b["z"]).square().mean(),
    "a floor that nothing counts": lambda m, b: marked(m, b) / (b["w"] * b["k"]).sum().clamp(min=1),
}


FLOORS = ("a floor of two", "a floor of ten", "a floor of weights", "means with a floor")  # eight samples show none


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
            assert share < 0.1 or name in FLOORS, "two marked samples tell a floor from a count"
            made.discard()
            continue
        got = torch.zeros_like(whole) if optimizer.gradient is None else optimizer.gradient
        assert float((got - whole).norm()) <= 1e-10 * float(whole.norm())
        ran += 1
    assert ran or share < 0.1 or name in FLOORS


ONE_AT_ONCE = ("masked mean", "two terms", "class weights, ignored", "smoothing, ignored", "a penalty")


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *((name, 1) for name in ONE_AT_ONCE),
        *((name, 2) for name in (*ONE_AT_ONCE, "clamped", "one added", "a factor in Python", "a tiny floor")),
    ],
)
def test_few_samples_at_once_show_what_more_of_them_would(name, most):
    torch.manual_seed(0)
    model, loss, window = Net(), LOSSES[name], samples(0.5, count=20)
    optimizer, objective = Kept(model.parameters(), lr=0.0), Objective(model, step=loss)
    made = Accumulator(model, optimizer, plan(most, 20), objective=objective, precision="fp32")
    found = torch.autograd.grad(loss(model, window), list(model.parameters()), allow_unused=True)
    pairs = zip(found, model.parameters())
    whole = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
    objective.settle([window], most)
    pieces = tree.split(window, [most] * (20 // most))
    made.open(pieces)
    made.run(pieces)
    made.finish()
    assert float((optimizer.gradient - whole).norm()) <= 1e-10 * float(whole.norm())


@pytest.mark.parametrize(("name", "most"), [("clamped", 1), ("a floor of ten", 8)])
def test_a_floor_that_the_samples_tried_do_not_show_is_refused_with_what_would_show_it(name, most):
    torch.manual_seed(0)
    objective, window = Objective(Net(), step=LOSSES[name]), samples(0.5, count=20)
    objective.settle([window], most)
    one = next(piece for piece in tree.split(window, [1] * 20) if piece["k"].any())
    with pytest.raises(LossError, match=r"cannot be told apart: (.*)return autoaccum.Mean") as refused:
        objective.terms(one, None, one)
    assert ("run two samples or more at a time (micro_batch=2)" in str(refused.value)) is (most == 1)


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_is_no_mean_is_not_taken_for_one(name):
    torch.manual_seed(0)
    objective = Objective(Net(), step=COUPLED[name])
    objective.settle([samples(0.3)])
    assert objective.reading.is_no_mean


def test_a_count_that_fits_the_samples_tried_by_chance_makes_no_floor_of_later_divisors():
    def loss(m, b):
        weights = 1 + (b["x"][:, 0] > 5).double()  # by itself a number that nothing in the batch counts
        return (per(m, b) * weights).sum() / weights.sum().item()

    torch.manual_seed(0)
    model, data = Net(), samples(0.3, count=sum(SIZES))
    objective = Objective(model, step=loss)
    objective.settle([data])
    assert "divides by the samples" in objective.reason
    data["x"][::3, 0] += 10
    assert error(objective, data, lambda: loss(model, data), SIZES) <= 1e-10


@pytest.mark.parametrize("declared", ["sample_mean", "sum", lambda batch: float(batch["w"].sum())])
def test_what_is_declared_is_held_against_the_graph_at_each_micro_batch(declared):
    objective = Objective(Net(), step=LOSSES["masked mean"], reduction=declared)
    first, *others = tree.split(samples(0.3), [10] * 8)
    objective.terms(first)
    with pytest.raises(LossError, match="its graph says that it divides by 5 and 4"):
        for batch in others:
            objective.terms(batch)


@pytest.mark.parametrize("declared", [lambda batch: 2 * float(batch["k"].sum()), lambda batch: float(batch["k"].sum())])
def test_a_declaration_may_be_a_multiple_of_what_the_graph_says(declared):
    objective = Objective(Net(), step=LOSSES["masked mean"], reduction=declared)
    for batch in tree.split(samples(0.3), [10] * 8):
        assert objective.terms(batch)["loss"].denominator == declared(batch)


@pytest.mark.parametrize("first", [True, False])
def test_a_loss_of_thousands_of_steps_is_read_in_the_order_they_have(first):
    w = torch.ones(2, requires_grad=True)
    loss = (w * 1).mean()
    for step in range(2, 3001):
        term = step * (w * 1).mean()
        loss = loss + term if first else term - loss
    factors = [term.factor for term in read(loss)]
    assert [abs(factor) for factor in factors] == (list(range(1, 3001)) if first else list(range(3000, 0, -1)))
    assert loss.item() == sum(factors)


def test_ranks_are_told_what_each_term_was_read_to_be():
    objective = Objective(Net(), step=LOSSES["two terms"])
    assert objective.reading.facts == {"terms": "loss"}
    objective.settle([samples(0.3)])
    assert objective.reading.facts == {
        "terms": "term 1, term 2",
        "term 1 of the loss": "count",
        "term 2 of the loss": "count",
    }
    assert "each micro-batch runs forward once more" in objective.reason


class Hidden(torch.autograd.Function):
    """A function of one's own, below which the graph says nothing."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("name", ["masked mean", "a sum over a constant", "kl"])
def test_a_loss_whose_graph_is_hidden_is_learnt_from_its_values(name):
    torch.manual_seed(0)
    model, data = Net(), samples(0.3, count=sum(SIZES))
    objective = Objective(model, step=lambda m, b: Hidden.apply(LOSSES[name](m, b)))
    assert error(objective, data, lambda: LOSSES[name](model, data), SIZES) <= 1e-10
    assert "as its values over parts of a batch show" in objective.reason
    assert objective.reading.unseen is None


@pytest.mark.parametrize("form", ["loss", "step"])
def test_terms_whose_denominators_the_batch_says_are_told_apart_where_nothing_is_learned_too(form):
    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets) + 0.3 * outputs.square().mean()

    model, data = Net(), samples(0.3, count=8 * 30)
    pairs = (data["x"], data["y"])
    given = {"loss": loss} if form == "loss" else {"step": lambda m, b: loss(m(b[0]), b[1])}
    objective = Objective(model, **given)
    objective.settle([pairs])
    for piece in tree.split(pairs, [8] * 30):
        objective.terms(piece, None, piece)
    known = objective.denominators(pairs)
    with torch.no_grad():
        terms, _, _ = objective.evaluate(pairs, known, graph=False)
        assert known == {name: float(term.denominator) for name, term in terms.items()}
        assert float(sum(term.value for term in terms.values())) == pytest.approx(
            float(loss(model(pairs[0]), pairs[1]))
        )


def test_a_sum_that_nobody_declared_adds_up_where_nothing_is_learned_too():
    model, data = Net(), samples(0.3)
    loss = LOSSES["a sum over a constant"]
    objective = Objective(model, step=loss)
    objective.settle([data])
    with torch.no_grad():
        parts = [
            objective.evaluate(piece, objective.denominators(piece), graph=False)[0]["loss"]
            for piece in tree.split(data, [50, 30])
        ]
    assert all(isinstance(part, Sum) for part in parts)
    assert float(sum(part.value for part in parts)) == pytest.approx(float(loss(model, data).detach()))
