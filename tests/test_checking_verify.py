"""The check of the user's own model: right ones pass, planted faults are found and named, nothing is left behind."""

import json
import random
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import autoaccum
from autoaccum.checking import verify as verify_module
from autoaccum.checking.diagnosis import Cause
from autoaccum.checking.verify import VerifyReport, verify_gradient
from autoaccum.errors import LossError, SetupError
from autoaccum.loss.objective import Objective
from autoaccum.window.window_sums import WindowSums
from tests.verify_cases import (
    FAULTS,
    READ,
    RIGHT,
    MaskedTagger,
    Tagger,
    info_nce,
    masked_batch,
    mean,
    mlp,
    pairs,
    tokens,
    total,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def verify(model, batch, *, precision="fp32", most=8, **objective) -> VerifyReport:
    return verify_gradient(Objective(model, **objective), batch, device=CPU, precision=precision, most=most)


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_model_passes(name):
    model, batch, objective = RIGHT[name]()
    report = verify(model, batch, **objective)
    assert (report.ok, report.verifiable, report.cause, report.worst_parameter) == (True, True, None, None), report.text
    assert report.relative_error < 1e-5
    assert report.ratio == pytest.approx(1, abs=1e-5)
    assert objective.get("loss") is None or "the loss " in report.text


@pytest.mark.parametrize("name", READ)
def test_what_an_undeclared_loss_divides_by_is_read(name):
    model, batch, objective = READ[name]()
    report = verify(model, batch, **objective)
    assert (report.ok, report.verifiable) == (True, True), report.text
    assert report.relative_error < 1e-5
    assert "as its graph says" in report.text or "Mean" in report.text


@pytest.mark.parametrize("name", ["mlp with dropout", "residual net", "transformer", "class weights"])
def test_in_double_precision_a_right_model_is_exact(name):
    model, (inputs, targets), objective = RIGHT[name]()
    if isinstance(objective["loss"], nn.Module):
        objective["loss"].double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    assert verify(model.double(), (inputs, targets), **objective).relative_error < 1e-10


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["mlp with dropout", "residual net", "transformer"])
def test_a_right_model_passes_under_autocast(name, precision):
    model, batch, objective = RIGHT[name]()
    report = verify(model, batch, precision=precision, **objective)
    assert (report.ok, report.verifiable) == (True, True), report.text
    assert precision in report.text


def test_fp16_gradients_that_overflow_are_scaled_down_and_compared():
    report = verify(mlp(), pairs(), precision="fp16", loss=lambda outputs, targets: mean(outputs, targets) * 1000)
    assert (report.ok, report.verifiable) == (True, True), report.text


def test_a_right_model_of_16_bit_parameters_passes():
    model, (inputs, targets), objective = RIGHT["transformer"]()
    assert verify(model.bfloat16(), (inputs, targets), **objective).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_computes_partly_in_16_bits_by_itself_passes(dtype):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 64), nn.Linear(64, 5)

        def forward(self, inputs):
            half = [tensor.to(dtype) for tensor in (inputs, self.first.weight, self.first.bias)]
            return self.second(F.linear(*half).float().tanh())

    report = verify(Mixed(), pairs(), loss=mean)
    assert report.ok, report.text
    assert report.relative_error > 1e-5


def transformers_model(name):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    make = {
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=30, **size)),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
            )
        ),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=30, attention_dropout=0.2, num_key_value_heads=2, **size)
        ),
    }
    return make[name]()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["bert", "t5", "gpt2", "llama"])
def test_the_heads_of_transformers_pass(name, precision):
    inputs, labels = tokens()
    batch = {"input_ids": inputs, "attention_mask": (labels != -100).long(), "labels": labels}
    report = verify(transformers_model(name), batch, precision=precision)
    assert (report.ok, report.verifiable) == (True, True), report.text


def test_a_checkpointed_model_with_dropout_passes():
    model = transformers_model("gpt2")
    model.gradient_checkpointing_enable()
    inputs, labels = tokens()
    assert verify(model, {"input_ids": inputs, "labels": labels}).relative_error < 1e-5


def test_two_terms_of_a_head_of_transformers_are_read_and_one_declared_denominator_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    inputs, labels = tokens()
    batch = {"input_ids": inputs, "labels": labels, "next_sentence_label": torch.randint(0, 2, (8,))}
    assert verify(transformers.BertForPreTraining(config), batch).relative_error < 1e-5
    assert verify(transformers.BertForPreTraining(config), batch, reduction="token_mean").cause == Cause.SEVERAL


