"""A head whose logits are put off: chunked where they meet a cross entropy, themselves everywhere else."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.errors import NothingFitsError
from autoaccum.model.lazy_logits import LazyHead, Logits, chunked, heads
from autoaccum.model.memory_savers import installed, obstacle

CPU = torch.device("cpu")
CLASSES, WIDE = 2100, 6


class Language(nn.Module):
    """tokens (samples, places) -> logits; with labels also the loss that `compare` makes of them."""

    def __init__(self, compare=None):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDE)
        self.mix = nn.Linear(WIDE, WIDE)
        self.head = nn.Linear(WIDE, CLASSES)
        self.compare = compare

    def forward(self, tokens, labels=None):
        logits = self.head(torch.tanh(self.mix(self.embed(tokens))))
        if labels is None:
            return logits
        return {"loss": self.compare(logits, labels), "logits": logits}


def tokens(samples=3, places=7):
    return torch.randint(CLASSES, (samples, places), generator=torch.Generator().manual_seed(1))


def make(compare=None):
    torch.manual_seed(0)
    return Language(compare).double()


class OwnLoss(torch.autograd.Function):
    """A user's loss with a gradient of its own."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.square().mean()

    @staticmethod
    def backward(ctx, gradient):
        (logits,) = ctx.saved_tensors
        return gradient * 2 * logits / logits.numel()


