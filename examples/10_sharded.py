"""Shard a transformer over two ranks, each with a budget of its own, and train it with a batch that fits on neither.

    python examples/10_sharded.py                                        # starts two ranks on this machine by itself
    torchrun --nproc-per-node=2 examples/10_sharded.py                   # the same, started by torchrun

Each rank holds half of every parameter, gradient and optimizer state. The ranks trace the same small steps, each
forecasts its own memory, and the samples of a window are shared out by what fits: the second rank has less. Needs a
torch whose FSDP can be told to begin anew after an error (2.13 can).
"""

import os
import warnings

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard

import autoaccum

RANKS, TARGET_BATCH = 2, 256
BUDGETS = ("4MiB", "3MiB")


class Reader(nn.Module):
    """Reads an image as eight rows of eight pixels, through two transformer layers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 10)
        self.place = nn.Parameter(torch.zeros(8, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(batch, 8, 8) pixels -> (batch, 10) scores."""
        x = self.embed(rows) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> autoaccum.Mean:
    """The share of right answers."""
    return autoaccum.Mean((outputs.argmax(1) == targets).sum(), len(targets))


def train(rank: int) -> None:
    """What every rank does."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Reader()
    whole = sum(parameter.numel() for parameter in model.parameters())
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)
    held_out = torch.arange(len(y)) % 5 == 0
    result = autoaccum.fit(
        model,
        (x[~held_out], y[~held_out]),
        target_batch=TARGET_BATCH,
        loss=nn.CrossEntropyLoss(),
        lr=5e-3,
        memory=BUDGETS[rank % len(BUDGETS)],
        epochs=8,
        val_data=(x[held_out], y[held_out]),
        metrics={"accuracy": accuracy},
        device="cpu",
        seed=0,
    )
    for turn in range(dist.get_world_size()):
        dist.barrier()
        if turn == rank:
            print(
                f"rank {rank}: {held:,} of {whole:,} parameters; {result.probe.limit} samples fit in "
                f"{BUDGETS[rank % len(BUDGETS)]}; of each window it trains {sum(result.plan.micro_batches)} as "
                f"{' + '.join(map(str, result.plan.micro_batches))}",
                flush=True,
            )
    if rank == 0:
        final = result.evaluations[-1]
        print(f"{len(result.history)} windows; held-out accuracy {final['accuracy']:.1%}, loss {final['loss']:.3f}")


def ranked(rank: int, port: int | None = None) -> None:
    """Joins the others, at torchrun's meeting place or at a store on `port`, and trains."""
    if port is None:
        dist.init_process_group("gloo")
    else:
        store = dist.TCPStore("localhost", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of torch, for torch
    try:
        train(rank)
    finally:
        dist.destroy_process_group()


def main() -> None:
    """As a rank of torchrun's, or starting two."""
    if "RANK" in os.environ:
        ranked(int(os.environ["RANK"]))
    else:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        torch.multiprocessing.spawn(ranked, (store.port,), nprocs=RANKS)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