# --- planted faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(name):
    make, cause, words = FAULTS[name]
    model, batch, settings = make()
    report = verify(model, batch, **settings)
    assert (report.ok, report.verifiable, report.cause) == (False, True, cause), report.text
    assert words in report.text
    assert 2 <= len(report.text.splitlines()) <= 4
    if report.relative_error is not None:
        assert report.relative_error > 1e-3
        assert report.worst_parameter in dict(model.named_parameters())
        assert f"{report.relative_error:.2g}" in report.text


@pytest.mark.parametrize("name", ["a sample mean weighted by tokens", "a mean is declared a sum", "info nce"])
def test_a_planted_fault_is_found_under_bf16_autocast(name):
    make, cause, _ = FAULTS[name]
    model, batch, settings = make()
    assert verify(model, batch, precision="bf16", **settings).cause == cause


def test_what_a_failing_report_declares_makes_it_pass():
    model, batch = MaskedTagger(), masked_batch()
    report = verify(model, batch, reduction="sample_mean")
    assert "reduction=lambda batch: batch['mask'].sum()" in report.text
    assert verify(model, batch, reduction=lambda batch: batch["mask"].sum()).ok


def test_two_samples_show_a_loss_that_is_not_divided_at_exactly_twice():
    inputs, targets = pairs()
    report = verify(mlp(), (inputs[:2], targets[:2]), loss=mean, reduction="sum")
    assert report.ratio == pytest.approx(2, abs=1e-5)
    assert report.cause == Cause.TOO_LARGE


def test_a_fault_in_the_accumulation_itself_is_seen(monkeypatch):
    def plain_means(self, terms):
        return [(term.numerator, 1 / term.denominator) for term in terms.values()]

    model, batch, objective = RIGHT["mlp with dropout"]()
    monkeypatch.setattr(WindowSums, "enter", plain_means)
    assert verify(model, batch, **objective).cause == Cause.TOO_LARGE


# --- nothing to compare -----------------------------------------------------------------------------------------------


def test_one_sample_is_not_verifiable_and_says_so():
    inputs, targets = pairs()
    report = verify(mlp(), (inputs[:1], targets[:1]), loss=mean)
    assert (report.ok, report.verifiable, report.relative_error) == (True, False, None)
    assert report.text.startswith("not verifiable: 1 sample ")
    assert not verify(mlp(), (inputs, targets), loss=mean, most=1).verifiable


class Graph:
    """A batch of a kind that nobody here knows."""

    def __init__(self, rows):
        self.rows = rows


class Unpacking(nn.Linear):
    def forward(self, inputs):
        rows = inputs.rows if isinstance(inputs, Graph) else pad_packed_sequence(inputs["x"], batch_first=True)[0][:, 0]
        return super().forward(rows)


@pytest.mark.parametrize("samples", [8, 20])
@pytest.mark.parametrize(
    ("pack", "place"),
    [
        (Graph, r"\[0\] .* type Graph"),
        (lambda x: {"x": pack_sequence([*x[:, None]])}, r"\[0\]\['x'\] .* type PackedSequence"),
    ],
    ids=["unknown", "packed"],
)
def test_what_cannot_be_cut_is_not_held_against_the_model(pack, place, samples):
    batch = pack(torch.randn(samples, 6)), torch.randint(0, 4, (samples,))
    report = verify(Unpacking(6, 4), batch, loss=F.cross_entropy)
    assert (report.ok, report.verifiable) == (True, False)
    assert re.search(f"{place}.* cannot be cut", report.text)


def test_what_is_the_same_for_all_samples_need_not_be_cut():
    model = nn.Linear(6, 4)
    batch = torch.randn(8, 6), torch.randint(0, 4, (8,)), "train", 3, None, torch.float32
    report = verify(model, batch, step=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    assert report.verifiable


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda outputs, targets: outputs.sum() * 0, "the gradient of 8 samples is 0"),
        (lambda outputs, targets: outputs.sum() * float("nan"), "the loss is nan"),
        (lambda outputs, targets: (outputs * 0).abs().sum().sqrt(), "the gradient is not finite"),
    ],
)
def test_a_gradient_that_is_zero_or_nan_is_not_verifiable(loss, words):
    report = verify(mlp(), pairs(), loss=loss)
    assert report.ok
    assert not report.verifiable
    assert words in report.text


