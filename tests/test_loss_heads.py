"""A model's own loss: how it counts its labels is read off its graph, and asking leaves no trace."""

import copy
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from autoaccum.data import tree
from autoaccum.errors import LossError
from autoaccum.loss.counts import tokens
from autoaccum.loss.objective import Objective
from tests.test_loss_objective import counted, error

VOCABULARY, B, T = 11, 9, 6
CLASS_WEIGHTS = torch.linspace(0.2, 3, VOCABULARY, dtype=torch.float64)


def labels(ignored=-100, seed=0, columns=T):
    """Ragged rows: long ones first, one all ignored, and a first column that is ignored in some."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(1, VOCABULARY, (B, columns), generator=generator)
    for row, length in enumerate([6, 6, 4, 6, 0, 1, 2, 3, 5]):
        y[row, length:] = ignored
    y[3, 0] = ignored
    return y


def batch(y, key="labels"):
    ids = torch.randint(0, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(9))
    return {"input_ids": ids, key: y}


class Language(nn.Module):
    """A tiny language model whose loss is `head(logits, labels)`."""

    def __init__(self, head, wide=True):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, 4, dtype=torch.float64)
        self.out = nn.Linear(4, VOCABULARY if wide else 1, dtype=torch.float64)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.head = head

    def forward(self, input_ids, labels=None, targets=None):
        logits = self.out(self.dropout(self.embedding(input_ids)))
        return {"loss": self.head(logits, labels if targets is None else targets), "logits": logits}


def entropy(logits, y, **settings):
    return functional.cross_entropy(logits.reshape(-1, VOCABULARY), y.reshape(-1), **settings)


def shifted(logits, y):
    return entropy(logits[:, :-1], y[:, 1:])


def padded_shift(logits, y):
    return entropy(logits, functional.pad(y, (0, 1), value=-100)[:, 1:])


def shifted_twice(logits, y):
    return entropy(logits[:, :-2], y[:, 2:])


def last_left_out(logits, y):
    return entropy(logits[:, :-1], y[:, :-1], weight=CLASS_WEIGHTS)


def padding_ignored(logits, y):
    return entropy(logits[:, :-1], y[:, 1:], ignore_index=0)


def weighted(logits, y):
    return entropy(logits[:, :-1], y[:, 1:], weight=CLASS_WEIGHTS)


def added(logits, y):
    return entropy(logits, y, reduction="sum")


def by_gathering(logits, y):
    """A head that torch's losses are not called in."""
    logits, y = logits[:, :-1], y[:, 1:]
    mask = y != -100
    chosen = logits.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return -(chosen * mask).sum() / mask.sum()


def by_gathering_unshifted(logits, y):
    mask = y != -100
    chosen = logits.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return -(chosen * mask).sum() / mask.sum().clamp(min=1)


HEADS = {
    entropy: (0, 0, -100),
    shifted: (1, 0, -100),
    padded_shift: (1, 0, -100),
    shifted_twice: (2, 0, -100),
    last_left_out: (0, 1, -100),
    padding_ignored: (1, 0, 0),
    weighted: (1, 0, -100),
    added: (0, 0, -100),
    by_gathering: (1, 0, -100),
    by_gathering_unshifted: (0, 0, -100),
}


@pytest.mark.parametrize("key", ["labels", "targets"])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_a_models_own_token_mean_is_accumulated_exactly_however_it_shifts_and_ignores(head, key):
    first, last, ignored = HEADS[head]
    model = Language(head).eval()
    data = batch(labels(ignored), key)
    objective = Objective(model)
    assert error(objective, data, lambda: model(**data)["loss"]) <= 1e-10
    assert ("adds up" in objective.reason) == (head is added)
    if head not in (added, weighted, last_left_out):
        kept = data[key][:, first : T - last]
        assert counted(objective, data) == {"loss": tokens(kept, ignored)}


def test_a_first_column_that_is_ignored_in_the_batch_measured_does_not_hide_a_shift():
    for head, ignored in ((padding_ignored, 0), (shifted, -100), (by_gathering, -100)):
        y = labels(ignored)
        y[:, 0] = ignored
        objective = Objective(Language(head).eval())
        objective.settle([batch(y)])
        model, data = objective.model, batch(labels(ignored))
        assert error(objective, data, lambda: model(**data)["loss"]) <= 1e-10  # noqa: B023


