"""Transformers' heads, tiny, random, in float64, without dropout. Only for tests that have asked for transformers."""

from typing import Any

import torch
from torch import nn

from tests.conformance.models import IGNORED, LENGTH, seeded

__all__ = ["SINGLE", "head", "labelled"]

SINGLE = 1e-5
"""What is asked of heads that compute in float32 inside, whatever their dtype: that format's own exactness."""

_TINY = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 20}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def head(name: str) -> nn.Module:
    """A model by its class name in transformers."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if name.startswith("GPT2"):
        config: Any = transformers.GPT2Config(
            vocab_size=20,
            n_embd=8,
            n_layer=1,
            n_head=2,
            n_positions=16,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    elif name.startswith("Llama"):
        config = transformers.LlamaConfig(**_TINY, max_position_embeddings=16, num_labels=3, pad_token_id=0)
    elif name.startswith("T5"):
        config = transformers.T5Config(
            vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0,
        )  # fmt: skip
    elif name.startswith("DistilBert"):
        config = transformers.DistilBertConfig(
            vocab_size=20, dim=8, hidden_dim=16, n_layers=1, n_heads=2, dropout=0.0, attention_dropout=0.0,
            seq_classif_dropout=0.0, num_labels=3, max_position_embeddings=16,
        )  # fmt: skip
    elif name.startswith("Roberta"):
        config = transformers.RobertaConfig(**_TINY, **_STILL, max_position_embeddings=18, num_labels=3)
    else:
        config = transformers.BertConfig(**_TINY, **_STILL, max_position_embeddings=16, num_labels=3)
    return seeded(getattr(transformers, name), config)


def labelled(count: int, kind: str, seed: int = 5) -> list[dict[str, torch.Tensor]]:
    """Samples for a head: "class" (one label each), "even" (every token counts), "ragged" (unequally many count)."""
    chance = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        words = torch.randint(3, 20, (LENGTH,), generator=chance)
        if kind == "class":
            labels = torch.randint(0, 3, (), generator=chance)
        else:
            labels = words.clone()
            if kind == "ragged":
                labels[max(2, LENGTH * (1 + 3 * index % 8) // 8) :] = IGNORED
        samples.append({"input_ids": words, "labels": labels})
    return samples