def test_targets_that_are_all_ignored_are_not_verifiable():
    report = verify(mlp(), (torch.randn(8, 6), torch.full((8,), -100)), loss=nn.CrossEntropyLoss())
    assert report.ok
    assert not report.verifiable


def test_a_model_that_fits_its_samples_already_is_not_accused_of_rounding():
    inputs = torch.randn(8, 3)
    model = nn.Linear(3, 1, bias=False)
    targets = torch.randn(8, 1)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(inputs, targets).solution.T)
    report = verify(model, (inputs, targets), loss=nn.MSELoss())
    assert report.ok
    assert not report.verifiable
    assert "fits them" in report.text


class Unfixable(nn.Module):
    """Noise that comes from nowhere that could be fixed."""

    def __init__(self):
        super().__init__()
        self.head, self.source = nn.Linear(6, 5), random.SystemRandom()

    def forward(self, inputs):
        return self.head(inputs * self.source.random())


class NumpyNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 5)

    def forward(self, inputs):
        numpy = pytest.importorskip("numpy")
        return self.head(inputs * torch.tensor(numpy.random.rand(*inputs.shape), dtype=torch.float32))


@pytest.mark.parametrize("model", [Unfixable, NumpyNoise])
def test_randomness_that_cannot_be_fixed_is_said_and_not_held_against_the_model(model):
    report = verify(model(), pairs(), loss=mean)
    assert (report.ok, report.verifiable, report.cause) == (True, False, Cause.RANDOM)


def test_kernels_that_differ_from_run_to_run_widen_the_tolerance():
    class Shaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.source = nn.Linear(6, 5), random.SystemRandom()

        def forward(self, inputs):
            return self.head(inputs) * (1 + 1e-3 * self.source.random())

    assert verify(Shaky(), pairs(), loss=mean).ok


# --- what is left behind ----------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """A bit of everything that a forward may change."""

    def __init__(self):
        super().__init__()
        self.norm, self.rnn, self.drop = (
            nn.BatchNorm1d(6),
            nn.LSTM(6, 6, 2, dropout=0.3, batch_first=True),
            nn.Dropout(0.4),
        )
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.2, batch_first=True)
        self.head = nn.utils.spectral_norm(nn.Linear(6, 5))
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.history = 0, []
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, inputs):
        self.calls += 1
        self.history.append(len(inputs))
        self.cache = inputs
        self.seen += len(inputs)
        random.random()
        hidden = self.norm(inputs) + torch.rand(inputs.shape, generator=self.generator)
        hidden = self.rnn(hidden[:, None].repeat(1, 3, 1))[0]
        return self.head(self.drop(self.attention(hidden, hidden, hidden)[0].mean(1)))


def state_of(model, optimizer):
    modules = {name: {**vars(module)} for name, module in model.named_modules()}
    for plain in modules.values():
        for registry in ("_parameters", "_buffers", "_modules"):
            plain.pop(registry)
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": [parameter.grad for parameter in model.parameters()],
        "gradient values": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires": [parameter.requires_grad for parameter in model.parameters()],
        "plain": {name: sorted(plain) for name, plain in modules.items()},
        "flags": [(m.training, getattr(m, "p", None), getattr(m, "dropout", None)) for m in model.modules()],
        "own": (model.calls, list(model.history), model.generator.get_state()),
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "optimizer": {id(p): {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()},
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "random": (torch.get_rng_state(), random.getstate()),
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def fails_in_parts(outputs, targets):
    if len(outputs) < 8:
        raise ValueError("too few")
    return mean(outputs, targets)


def fails(outputs, targets):
    raise KeyError("a mistake of the user's")


@pytest.mark.parametrize("loss", [mean, total, info_nce, fails_in_parts, fails])
@pytest.mark.parametrize("training", [True, False])
def test_everything_is_as_it_was(loss, training):
    model = Stateful()
    optimizer = torch.optim.AdamW(model.parameters())
    inputs, targets = torch.randn(8, 6), torch.randn(8, 5) if loss is info_nce else pairs()[1]
    model(inputs).sum().backward()
    optimizer.step()
    model.norm.weight.grad = None
    model.rnn.weight_hh_l0.requires_grad_(False)
    model.train(training)
    before, kept = state_of(model, optimizer), (inputs.clone(), targets.clone())
    if loss is fails:
        with pytest.raises(KeyError, match="a mistake"):
            verify(model, (inputs, targets), loss=loss)
    else:
        report = verify(model, (inputs, targets), loss=loss)
        assert report.verifiable, report.text
        assert report.ok == (loss in (mean, total))
    after = state_of(model, optimizer)
    assert [name for name in before if not same(before[name], after[name])] == []
    assert all(one is other for one, other in zip(before["gradients"], after["gradients"]))
    assert same(kept, (inputs, targets))


def test_a_right_model_costs_three_batches():
    sizes = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, inputs):
            sizes.append(len(inputs))
            return self.inner(inputs)

    assert verify(Counting(), pairs(), loss=nn.CrossEntropyLoss()).ok
    assert sizes == [8, 8, 5, 3]


