"""A window on several ranks against DistributedDataParallel by hand: the same micro-batches, no_sync until the last.

DDP sums gradients while the last backward pass runs; autoaccum sums them after it, in place. Windows of the one and the
other in turn, on gloo ranks of this machine; the ratio of their medians, on rank 0.

python -m tests.benchmarks.window_end [--ranks 2] [--times 25] [--counts 1 2 4 8]
"""

import argparse
import json
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import autoaccum
from tests.benchmarks.measure import interleaved, median, table, write
from tests.ranks_started import started
from tests.shards_work import grouped

WIDTH, LAYERS, SAMPLES = 1024, 10, 16


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))


def by_hand(model: DistributedDataParallel, optimizer: torch.optim.Optimizer, x: Tensor, count: int) -> None:
    pieces = x.chunk(count)
    for number, piece in enumerate(pieces):
        with nullcontext() if number == count - 1 else model.no_sync():
            (model(piece).square().mean() / count).backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.barrier()


def ours(accumulator: autoaccum.Accumulator, model: nn.Module, x: Tensor, count: int) -> None:
    for (piece,) in accumulator.window([(piece,) for piece in x.chunk(count)]):
        accumulator.backward(model(piece).square().mean())
    dist.barrier()


def work(rank: int, folder: str, *, ranks: int, times: int, counts: list[int]) -> None:
    with grouped(rank, ranks, folder):
        found: dict[int, dict[str, Any]] = {}
        for count in counts:
            theirs, model = DistributedDataParallel(model_of()), model_of()
            first = torch.optim.SGD(theirs.parameters(), lr=1e-3)
            second = torch.optim.SGD(model.parameters(), lr=1e-3)
            made = autoaccum.plan(SAMPLES, ranks * count * SAMPLES, world_size=ranks, rank=rank, optimizer="sgd")
            accumulator = autoaccum.Accumulator(model, second, made)
            x = torch.randn(count * SAMPLES, WIDTH)
            both = {"DDP": partial(by_hand, theirs, first, x, count),
                    "autoaccum": partial(ours, accumulator, model, x, count)}  # fmt: skip
            seconds = interleaved(both, times=times, warm=2)
            medians = {name: 1e3 * median(values) for name, values in seconds.items()}
            found[count] = {**medians, "ratio": medians["autoaccum"] / medians["DDP"]}
        if rank == 0:
            parameters = sum(parameter.numel() for parameter in model.parameters())
            Path(folder, "found.json").write_text(json.dumps({"parameters": parameters, "micro-batches": found}))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.window_end", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--times", type=int, default=25)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8], help="micro-batches in a window")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = partial(work, ranks=options.ranks, times=options.times, counts=options.counts)
        started(run, options.ranks, Path(folder), seconds=1800)
        found = json.loads(Path(folder, "found.json").read_text())
    print(f"{found['parameters']:,} parameters, {options.ranks} ranks")
    rows = [[count, f"{each['DDP']:.1f}", f"{each['autoaccum']:.1f}", f"{each['ratio']:.3f}"]
            for count, each in found["micro-batches"].items()]  # fmt: skip
    print(table(["micro-batches", "DDP, ms a window", "autoaccum, ms a window", "ratio"], rows))
    print(f"written to {write('window_end', {'ranks': options.ranks, **found})}")


if __name__ == "__main__":
    main()