class Busy(nn.Module):
    """Touches what a forward may touch, in whatever mode."""

    def __init__(self):
        super().__init__()
        self.inner = Language(shifted)
        self.norm = nn.BatchNorm1d(T, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros(()))
        self.norm.eval()

    def forward(self, input_ids, labels):
        self.calls += 1
        self.norm.running_mean = self.norm.running_mean + 1
        torch.rand(1)
        random.random()
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.rand()
        return self.inner(input_ids, labels)


def test_asking_leaves_no_trace():
    model = Busy()
    data = batch(labels())
    kept = copy.deepcopy((model.state_dict(), data))
    buffers = dict(model.named_buffers())
    flags = [module.training for module in model.modules()]
    generators = (torch.get_rng_state(), random.getstate())
    objective = Objective(model)
    objective.settle([data])
    assert "as its graph says" in objective.reason
    for now, before in zip((model.state_dict(), data), kept):
        assert list(now) == list(before)
        assert all(torch.equal(now[name], before[name]) for name in before)
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_asking_that_fails_leaves_no_trace_either():
    class Failing(Busy):
        def forward(self, input_ids, labels):
            super().forward(input_ids, labels)
            raise KeyError("mine")

    model = Failing()
    with pytest.raises(KeyError, match="mine"):
        Objective(model).settle([batch(labels())])
    assert model.calls == 0
    assert model.inner.training


def test_labels_one_a_sample_are_counted_where_they_are_not_ignored():
    class Classifier(Language):
        def forward(self, input_ids, labels):
            logits = self.out(self.embedding(input_ids).mean(1))
            return functional.cross_entropy(logits, labels), logits

    y = torch.tensor([1, 2, -100, 3, -100, 4, 5, 6, -100])
    model, data = Classifier(None).eval(), batch(y)
    objective = Objective(model)
    assert counted(objective, data) == {"loss": 6.0}
    assert error(objective, data, lambda: model(**data)[0]) <= 1e-10


@pytest.mark.parametrize("columns", [1, 4])
def test_labels_that_are_no_integers_are_counted_by_element(columns):
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(3, columns, dtype=torch.float64)

        def forward(self, x, labels):
            return SimpleNamespace(loss=functional.mse_loss(self.out(x), labels))

    model = Regression()
    data = {"x": torch.randn(B, 3, dtype=torch.float64), "labels": torch.randn(B, columns, dtype=torch.float64)}
    objective = Objective(model)
    assert counted(objective, data) == {"loss": float(B * columns)}
    assert error(objective, data, lambda: model(**data).loss) <= 1e-10


def test_without_labels_a_models_own_loss_is_a_mean_over_samples():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(3, 1, dtype=torch.float64)

        def forward(self, x, y):
            return (self.out(x)[:, 0] - y).square().mean()

    model = Own()
    data = (torch.randn(B, 3, dtype=torch.float64), torch.randn(B, dtype=torch.float64))
    objective = Objective(model)
    assert error(objective, data, lambda: model(*data)) <= 1e-10
    assert counted(objective, data) == {"loss": float(B)}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_ctc_head_counts_samples_or_adds_up_whatever_its_labels(reduction):
    class Speech(Language):
        def forward(self, input_ids, labels):
            logits = self.out(self.embedding(input_ids)).log_softmax(-1).transpose(0, 1)
            lengths = (labels != -100).sum(1)
            full = torch.full_like(lengths, T)
            return functional.ctc_loss(logits, labels.clamp(min=0), full, lengths, reduction=reduction)

    y = torch.tensor([[1, 2, 3], [1, 2, -100], [4, -100, -100]]).repeat(3, 1)
    model, data = Speech(None).eval(), batch(y)
    objective = Objective(model)
    assert error(objective, data, lambda: model(**data)) <= 1e-10
    assert counted(objective, data) == {"loss": float(B)}
    assert ("adds up" in objective.reason) == (reduction == "sum")


