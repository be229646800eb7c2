"""A window on several ranks against DistributedDataParallel by hand: the same micro-batches, no_sync until the last.

DDP sums gradients while the last backward pass runs; autoaccum sums them after it, in place. Windows of the one and the
other in turn, on gloo ranks of this machine; the ratio of their medians, on rank 0. Of each window its end is timed as
well: all but the first micro-batches, from a barrier before the last one's forward pass to the end of the step.

python -m tests.benchmarks.window_end [--ranks 2] [--times 25] [--counts 1 2 4 8]
"""

import argparse
import json
import tempfile
import time
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
WARM = 2  # windows of each that are not timed


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))


class Ends:
    """Seconds that each window's end took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def begin(self, number: int, count: int) -> None:
        """Micro-batch `number` of `count` is next."""
        if number == count - 1:
            dist.barrier()
            self._began = time.perf_counter()

    def end(self) -> None:
        """The step is over on all ranks."""
        dist.barrier()
        self.seconds.append(time.perf_counter() - self._began)


def by_hand(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer, x: Tensor, count: int, ends: Ends
) -> None:
    for number, piece in enumerate(x.chunk(count)):
        ends.begin(number, count)
        with nullcontext() if number == count - 1 else model.no_sync():
            (model(piece).square().mean() / count).backward()
    optimizer.step()
    optimizer.zero_grad()
    ends.end()


def ours(accumulator: autoaccum.Accumulator, model: nn.Module, x: Tensor, count: int, ends: Ends) -> None:
    ends.begin(0, count)
    for number, (piece,) in enumerate(accumulator.window([(piece,) for piece in x.chunk(count)]), 1):
        accumulator.backward(model(piece).square().mean())
        ends.begin(number, count)
    ends.end()


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
            ends = {"DDP": Ends(), "autoaccum": Ends()}
            both = {"DDP": partial(by_hand, theirs, first, x, count, ends["DDP"]),
                    "autoaccum": partial(ours, accumulator, model, x, count, ends["autoaccum"])}  # fmt: skip
            whole = interleaved(both, times=times, warm=WARM)
            found[count] = {"window": _compared(whole),
                            "end": _compared({name: each.seconds[WARM:] for name, each in ends.items()})}  # fmt: skip
        if rank == 0:
            parameters = sum(parameter.numel() for parameter in model.parameters())
            Path(folder, "found.json").write_text(json.dumps({"parameters": parameters, "micro-batches": found}))


def _compared(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians in ms, and their ratio."""
    medians = {name: 1e3 * median(values) for name, values in seconds.items()}
    return {**medians, "ratio": medians["autoaccum"] / medians["DDP"]}


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
    rows = [[count, part, f"{each['DDP']:.1f}", f"{each['autoaccum']:.1f}", f"{each['ratio']:.3f}"]
            for count, parts in found["micro-batches"].items() for part, each in parts.items()]  # fmt: skip
    print(table(["micro-batches", "of it", "DDP, ms", "autoaccum, ms", "ratio"], rows))
    print(f"written to {write('window_end', {'ranks': options.ranks, **found})}")


if __name__ == "__main__":
    main()
