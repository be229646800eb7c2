"""A model held still: each sample gets the same, whatever micro-batch it comes in."""

import gc
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autoaccum.window.determinism import Determinism
from tests.versions import since

CPU = torch.device("cpu")
ROWS = ([0, 1, 2, 3, 4], [5, 6, 7], list(range(8))[::-1], [6], [2, 7, 1])


class Draw(nn.Module):
    """Shows what a function draws."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, inputs):
        return self.draw(inputs)


def still(model, inputs, rows):
    """The model's outputs for the whole batch, and for each list of rows."""
    with Determinism(model, samples=len(inputs), device=CPU) as fixed:
        fixed.begin(range(len(inputs)))
        whole = model(inputs)
        parts = []
        for part in rows:
            fixed.begin(part)
            parts.append(model(inputs[part]))
    return whole, parts, fixed


OWN = torch.Generator().manual_seed(1)
DRAWS = {
    "rand": lambda x: torch.rand(len(x), 3),
    "randn of two dimensions": lambda x: torch.randn((len(x), x.shape[1])),
    "randn_like": torch.randn_like,
    "rand_like in double": lambda x: torch.rand_like(x, dtype=torch.float64),
    "randint": lambda x: torch.randint(9, (len(x),)),
    "randint from": lambda x: torch.randint(3, 9, (len(x), 1)),
    "bernoulli of chances": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli with p": lambda x: torch.bernoulli(x, 0.3),
    "bernoulli_": lambda x: x.new_empty(len(x), 1, 1).bernoulli_(0.5),
    "bernoulli_ of chances": lambda x: torch.empty_like(x).bernoulli_(x.sigmoid()),
    "uniform_": lambda x: torch.empty(len(x)).uniform_(-1, 1),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "random_": lambda x: torch.empty(len(x), dtype=torch.int64).random_(0, 100),
    "normal of tensors": lambda x: torch.normal(x, x.abs()),
    "normal of a tensor and a number": lambda x: torch.normal(x, 2.0),
    "normal of a number and a tensor": lambda x: torch.normal(1.0, x.abs()),
    "normal of numbers": lambda x: torch.normal(1.0, 2.0, (len(x), 2)),
    "a distribution": lambda x: torch.distributions.Laplace(x, x.exp()).rsample(),
    "gumbel softmax": F.gumbel_softmax,
    "rows of tokens": lambda x: torch.rand(len(x) * 5, 2).view(len(x), 5, 2),
    "samples along another dimension": lambda x: torch.rand(3, len(x)).T,
    "a shape like the samples' number": lambda x: torch.rand(len(x), 8),
    "an own generator": lambda x: torch.rand(len(x), generator=OWN),
    "several in a row": lambda x: torch.rand(len(x)) + torch.rand(()) + torch.randn(len(x)),
    "after one for all": lambda x: torch.rand(8) @ torch.rand(8, 4) + torch.rand(len(x), 4),
    "native dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "native dropout in evaluation": lambda x: torch.native_dropout(x, 0.5, False)[0],
}


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_belongs_to_its_sample(name):
    inputs = torch.randn(8, 4)
    whole, parts, fixed = still(Draw(DRAWS[name]), inputs, ROWS)
    for rows, part in zip(ROWS, parts):
        assert torch.equal(part, whole[rows])
    assert len({tuple(row.reshape(-1).tolist()) for row in whole}) > 1, "every sample got the same"
    assert not fixed.noise.unexplained


@given(samples=st.integers(2, 9), features=st.integers(1, 9), data=st.data())
@settings(max_examples=30, deadline=None)
def test_noise_belongs_to_its_sample_in_any_split(samples, features, data):
    rows = data.draw(st.lists(st.integers(0, samples - 1), min_size=1, max_size=samples - 1, unique=True))
    model = Draw(lambda x: torch.randn(x.shape) + torch.rand(len(x), 1))
    whole, (part,), _ = still(model, torch.zeros(samples, features), [rows])
    assert torch.equal(part, whole[rows])


def test_a_dropout_does_not_hide_that_samples_act_on_each_other():
    model = Draw(lambda x: torch.native_dropout(x - x.mean(0), 0.5, True)[0])
    whole, (part,), _ = still(model, torch.randn(8, 4), [[0, 1, 2]])
    assert torch.equal(part != 0, whole[:3] != 0)
    assert not torch.allclose(part, whole[:3])


def test_what_is_drawn_for_all_samples_is_the_same_in_each_part():
    whole, parts, fixed = still(Draw(lambda x: x * torch.rand(()) + torch.rand(4)), torch.ones(8, 4), ROWS)
    assert all(torch.equal(part, whole[: len(part)]) for part in parts)
    assert not fixed.noise.unexplained


@pytest.mark.parametrize(
    "draw", [lambda x: torch.randperm(len(x)), lambda x: torch.poisson(x.exp()), lambda x: torch.rand(len(x), len(x))]
)
def test_a_draw_that_cannot_be_given_to_samples_is_noted(draw):
    assert still(Draw(draw), torch.randn(8, 4), ROWS)[2].noise.unexplained


