"""Tiny models in float64, without dropout, each the same at every call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CausalLM", "MaskedLM", "Pairs", "Shifting", "classifier", "images", "seeded", "tagged", "tokens", "vectors"]

IGNORED = -100
WORDS, LENGTH, CLASSES = 11, 8, 5


def seeded(make: Callable[..., nn.Module], *args: Any, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """`make(*args)` with the same random parameters each time, in training mode."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        return make(*args).to(dtype).train()
    finally:
        torch.set_rng_state(state)


class Named(nn.Module):
    """A module that is called with the keyword x, as the samples name it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def classifier(outputs: int = CLASSES, inputs: int = 6) -> nn.Module:
    """Two linear layers."""
    return seeded(lambda: Named(nn.Linear(inputs, 12), nn.Tanh(), nn.Linear(12, outputs)))


class Pairs(nn.Module):
    """Embeds both sides of pairs; its own loss ranks each anchor's positive among those of all that it is given."""

    scale = 20.0

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, CLASSES))

    def embedded(self, batch: Any) -> list[Tensor]:
        return [self.net(batch["anchor"]), self.net(batch["positive"])]

    def ranked(self, found: list[Tensor]) -> Tensor:
        anchors, positives = (F.normalize(side, dim=1) for side in found)
        return F.cross_entropy(self.scale * anchors @ positives.T, torch.arange(len(anchors)))

    def forward(self, anchor: Tensor, positive: Tensor) -> dict[str, Tensor]:
        return {"loss": self.ranked(self.embedded({"anchor": anchor, "positive": positive}))}


class CausalLM(nn.Module):
    """Embedding, a causal average over the past, a head; logits of shape (samples, words, places)."""

    def __init__(self, words: int = WORDS) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 10)
        self.mix = nn.Linear(10, 10)
        self.head = nn.Linear(10, words)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embed(x)
        places = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=embedded.dtype).view(1, -1, 1)
        past = embedded.cumsum(1) / places
        return self.head(torch.tanh(self.mix(past))).transpose(1, 2)


class MaskedLM(nn.Module):
    """A model that returns its loss: the mean over labels that are not ignored, at their own places."""

    first = 0

    def __init__(self) -> None:
        super().__init__()
        self.body = CausalLM()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)[:, :, : x.shape[1] - self.first]
        return {"loss": F.cross_entropy(logits, labels[:, self.first :], ignore_index=IGNORED)}


class Shifting(MaskedLM):
    """A head in the manner of GPT-2: place t predicts label t + 1, so that the first label never counts."""

    first = 1


def vectors(count: int, inputs: int = 6, seed: int = 1) -> list[dict[str, Tensor]]:
    """Samples of one vector and one class each."""
    chance = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(inputs, dtype=torch.float64, generator=chance),
            "labels": torch.randint(0, CLASSES, (), generator=chance),
        }
        for _ in range(count)
    ]


def tokens(count: int, *, shares: tuple[float, ...] = (1.0, 0.2, 0.7, 0.4), words: int = WORDS, seed: int = 2) -> list:
    """Sequences whose labels are partly ignored, in unequal shares; the first label counts, one or more do."""
    chance = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        x = torch.randint(0, words, (LENGTH,), generator=chance)
        counted = max(2, round(shares[index % len(shares)] * LENGTH))
        labels = x.roll(-1).clone()
        labels[counted:] = IGNORED
        samples.append({"x": x, "labels": labels})
    return samples


def images(count: int, seed: int = 3) -> list[dict[str, Tensor]]:
    """Small images of differing brightness, with a class each."""
    chance = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(3, 4, 4, dtype=torch.float64, generator=chance) * (1 + index % 3) + index,
            "labels": torch.randint(0, CLASSES, (), generator=chance),
        }
        for index in range(count)
    ]


def tagged(samples: list[dict[str, Any]], **more: Callable[[int], Any]) -> list[dict[str, Any]]:
    """The samples with further entries, each a function of the sample's index."""
    return [{**sample, **{name: of(index) for name, of in more.items()}} for index, sample in enumerate(samples)]