def test_of_a_large_batch_eight_samples_with_unequal_denominators_are_used():
    seen = []

    def step(model, batch):
        seen.append((batch[1] != -100).sum(1).tolist())
        return mean(model(batch[0]), batch[1])

    inputs = torch.randint(0, 30, (40, 11))
    labels = torch.where(torch.arange(11) <= torch.arange(40)[:, None] // 4, inputs, -100)
    order = torch.randperm(40)
    counted = {"reduction": lambda batch: (batch[1] != -100).sum()}
    report = verify(Tagger(), (inputs[order], labels[order]), step=step, **counted)
    assert report.ok, report.text
    whole, _, light, heavy = [counts for counts in seen if len(counts) > 2]
    assert (len(whole), len(light), len(heavy)) == (8, 5, 3)
    assert max(light) <= min(heavy)
    assert set(whole) >= {1, 10}


def conditional(model, batch):
    """A term that is only there where something is marked: over samples that are alike nothing shows it."""
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    marked = batch[0][:, 0] > 0
    return losses.mean() + (losses[marked].mean() if marked.any() else 0.0)


def test_a_loss_whose_values_do_not_add_up_is_refused_though_the_parts_that_were_compared_are_alike(monkeypatch):
    monkeypatch.setattr(verify_module, "ragged", lambda samples: (4, 4))
    inputs, targets = pairs()
    inputs, targets = inputs[:4].repeat(2, 1), targets[:4].repeat(2)
    inputs[:, 0] = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1])
    order = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])
    report = verify(mlp(), (inputs[order], targets[order]), step=conditional)
    assert (report.ok, report.cause) == (False, Cause.COUPLED), report.text
    assert "its terms differ between parts" in report.text


def test_no_more_samples_run_at_once_than_are_said_to_fit():
    assert "5 samples at once and accumulated as 3 + 2" in verify(mlp(), pairs(), loss=mean, most=5).text


def test_batch_norm_is_said_to_have_used_its_running_statistics():
    model, batch, objective = RIGHT["residual net"]()
    assert "running statistics" in verify(model, batch, **objective).text
    assert "running statistics" not in verify(mlp(), pairs(), loss=mean).text


def test_a_loss_that_is_no_scalar_is_raised_and_not_reported():
    with pytest.raises(LossError, match="shape"):
        verify(mlp(), pairs(), loss=lambda outputs, targets: outputs)


def test_batches_of_lists_and_records_are_cut_too():
    def step(model, batch):
        return F.cross_entropy(model(torch.stack(batch["images"])), batch["y"]) * len(batch["names"]) / len(batch["y"])

    inputs, targets = pairs()
    batch = {
        "images": list(inputs),
        "y": targets,
        "names": [f"image {i}" for i in range(8)],
        "note": "the same for all",
    }
    assert verify(mlp(), batch, step=step).ok


def test_a_report_is_plain_values():
    report = verify(mlp(), pairs(), loss=mean, reduction="sum")
    assert json.loads(json.dumps(report.to_dict()))["cause"] == Cause.TOO_LARGE
    assert list(report.to_dict()) == [
        "ok", "verifiable", "relative_error", "ratio", "cause", "worst_parameter", "text",
    ]  # fmt: skip


def test_what_is_neither_a_model_nor_a_known_trainer_is_named():
    class Engine:
        pass

    with pytest.raises(SetupError, match=r"verify\(\) got a .*Engine: it takes a Transformers Trainer or a Lightning"):
        autoaccum.verify(Engine())
