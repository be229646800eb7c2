"""Memory savers: how many samples fit under each, and what a sample then costs.

    python -m tests.benchmarks.savers [--times 5] [--budget 1000MiB]

A GPT-2-like model (4 blocks, 256 wide, vocabulary 50,257, 512 tokens), AdamW, one thread. The sizes are those that a
probe finds within the budget, counted in PyTorch's own bytes; then one micro-batch of each is run in turn, forward and
backward.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import autoaccum
from autoaccum.model.memory_savers import installed
from tests.benchmarks.measure import interleaved, median, table, write

BLOCKS, WIDTH, VOCABULARY, TOKENS = 4, 256, 50_257, 512
CPU = torch.device("cpu")
SAVERS = (None, "chunked_loss")


class Block(nn.Module):
    """Attention and a perceptron, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attend(self.before(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.project(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(functional.gelu(self.widen(self.between(x))))


class Language(nn.Module):
    """tokens, labels -> {"loss"}: the head shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        loss = functional.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))
        return {"loss": loss}


def samples(number: int) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (number, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens, "labels": tokens}


def most(saver: str | None, budget: str) -> dict[str, Any]:
    """What a probe finds under a saver."""
    torch.manual_seed(0)
    report = autoaccum.probe(
        Language(), samples(512), target_batch=512, memory=budget, device="cpu", ladder=saver, cache=False
    )
    verified = [trial for trial in report.trials if trial.kind != "trace" and trial.fits]
    off = [abs(report.forecast(trial.batch) - (trial.peak_bytes or 0)) for trial in verified]
    return {"limit": report.limit, "micro_batch": report.micro_batch, "bytes_off": max(off, default=None)}


def step(saver: str | None, size: int) -> Callable[[], None]:
    torch.manual_seed(0)
    model, batch = Language(), samples(size)

    def run() -> None:
        with installed(saver, model, CPU):
            model(**batch)["loss"].backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--budget", default="1000MiB")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {saver: most(saver, asked.budget) for saver in SAVERS}
    sizes = {saver: found[saver]["micro_batch"] for saver in SAVERS}
    seconds = interleaved({str(saver): step(saver, sizes[saver]) for saver in SAVERS}, times=asked.times)
    each = {saver: median(seconds[str(saver)]) / sizes[saver] for saver in SAVERS}
    rows = [
        {"saver": saver, **found[saver], "seconds_a_sample": each[saver],
         "samples": (found[saver]["limit"] or 0) / found[None]["limit"], "time": each[saver] / each[None]}
        for saver in SAVERS
    ]  # fmt: skip
    write("savers", {"budget": asked.budget, "rows": rows})
    print(table(
        ["saver", "samples that fit", "× plain", "time a sample", "× plain", "forecast off, bytes"],
        [[row["saver"] or "none", row["limit"], f"{row['samples']:.1f}", f"{row['seconds_a_sample'] * 1e3:.0f} ms",
          f"{row['time']:.2f}", row["bytes_off"]] for row in rows],
    ))  # fmt: skip


if __name__ == "__main__":
    main()
