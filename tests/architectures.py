"""Small models of many kinds, each with batches of any size and the step that trains it.

Torch's own, and Transformers' with small random configurations where that is installed. They are what
forecasts are checked on, and what benchmarks probe.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CLASSES, VOCABULARY = 10, 200


@dataclass(frozen=True)
class Architecture:
    """One kind of model.

    `batch(n)` or, where `sequence`, `batch(n, length)` gives (inputs, targets) for `loss`, or, where `loss`
    is None, a dict that the model is called with and answers with its loss. `length` is the usual length.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[..., Any]
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    sequence: bool = False
    length: int = 16
    needs: str | None = None  # the package it comes from

    @property
    def installed(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of one batch, with its graph."""
        if self.loss is None:
            loss: Tensor = model(**batch).loss
            return loss
        inputs, targets = batch
        return self.loss(model(inputs), targets)

    def samples(self, n: int, length: int | None = None) -> Any:
        """A batch of n, of `length` where the model takes sequences."""
        return self.batch(n, length or self.length) if self.sequence else self.batch(n)


def multiplies_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself: oneDNN then packs the matrices into scratch as it sees fit."""
    described = Path("/proc/cpuinfo")
    return described.exists() and "avx512_bf16" in described.read_text(encoding="ascii")


def _images(n: int, size: int = 16, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, size, size), torch.randint(classes, (n,))


def _rows(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 40), torch.randint(CLASSES, (n,))


def _series(n: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, length, 24), torch.randint(CLASSES, (n,))


def _tokens(n: int, length: int) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (n, length))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


def _pixels(n: int) -> dict[str, Tensor]:
    images, labels = _images(n, 16)
    return {"pixel_values": images, "labels": labels}


def _itself(n: int) -> tuple[Tensor, Tensor]:
    images = torch.rand(n, 3, 16, 16)
    return images, images


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(40, 96), nn.GELU(), nn.Dropout(0.1), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, CLASSES)
    )


def _cnn(norm: Callable[[int], nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 32):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), norm(width), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def _groups_of_four(width: int) -> nn.Module:
    return nn.GroupNorm(4, width)


class _Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outside) for _ in range(2))
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        changes = stride != 1 or inside != outside
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.first(x)).relu()
        return (self.norms[1](self.second(y)) + self.shortcut(x)).relu()


def _resnet() -> nn.Module:
    blocks = [_Residual(16, 16, 1), _Residual(16, 32, 2), _Residual(32, 64, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *blocks, *head)


class _Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layers = kind(24, 100, num_layers=2, batch_first=True)
        self.head = nn.Linear(100, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(24, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.enter(x)).mean(1))


class _ExplicitAttention(nn.Module):
    """Attention that keeps its scores, so that memory has a term in length squared."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(24, 32)
        self.projections = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for projection in self.projections:
            query, key, value = projection(x).chunk(3, -1)
            x = x + (query @ key.transpose(1, 2)).softmax(-1) @ value
        return self.head(x.mean(1))


def _autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.ConvTranspose2d(16, 3, 4, stride=2, padding=1),
        nn.Sigmoid(),
    )


class _Checkpointed(nn.Module):
    """Blocks whose activations are thrown away and computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(40, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(3)
        )
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def _transformer(kind: str, config: str, **settings: Any) -> nn.Module:
    import transformers

    return getattr(transformers, kind)(getattr(transformers, config)(**settings))


def _language(kind: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    return functools.partial(_transformer, kind, config, vocab_size=VOCABULARY, **settings)


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

ARCHITECTURES = (
    Architecture("mlp", _mlp, _rows, F.cross_entropy),
    Architecture("batchnorm-cnn", functools.partial(_cnn, nn.BatchNorm2d), _images, F.cross_entropy),
    Architecture("groupnorm-cnn", functools.partial(_cnn, _groups_of_four), _images, F.cross_entropy),
    Architecture("resnet", _resnet, _images, F.cross_entropy),
    Architecture("lstm", functools.partial(_Recurrent, nn.LSTM), _series, F.cross_entropy, sequence=True),
    Architecture("gru", functools.partial(_Recurrent, nn.GRU), _series, F.cross_entropy, sequence=True),
    Architecture("transformer-encoder", _Encoder, _series, F.cross_entropy, sequence=True),
    Architecture("explicit-attention", _ExplicitAttention, _series, F.cross_entropy, sequence=True),
    Architecture("conv-autoencoder", _autoencoder, _itself, F.mse_loss),
    Architecture("checkpointed-mlp", _Checkpointed, _rows, F.cross_entropy),
    Architecture(
        "gpt2",
        _language(
            "GPT2LMHeadModel",
            "GPT2Config",
            n_layer=2,
            n_embd=32,
            n_head=4,
            n_positions=256,
            bos_token_id=1,
            eos_token_id=2,
        ),
        _tokens,
        sequence=True,
        needs="transformers",
    ),
    Architecture(
        "llama",
        _language("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **_SIZES, **_SPECIAL),
        _tokens,
        sequence=True,
        needs="transformers",
    ),
    Architecture(
        "bert",
        _language("BertForMaskedLM", "BertConfig", max_position_embeddings=256, **_SIZES, **_SPECIAL),
        _tokens,
        sequence=True,
        needs="transformers",
    ),
    Architecture(
        "t5",
        _language(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
        ),
        _tokens,
        sequence=True,
        needs="transformers",
    ),
    Architecture(
        "vit",
        functools.partial(
            _transformer,
            "ViTForImageClassification",
            "ViTConfig",
            image_size=16,
            patch_size=4,
            num_labels=CLASSES,
            **_SIZES,
        ),
        _pixels,
        needs="transformers",
    ),
)
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
