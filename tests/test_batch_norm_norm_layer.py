"""Which calls of a normalisation layer count: not recomputed ones, not those of copies, and compiled ones too."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from autoaccum.ranks import Ranks
from tests.norms import SIZES, assert_same, batch, float64, pooled, state, train_window  # noqa: F401, a fixture
from tests.versions import since


class Checkpointed(nn.Module):
    """Recomputes its body in the backward pass; a BatchNorm layer first, one more behind a linear layer."""

    def __init__(self, reentrant, *, dropout=0.0, twice=False, momentum=0.1):
        super().__init__()
        torch.manual_seed(5)
        self.first, self.last = (nn.BatchNorm1d(3, momentum=momentum) for _ in range(2))
        self.inner = nn.Linear(3, 3)
        self.reentrant, self.twice, self.dropout = reentrant, twice, nn.Dropout(dropout)

    def body(self, data):
        data = self.inner(self.first(self.dropout(data)))
        return self.last(self.first(torch.tanh(data))) if self.twice else self.last(data)

    def forward(self, data):
        if self.reentrant is None:
            return self.body(data)
        return checkpoint(self.body, data, use_reentrant=self.reentrant, preserve_rng_state=False)


@pytest.mark.parametrize("mode", ["pooled", "momentum"])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_counts_once(reentrant, momentum, twice, mode):
    models = [Checkpointed(kind, twice=twice, momentum=momentum) for kind in (None, reentrant)]
    for model in models:
        with pooled(model, mode) as statistics:
            for seed in range(2):
                train_window(statistics, model, batch(3, seed=seed))
    assert_same(models[1], state(models[0]), 1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_with_another_dropout_mask_is_not_what_counts(reentrant):
    """The recomputation writes other statistics into the buffers; those of the forward must be committed."""
    plain, recomputed = Checkpointed(None, dropout=0.5), Checkpointed(reentrant, dropout=0.5)
    samples = batch(3)
    with pooled(plain) as ours, pooled(recomputed) as theirs:
        for model, statistics in ((plain, ours), (recomputed, theirs)):
            statistics.begin(1)
            for seed, micro in enumerate(samples.split(SIZES)):
                torch.manual_seed(seed)
                model(micro.clone().requires_grad_()).sum().backward()
            statistics.commit(Ranks())
    assert_same(recomputed.first, state(plain.first), 1e-12)


def test_copies_of_the_model_do_not_feed_its_statistics():
    model, whole = nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.BatchNorm1d(3))
    whole(batch(3))
    with pooled(model) as statistics:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
        statistics.begin(1)
        for micro in batch(3).split(SIZES):
            model(micro)
            for other in copies:
                other(100 * micro)
        statistics.commit(Ranks())
    assert_same(model, state(whole), 1e-12)


@pytest.mark.slow
@since("2.5", "graphs through our hooks")
def test_a_compiled_model_has_no_graph_break_and_no_graph_more():
    def make():
        torch.manual_seed(3)
        return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())

    def graphs_of(run):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        run()
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def alone():
        model = make()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            for micro in batch(3).split(SIZES):
                compiled(micro).sum().backward()
            model.eval()
            compiled(batch(3))
            model.train()

    whole, model = make(), make()

    def in_windows():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(2):  # a graph serves the next owner of the same model
            with pooled(model) as statistics:
                for seed in range(2):
                    whole(batch(3, seed=seed))
                    train_window(statistics, compiled, batch(3, seed=seed))
                    model.eval()
                    compiled(batch(3))
                    model.train()
            assert_same(model[0], state(whole[0]), 1e-12)

    assert graphs_of(in_windows) == graphs_of(alone)


@pytest.mark.slow
@since("2.5", "compiled parts under checkpointing")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_compiled_part_that_is_recomputed_counts_once(reentrant):
    torch.compiler.reset()
    whole, layer = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    whole(batch(3))
    compiled = torch.compile(layer, backend="aot_eager")
    with pooled(layer) as statistics:
        statistics.begin(1)
        for micro in batch(3).split(SIZES):
            checkpoint(compiled, micro.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
        statistics.commit(Ranks())
    assert_same(layer, state(whole), 1e-12)


@pytest.mark.slow
@since("2.5", "a layer of a compiled graph used twice")
def test_a_layer_used_twice_in_a_compiled_graph_counts_twice():
    torch.compiler.reset()
    whole, layer = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    whole(torch.cat([batch(3), 2 * batch(3)]))
    compiled = torch.compile(lambda data: layer(data) + layer(2 * data), backend="aot_eager", fullgraph=True)
    with pooled(layer) as statistics:
        train_window(statistics, compiled, batch(3))
    assert_same(layer, state(whole), 1e-12)
