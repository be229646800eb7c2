"""Transformers' heads, tiny and random: their own losses are accumulated exactly, whatever they count."""

import pytest
import torch

from autoaccum.loss.counts import tokens
from autoaccum.loss.objective import Objective
from tests.test_loss_heads import B, T, batch, labels
from tests.test_loss_objective import accumulated, counted, error

TINY = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 20}


def transformers_model(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "GPT2LMHeadModel":
        config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    elif name == "LlamaForCausalLM":
        config = transformers.LlamaConfig(**TINY, max_position_embeddings=16)
    elif name.startswith("T5"):
        config = transformers.T5Config(
            vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    elif name.startswith("Segformer"):
        config = transformers.SegformerConfig(
            hidden_sizes=[4, 4, 4, 4], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=3
        )
    else:
        config = transformers.BertConfig(**TINY, max_position_embeddings=16, num_labels=3)
    return getattr(transformers, name)(config).double().eval()


# Heads that compute in float32 whatever the model's dtype are as exact as float32 is.
EXACT, SINGLE = 1e-10, 1e-5


@pytest.mark.parametrize(
    ("name", "first", "within"),
    [
        ("GPT2LMHeadModel", 1, SINGLE),
        ("LlamaForCausalLM", 1, SINGLE),
        ("T5ForConditionalGeneration", 0, SINGLE),
        ("BertForMaskedLM", 0, EXACT),
        ("BertLMHeadModel", 1, SINGLE),
        ("BertForTokenClassification", 0, EXACT),
    ],
)
def test_transformers_token_heads_are_accumulated_exactly(name, first, within):
    model = transformers_model(name)
    y = labels()
    y[y > 0] %= 3 if "TokenClassification" in name else 20
    data = {"input_ids": batch(y)["input_ids"] + 1, "attention_mask": torch.ones(B, T, dtype=torch.long), "labels": y}
    objective = Objective(model)
    assert counted(objective, data) == {"loss": tokens(y[:, first:])}
    assert error(objective, data, lambda: model(**data).loss) <= within
    assert "as its graph says" in objective.reason


@pytest.mark.parametrize(
    ("name", "y"),
    [
        ("BertForSequenceClassification", torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])),
        ("BertForSequenceClassification", torch.rand(B, 3, dtype=torch.float64).round()),
        ("BertForNextSentencePrediction", torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])),
    ],
)
def test_transformers_heads_with_labels_a_sample_are_accumulated_exactly(name, y):
    model = transformers_model(name)
    data = {"input_ids": batch(y)["input_ids"], "labels": y}
    assert error(Objective(model), data, lambda: model(**data).loss) <= EXACT


def test_transformers_segmentation_head_ignores_what_its_configuration_says():
    model = transformers_model("SegformerForSemanticSegmentation")
    y = torch.randint(0, 3, (B, 32, 32))
    y[::2, 5:] = 255
    data = {"pixel_values": torch.randn(B, 3, 32, 32, dtype=torch.float64), "labels": y}
    objective = Objective(model)
    assert counted(objective, data) == {"loss": tokens(y, 255)}
    assert error(objective, data, lambda: model(**data).loss) <= SINGLE


def test_a_tokenizers_batch_is_cut_and_called_as_it_is():
    transformers = pytest.importorskip("transformers")
    model = transformers_model("BertForMaskedLM")
    data = transformers.BatchEncoding(batch(labels()))
    objective = Objective(model)
    whole = accumulated(objective, data, (B,))
    assert torch.allclose(accumulated(objective, data), whole, rtol=1e-9, atol=1e-12)
    assert list(data) == ["input_ids", "labels"]
