"""Train a small language model on text whose paragraphs differ in length, with windows cut by length.

    python examples/04_text.py

The text is Python's own language reference, as `help()` shows it, a paragraph a sample and a byte a token. Paragraphs
have from 1 to 512 bytes. What fits at once depends on how long they are: autoaccum sees that from a few samples,
forecasts the memory of any number of samples of any length, and cuts each window of 64 so that short ones run many at
once, long ones few, and little is padding. The effective batch stays exactly 64.

The file is a TARGET of the command line as well:

    autoaccum probe examples/04_text.py:setup --target-batch 64 --memory 48MiB
"""

import pydoc_data.topics
import re
import time

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import autoaccum

TARGET_BATCH = 64
LONGEST = 512  # bytes; longer paragraphs are cut
WIDTH, HEADS, BLOCKS = 64, 4, 2


def paragraphs() -> tuple[list[Tensor], list[Tensor]]:
    """Paragraphs as bytes, each ended by a zero; every tenth is held out."""
    text = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    found = sorted({" ".join(part.split()) for part in re.split(r"\n\s*\n", text)} - {""})
    samples = [torch.tensor([*part.encode()[: LONGEST - 1], 0]) for part in found]
    held_out = samples[::10]
    return [sample for number, sample in enumerate(samples) if number % 10], held_out


def pad(samples: list[Tensor]) -> dict[str, Tensor]:
    """The samples as one batch, padded to the longest of them; what is padding is no label."""
    ids = pad_sequence(samples, batch_first=True)
    lengths = torch.tensor([len(sample) for sample in samples])
    inside = torch.arange(ids.size(1)) < lengths[:, None]
    return {"input_ids": ids, "labels": ids.masked_fill(~inside, -100)}


class Block(nn.Module):
    """Causal self-attention and two linear layers, each after a LayerNorm and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same shape; padding comes last, so that no token before it sees it."""
        batch, length, width = x.shape
        heads = self.qkv(self.norm(x)).view(batch, length, 3, HEADS, width // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(x)


class LanguageModel(nn.Module):
    """Bytes to the mean loss of the byte that follows each."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Labels of -100 do not count."""
        places = torch.arange(input_ids.size(1), device=input_ids.device)
        logits = self.head(self.blocks(self.tokens(input_ids) + self.places(places)))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def setup() -> dict[str, object]:
    """What `autoaccum.fit` is called with; the command line calls this."""
    torch.manual_seed(0)
    train, held_out = paragraphs()
    return {
        "model": LanguageModel(),
        "data": DataLoader(train, batch_size=16, shuffle=True, collate_fn=pad),
        "target_batch": TARGET_BATCH,
        "optimizer": "adamw",
        "lr": 3e-3,
        "lr_batch": TARGET_BATCH,
        "schedule": "cosine",
        "epochs": 2,
        "val_data": DataLoader(held_out, batch_size=16, collate_fn=pad),
        "seed": 0,
    }


def main() -> None:
    """Trains under a budget in which 64 of the longest paragraphs do not fit, and says what cutting by length gave."""
    memory = "256MiB" if torch.cuda.is_available() else "48MiB"
    started = time.perf_counter()
    result = autoaccum.fit(**setup(), memory=memory, progress=True)
    print(f"{len(result.history)} windows of {TARGET_BATCH} paragraphs in {time.perf_counter() - started:.1f} s")
    for line in result.lengths.lines():
        print(line)
    first, last = result.evaluations[0]["loss"], result.evaluations[-1]["loss"]
    print(f"held-out loss {last:.3f} a byte, {first:.3f} after one epoch")


if __name__ == "__main__":
    main()