def test_images_labelled_by_pixel_with_an_ignored_index_of_their_own_are_counted():
    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Conv2d(2, 4, 1, dtype=torch.float64)

        def forward(self, x, labels):
            return functional.cross_entropy(self.out(x), labels, ignore_index=255), None

    y = torch.randint(0, 4, (B, 3, 3))
    y[::2, 1] = 255
    y[4] = 255
    model, data = Segmenter(), {"x": torch.randn(B, 2, 3, 3, dtype=torch.float64), "labels": y}
    objective = Objective(model)
    assert error(objective, data, lambda: model(**data)[0]) <= 1e-10
    assert counted(objective, data) == {"loss": tokens(y, 255)}


def test_a_second_term_with_one_label_a_sample_does_not_hide_the_token_mean():
    def head(logits, y):
        return weighted(logits, y) + 0 * functional.cross_entropy(logits[:, 0], y[:, 0].clamp(min=0))

    model, data = Language(head).eval(), batch(labels())
    assert error(Objective(model), data, lambda: model(**data)["loss"]) <= 1e-10


def test_a_step_with_a_declared_token_mean_is_measured_with_gradients_as_they_are():
    def step(model, batch):
        loss = model(batch["input_ids"], batch["labels"])["loss"]
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)  # a penalty would need this
        return loss

    model, data = Language(shifted).eval(), batch(labels())
    objective = Objective(model, step=step, reduction="token_mean")
    assert error(objective, data, lambda: model(**data)["loss"]) <= 1e-10


class Unpacking(nn.Linear):
    def forward(self, packed):
        return super().forward(pad_packed_sequence(packed, batch_first=True)[0])


def test_a_batch_that_cannot_be_cut_is_measured_whole():
    model = Unpacking(6, VOCABULARY)
    packed = pack_sequence([torch.randn(T, 6) for _ in range(B)])
    objective = Objective(model, loss=entropy, reduction="token_mean")
    objective.settle([(packed, labels())])
    assert objective.denominators((packed, labels())) == {"loss": float((labels() != -100).sum())}


def test_a_model_that_gives_its_loss_in_training_only_is_read():
    class Training(Language):
        def forward(self, input_ids, labels):
            outputs = super().forward(input_ids, labels)
            return outputs if self.training else {"logits": outputs["logits"]}

    objective = Objective(Training(shifted))
    objective.settle([batch(labels())])
    assert "the targets[:, 1:] other than -100" in objective.reason


def test_a_model_that_returns_no_scalar_is_refused():
    objective = Objective(Language(lambda logits, y: logits.sum(-1)))
    with pytest.raises(LossError, match=r"shape \(8, 6\)"):
        objective.settle([batch(labels())])


def test_a_batch_in_which_nothing_counts_is_asked_again():
    nothing = batch(torch.full((B, T), -100))
    for head in (shifted, by_gathering):
        objective = Objective(Language(head).eval())
        objective.settle([nothing])
        assert objective.reading.unseen is not None
        assert error(objective, batch(labels()), lambda: objective.model(**batch(labels()))["loss"]) <= 1e-10  # noqa: B023


def test_micro_batches_padded_to_different_lengths_are_weighted_by_their_shifted_tokens():
    model = Language(shifted).eval()
    data = batch(labels())
    objective = Objective(model)
    objective.settle([data])
    micros = []
    for micro in tree.split(data, (3, 2, 2, 2)):
        longest = max(2, int((micro["labels"] != -100).sum(1).max()) + 1)
        micros.append({name: value[:, :longest] for name, value in micro.items()})
    means = [objective.terms(micro, None, micro)["loss"] for micro in micros]
    total = sum(mean.denominator for mean in means)
    assert total == tokens(data["labels"][:, 1:])
    loss = sum(tensor.detach() * factor for tensor, factor in (mean.part(total) for mean in means))
    assert float(loss) == pytest.approx(float(model(**data)["loss"].detach()), rel=1e-12)


@pytest.mark.slow
def test_a_model_that_is_compiled_counts_by_what_its_eager_self_was_read_to():
    """torch.compile hides the graph of what it compiles; the values add up by the labels that count all the same."""
    model = Language(shifted).eval()
    compiled, data = torch.compile(model, backend="aot_eager"), batch(labels())
    objective = Objective(compiled)
    objective.settle([data])
    assert error(objective, data, lambda: compiled(**data)["loss"]) <= 1e-10