MET = {
    "flattened": lambda x, y: F.cross_entropy(x.view(-1, x.size(-1)), y.view(-1)),
    "shifted": lambda x, y: F.cross_entropy(x[..., :-1, :].contiguous().reshape(-1, CLASSES), y[..., 1:].reshape(-1)),
    "cut": lambda x, y: nn.CrossEntropyLoss()(x[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    "masked": lambda x, y: F.cross_entropy(x[y > 50], y[y > 50]),
    "last": lambda x, y: F.cross_entropy(x[:, -1], y[:, -1], label_smoothing=0.1),
    "summed": lambda x, y: F.cross_entropy(x.double().view(-1, CLASSES), y.view(-1), reduction="sum") / 4,
}
ASKED_FOR = {
    "probabilities": lambda x, y: F.nll_loss(x.log_softmax(-1).view(-1, CLASSES), y.view(-1)),
    "capped": lambda x, y: F.cross_entropy((torch.tanh(x / 30) * 30).view(-1, CLASSES), y.view(-1)),
    "channels second": lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
    "soft labels": lambda x, y: F.cross_entropy(x[0], F.one_hot(y[0], CLASSES).double()),
    "unreduced": lambda x, y: F.cross_entropy(x.view(-1, CLASSES), y.view(-1), reduction="none").mean(),
    "classes cut": lambda x, y: F.cross_entropy(x[..., :2000].flatten(0, 1), y.flatten() % 2000),
    "a function of the user's": lambda x, y: OwnLoss.apply(x),
    "a penalty beside": lambda x, y: F.cross_entropy(x.flatten(0, 1), y.flatten()) + x.square().mean(),
}


def written(change):
    """A model's comparison that first does something to its logits, and leaves what that returns."""

    def compare(x, y):
        change(x)
        return F.cross_entropy(x.view(-1, CLASSES), y.view(-1))

    return compare


def halves_in_views(x, y):
    flat = x.view(-1, CLASSES)[2:][:9]
    x.div_(2)
    flat[..., 1] = 3
    return F.cross_entropy(x.view(-1, CLASSES), y.view(-1)) + F.cross_entropy(flat, y.view(-1)[2:11])


def divides_a_name(x, y):
    flat = x.view(-1, CLASSES)
    x /= 3
    return F.cross_entropy(flat, y.view(-1))


def writes_to_a_copy(x, y):
    chosen = x[y > 50]
    chosen.mul_(2)
    return F.cross_entropy(chosen, y[y > 50]) + F.cross_entropy(x.view(-1, CLASSES), y.view(-1))


def without_gradients(x):
    with torch.no_grad():
        x[..., 3] = -4.0


WRITTEN = {
    "an item": written(lambda x: x.__setitem__((..., 7), -5.0)),
    "divided": written(lambda x: x.div_(3.0)),
    "a view": written(lambda x: x.view(-1, CLASSES).mul_(0.5)),
    "a slice": written(lambda x: x[:, :-1].clamp_(max=0.1)),
    "filled": written(lambda x: x.masked_fill_(torch.arange(CLASSES) > 2090, -9.0)),
    "past the graph": written(lambda x: x.data.__setitem__((..., 2), 1.0)),
    "a hook on its gradient": written(lambda x: x.register_hook(lambda gradient: 2 * gradient)),
    "a hook on a view's": lambda x, y: (
        (flat := x.view(-1, CLASSES)).register_hook(lambda gradient: 2 * gradient) and F.cross_entropy(flat, y.view(-1))
    ),
    "without gradients": written(without_gradients),
    "views of views": halves_in_views,
    "by an operator": divides_a_name,
    "a copy": writes_to_a_copy,
}
CALLED = {
    "by name": lambda x, y: F.cross_entropy(input=torch.reshape(input=x, shape=(-1, CLASSES)), target=y.view(-1)),
    "view by name": lambda x, y: F.cross_entropy(x.view(size=(-1, CLASSES)), y.view(-1)),
    "flatten by name": lambda x, y: F.cross_entropy(torch.flatten(input=x, end_dim=1), y.view(-1)),
    "as another tensor": lambda x, y: F.cross_entropy(x.to(torch.ones(1).double()).view(-1, CLASSES), y.view(-1)),
    "in a layout": lambda x, y: F.cross_entropy(
        x.double(memory_format=torch.preserve_format).view(-1, CLASSES), y.view(-1)
    ),
    "an array's mask": lambda x, y: F.cross_entropy(x[(y > 50).numpy()], y[y > 50]),
    "an array's mask of classes": lambda x, y: x[(torch.arange(x.numel()) % 7 == 0).view(x.shape).numpy()].pow(2).sum(),
}


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch)["loss"]
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.fixture
def computed(monkeypatch):
    """How often the logits themselves were asked for."""
    calls = []
    real = Logits.themselves
    monkeypatch.setattr(Logits, "themselves", lambda self: calls.append(1) or real(self))
    return calls


@pytest.mark.parametrize("kind", [*MET, *ASKED_FOR])
def test_loss_and_gradients_are_the_plain_models(kind, computed):
    batch = {"tokens": tokens(), "labels": tokens().flip(1)}
    model = make({**MET, **ASKED_FOR}[kind])
    expected = gradients(model, batch)
    with installed("chunked_loss", model, CPU):
        found = gradients(model, batch)
    assert (found[0] - expected[0]).abs() <= 1e-12 * expected[0].abs()
    assert (found[1] - expected[1]).norm() <= 1e-12 * expected[1].norm()
    assert bool(computed) == (kind in ASKED_FOR)


@pytest.mark.parametrize("bf16", [False, True])
def test_formats_are_the_plain_models(bf16):
    batch = {"tokens": tokens(), "labels": tokens().flip(1)}
    for model in (make(MET["flattened"]).float(), make(MET["flattened"]).bfloat16()):
        found = []
        for rung in (None, "chunked_loss"):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16), installed(rung, model, CPU):
                out = model(**batch)
            found.append((out["logits"].dtype, out["loss"].dtype, [(p.grad is None) for p in model.parameters()]))
            torch.testing.assert_close(out["loss"], model(**batch)["loss"], rtol=2e-2, atol=0, check_dtype=False)
        assert found[0] == found[1]


@pytest.mark.parametrize("kind", [*WRITTEN, *CALLED])
def test_logits_that_are_written_to_or_met_in_odd_ways_are_the_plain_models(kind):
    batch = {"tokens": tokens(), "labels": tokens().flip(1)}
    model = make({**WRITTEN, **CALLED}[kind])
    expected = gradients(model, batch)
    with installed("chunked_loss", model, CPU):
        found = gradients(model, batch)
    assert (found[0] - expected[0]).abs() <= 1e-12 * expected[0].abs()
    assert (found[1] - expected[1]).norm() <= 1e-12 * expected[1].norm()


def test_what_is_known_without_the_logits_asks_for_none(computed):
    model = make()
    with chunked(model):
        logits = model(tokens())
    assert isinstance(logits, Logits)
    assert (logits.shape, logits.size(-1), logits.ndim, len(logits)) == ((3, 7, CLASSES), CLASSES, 3, 3)
    assert (logits.dtype, logits.device, logits.requires_grad) == (torch.float64, CPU, True)
    assert logits.float().view(-1, CLASSES).dtype == torch.float32
    assert not computed
    torch.testing.assert_close(logits + 0, model(tokens()))
    torch.testing.assert_close(copy.deepcopy(logits.detach()), model(tokens()).detach())
    assert logits.argmax(-1).shape == (3, 7)


