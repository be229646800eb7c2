"""Training under a limit on the process beside a plain loop under the same: what malloc's freed blocks cost.

    python -m tests.benchmarks.limited [case ...] [--runs 3]

Each in a process of its own, in turn, with the same samples in the same micro-batches: PyTorch's usual loop, where
malloc does as it does by default; ours, where the probe decides whether freed blocks stay; and ours where they are
given back at once, as a step needs that takes more than half of the limit. Time is the processor's, on one thread.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

import autoaccum
from autoaccum.memory.watch import give_blocks_back
from tests.benchmarks.measure import median, merged, table, write
from tests.benchmarks.peers import limit_memory
from tests.benchmarks.train import CASES, LR, Training

WAYS = ("plain", "ours", "given back")
ROOMS = {"digits CNN": (128, 160), "ViT-like": (64, 200)}  # micro-batch, MiB
WARM, WINDOWS = 3, 10


def plain(training: Training, micro_batch: int) -> Iterator[None]:
    """As PyTorch's tutorials do it: a micro-batch from the loader, its part of the loss, a step for each k of them."""
    optimizer, count = torch.optim.AdamW(training.model.parameters(), lr=LR), training.target // micro_batch
    while True:
        for number, batch in enumerate(training.loader(micro_batch), 1):
            (training.model(**batch)["loss"] / count).backward()
            if number % count == 0:
                optimizer.step()
                optimizer.zero_grad()
                yield


def ours(training: Training, micro_batch: int, give_back: bool) -> Iterator[None]:
    loop = autoaccum.prepare(
        training.model, training.loader(training.target), target_batch=training.target, optimizer="adamw", lr=LR,
        max_batch=micro_batch, epochs=100, device="cpu", cache=False, progress=False,
    )  # fmt: skip
    if loop.plan.micro_batch != micro_batch:
        raise SystemExit(f"at most {loop.plan.micro_batch} fit: name a larger room")
    for record in loop:
        if give_back and record.step == 1:
            give_blocks_back()
        yield


def here(name: str, way: str) -> float:
    """Median seconds of a window."""
    micro_batch, room = ROOMS[name]
    training = Training(CASES[name], small=False)
    limit_memory(room * 2**20)
    windows = plain(training, micro_batch) if way == "plain" else ours(training, micro_batch, way == "given back")
    seconds = []
    for turn in range(WARM + WINDOWS):
        begun = time.process_time()
        next(windows)
        if turn >= WARM:
            seconds.append(time.process_time() - begun)
    return median(seconds)


def measured(name: str, runs: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(runs):
        for way in WAYS:
            command = [sys.executable, "-m", "tests.benchmarks.limited", name, "--here", way]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds[way].append(float(done.stdout.splitlines()[-1]))
    row: dict[str, Any] = {"case": name, "micro_batch": ROOMS[name][0], "room_mib": ROOMS[name][1], "seconds": seconds}
    return row | {way: median(seconds[way]) / median(seconds["plain"]) for way in WAYS[1:]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", metavar="case")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--here", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.here:
        print(json.dumps(here(asked.cases[0], asked.here)))
        return
    for name in asked.cases or ROOMS:
        rows = merged("limited", [measured(name, asked.runs)], "case")
        write("limited", {"runs": asked.runs, "rows": rows})
    print(table(
        ["model", "micro-batch", "a plain window", "ours ÷ plain", "with blocks given back ÷ plain"],
        [[row["case"], row["micro_batch"], f"{median(row['seconds']['plain']) * 1e3:.0f} ms", f"{row['ours']:.2f}",
          f"{row['given back']:.2f}"] for row in rows],
    ))  # fmt: skip


if __name__ == "__main__":
    main()