def test_other_numbers_are_drawn_from_another_seed():
    model = Draw(torch.randn_like)
    with Determinism(model, samples=4, device=CPU) as fixed:
        fixed.begin(range(4))
        first = model(torch.zeros(4, 2))
        fixed.begin(range(4))
        again = model(torch.zeros(4, 2))
        fixed.begin(range(4), seed=5)
        other = model(torch.zeros(4, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


DROPOUTS = {
    "dropout": lambda: nn.Dropout(0.5),
    "dropout in place": lambda: nn.Dropout(0.5, inplace=True),
    "alpha dropout": lambda: nn.AlphaDropout(0.5),
    "feature alpha dropout": lambda: nn.FeatureAlphaDropout(0.5),
    "dropout of channels": lambda: nn.Dropout1d(0.5),
    "functional": lambda: Draw(lambda x: F.dropout(x, 0.5)),
    "torch's own": lambda: Draw(lambda x: torch.dropout(x, p=0.5, train=True)),
    "in a checkpoint": lambda: Draw(lambda x: checkpoint(F.dropout, x, use_reentrant=False)),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_is_off(name):
    inputs = torch.randn(8, 6, 4)
    whole, _, _ = still(DROPOUTS[name](), inputs, [])
    assert torch.equal(whole, inputs)


class Attention(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.module, self.how = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True), how

    def forward(self, x):
        if self.how == "module":
            return self.module(x, x, x)[0]
        if self.how == "place":
            return F.scaled_dot_product_attention(x, x, x, None, 0.5)
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


@pytest.mark.parametrize(
    "model",
    [
        Attention("module"),
        Attention("place"),
        Attention("keyword"),
        nn.RReLU(0.1, 0.9),
        Draw(lambda x: torch.rrelu(x, 0.1, 0.9, True)),
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True),
    ],
)
def test_attention_and_rectifiers_are_as_in_evaluation(model):
    inputs = torch.randn(8, 6, 4)
    whole, _, _ = still(model, inputs, [])
    if isinstance(model, Attention) and model.how != "module":
        expected = F.scaled_dot_product_attention(inputs, inputs, inputs)
    elif isinstance(model, Draw):
        expected = F.rrelu(inputs, 0.1, 0.9)
    else:
        expected = model.eval()(inputs)
    assert torch.allclose(whole, expected, atol=1e-6)


def test_a_recurrent_net_has_no_dropout_between_its_layers_and_gets_it_back():
    model = nn.LSTM(4, 4, 3, dropout=0.5, batch_first=True)
    inputs = torch.randn(8, 6, 4)
    (whole, _), _, _ = still(model, inputs, [])
    assert model.dropout == 0.5
    assert torch.equal(whole, model.eval()(inputs)[0])


@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_normalises_by_running_statistics_which_do_not_move(track):
    model = nn.BatchNorm1d(4, track_running_stats=track)
    if track:
        model.running_mean.fill_(0.5)
        model.running_var.fill_(4.0)
    inputs = torch.randn(8, 4)
    whole, parts, fixed = still(model, inputs, ROWS)
    assert fixed.normalises
    assert torch.allclose(whole, (inputs - 0.5) / 2 if track else inputs, atol=1e-4)
    assert all(torch.equal(part, whole[rows]) for rows, part in zip(ROWS, parts))
    assert not track or (model.running_mean == 0.5).all()
    assert model.training


def test_functional_batch_norm_does_so_too():
    mean, variance = torch.zeros(4), torch.ones(4)
    model = Draw(lambda x: F.batch_norm(x, mean, variance, training=True))
    inputs = torch.randn(8, 4) + 3
    assert torch.allclose(still(model, inputs, [])[0], inputs, atol=1e-4)
    assert not mean.any()


def test_a_batch_norm_that_a_model_keeps_in_evaluation_mode_is_nothing_to_tell():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].eval()
            return self

    assert not still(Frozen(nn.BatchNorm1d(4)), torch.randn(8, 4), [])[2].normalises


def test_flags_are_put_back_each_by_itself():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)))
    model[1][0].eval()
    model[0].eval()
    before = [module.training for module in model.modules()]
    with Determinism(model, samples=4, device=CPU):
        assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert [module.training for module in model.modules()] == before


class Counting(nn.Module):
    """Each call depends on those before it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.log, self.table = 0, [], {"last": 0}

    def forward(self, inputs):
        before = (self.seen.item(), self.calls, len(self.log), self.table["last"], hasattr(self, "made"))
        self.seen = self.seen + 1
        self.calls += 1
        self.log.append(inputs)
        self.table["last"] += 1
        self.made = True
        return before, random.random()


def test_no_micro_batch_sees_what_another_left_behind():
    model = Counting()
    buffer, log = model.seen, model.log
    state = random.getstate()
    whole, parts, _ = still(model, torch.zeros(8, 2), ROWS)
    assert parts == [whole] * len(ROWS)
    assert whole[0] == (0, 0, 0, 0, False)
    assert model.seen is buffer
    assert (model.log is log, log, model.calls, model.table) == (True, [], 0, {"last": 0})
    assert random.getstate() == state


@since("2.6", "torch.compiler.set_stance")
def test_a_model_that_was_compiled_and_run_before_runs_eagerly():
    model = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), backend="eager", fullgraph=True)
    inputs = torch.randn(8, 4)
    model(inputs)
    whole, parts, _ = still(model, inputs, ROWS)
    assert torch.equal(whole, model.eval()(inputs))
    assert torch.allclose(parts[0], whole[ROWS[0]])


def test_what_it_kept_is_gone_afterwards(recwarn):
    warnings.simplefilter("always", ResourceWarning)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with Determinism(model, samples=4, device=torch.device("cpu")) as fixed:
        fixed.begin(range(4))
    del fixed
    gc.collect()
    assert not [each for each in recwarn if each.category is ResourceWarning]