def test_without_gradients_nothing_is_prepared_for_any():
    model = make(MET["flattened"])
    with torch.no_grad():
        expected = model(tokens(), tokens())["loss"]
        with chunked(model):
            out = model(tokens(), tokens())
            torch.testing.assert_close(out["loss"], expected)
            assert not out["logits"].requires_grad
            torch.testing.assert_close(out["logits"].softmax(-1), model(tokens()).softmax(-1))


def test_heads_are_the_layers_with_the_most_classes_and_never_few():
    model = make()
    assert heads(model) == [model.head]
    assert obstacle("chunked_loss", model, CPU, "fp32") is None
    small = nn.Sequential(nn.Linear(8, 100), nn.Linear(100, 8))
    assert heads(small) == []
    assert "a linear layer over 2,048 classes or more" in obstacle("chunked_loss", small, CPU, "auto")
    assert heads(nn.Linear(4096, 2048)) == []  # narrows: no head


def test_a_compiled_head_stays_as_it_is(monkeypatch):
    model = make()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with LazyHead(model.head):
        assert type(model.head(torch.zeros(1, WIDE, dtype=torch.float64))) is torch.Tensor


# --- in a training


def pairs():
    return tokens(8, 300), tokens(8, 300).flip(1)


def asked(**more):
    return {"data": dict(zip(("tokens", "labels"), pairs())), "target_batch": 4, "device": "cpu", "optimizer": "sgd",
            "seed": 3, "cache": False, **more}  # fmt: skip


def test_where_logits_do_not_fit_the_ladder_takes_the_chunked_loss_and_trains_to_the_same_weights():
    compare = MET["flattened"]
    with pytest.raises(NothingFitsError, match=r"chunked_loss: fits"):
        autoaccum.fit(make(compare), **asked(memory="5400KiB"))
    model, plain = make(compare), make(compare)
    result = autoaccum.fit(
        model, **asked(memory="5400KiB", ladder="auto"), max_batch=2, val_data=dict(zip(("tokens", "labels"), pairs()))
    )
    assert result.plan.ladder == "chunked_loss"
    assert result.plan.micro_batches == (2, 2)
    alike = autoaccum.fit(plain, **asked(memory="1GiB"), micro_batch=4)
    assert alike.plan.ladder is None
    for own, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


def test_more_samples_fit_where_a_loss_of_torchs_follows_a_large_head():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, WIDE), nn.Linear(WIDE, CLASSES)

        def forward(self, x):
            return self.head(self.body(x))

    chance = torch.Generator().manual_seed(0)
    data = torch.randn(4096, 4, generator=chance), torch.randint(CLASSES, (4096,), generator=chance)
    reports = [
        autoaccum.probe(Flat(), data, target_batch=4096, loss=nn.CrossEntropyLoss(label_smoothing=0.1), device="cpu",
                        optimizer="sgd", memory="12MiB", cache=False, ladder=rung)
        for rung in (None, "chunked_loss")
    ]  # fmt: skip
    plain, saved = (report.limit for report in reports)
    assert saved > 3 * plain


HEADS = ("GPT2LMHeadModel", "LlamaForCausalLM", "Qwen2ForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration")


@pytest.mark.parametrize("name", HEADS)
def test_transformers_heads_are_chunked_without_their_code_being_touched(name, computed):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    kinds = {
        "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
        "T5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
        "Qwen2": {**sizes, "num_key_value_heads": 1},
    }
    kind = name.split("For")[0].removesuffix("LMHeadModel")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=CLASSES, **kinds.get(kind, sizes))
    model = getattr(transformers, name)(config).double().eval()
    labels = tokens().flip(1)
    labels[0, :5] = -100
    batch = {"input_ids": tokens(), "labels": labels}
    expected = gradients(model, batch)
    with installed("chunked_loss", model, CPU):
        found = gradients(model, batch)
    assert not computed
    # Some heads compute their loss in float32 whatever the model's format is.
    within = 1e-10 if name.startswith(("Bert", "T5")) else 1e-6
    assert (found[1] - expected[1]).norm() <= within * expected[1].norm()
    assert (found[0] - expected[0]).abs() <= within * expected[0].abs()
