"""`make bench`: the loop against the same training written by hand, and how fast the command line starts.

A few windows of the one, a few of the other, in turn, with models made anew each round; the median of the rounds'
ratios of medians. On one thread: two cores that share their work differently from call to call would be all one sees.

python -m tests.benchmarks [--times 9]
"""

import argparse
import subprocess
import sys
from collections.abc import Generator
from functools import partial
from typing import Any

import torch
from torch import nn

import autoaccum
from tests.benchmarks.measure import interleaved, median, table, write

SETTINGS = [  # name, model, samples' size, micro-batch, k, windows an epoch, windows a turn, turns a round
    ("tiny perceptron", "mlp", 16, 16, 1, 60, 5, 24),
    ("tiny perceptron", "mlp", 16, 16, 4, 60, 5, 24),
    ("tiny perceptron", "mlp", 16, 16, 16, 30, 5, 24),
    ("convolutions, no BatchNorm", "cnn", 32, 64, 4, 6, 1, 7),
    ("convolutions, no BatchNorm", "cnn", 32, 128, 2, 6, 1, 7),
    ("convolutions with BatchNorm", "bn", 32, 64, 4, 6, 1, 7),
]


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 32, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        if kind == "bn":
            layers.insert(-2, nn.BatchNorm2d(width))
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def data_of(kind: str, size: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (samples, size) if kind == "mlp" else (samples, 3, size, size)
    return torch.randn(*shape), torch.randint(0, 10, (samples,))


def by_hand(
    model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], target: int, micro: int
) -> Generator[float, None, None]:
    """The training as one writes it for known sizes: shuffled, weighted by size, the loss kept for the log."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = nn.CrossEntropyLoss()
    x, y = data
    while True:
        order = torch.randperm(len(y))
        for start in range(0, len(y), target):
            window = order[start : start + target]
            total = torch.zeros(())
            for at in range(0, len(window), micro):
                part = window[at : at + micro]
                share = loss(model(x[part]), y[part]) * (len(part) / len(window))
                share.backward()
                total += share.detach()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield float(total)


def ours(
    model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], target: int, micro: int
) -> Generator[float, None, None]:
    loop = autoaccum.prepare(
        model, data, target_batch=target, micro_batch=micro, loss=nn.CrossEntropyLoss(), epochs=10**9, check=False,
        device="cpu", progress=False,
    )  # fmt: skip
    for record in loop:
        yield record.loss


def loops(times: int) -> list[dict[str, Any]]:
    rows = []
    for name, kind, size, micro, k, windows, turn, turns in SETTINGS:
        target = micro * k
        data = data_of(kind, size, target * windows)
        rounds = [
            one_round(
                by_hand(model_of(kind), data, target, micro), ours(model_of(kind), data, target, micro), turn, turns
            )
            for _ in range(times)
        ]
        hand = median([each["hand"] for each in rounds])
        rows.append(
            {
                "model": name,
                "micro_batch": micro,
                "k": k,
                "window_ms": hand * 1e3,
                "ratio": median([each["ours"] / each["hand"] for each in rounds]),
                "more_us": median([each["ours"] - each["hand"] for each in rounds]) * 1e6,
                "more_undisturbed_us": median([each["ours_least"] - each["hand_least"] for each in rounds]) * 1e6,
                "allowed_us": None if hand >= 0.05 else 150 + 20 * k,
                "rounds": rounds,
            }
        )
    return rows


def one_round(
    hand: Generator[float, None, None], own: Generator[float, None, None], turn: int, turns: int
) -> dict[str, float]:
    """Median seconds a window, both freshly made: where their memory happens to lie makes several hundredths."""
    things = {which: partial(run, steps, turn) for which, steps in (("hand", hand), ("ours", own))}
    seconds = interleaved(things, times=turns, warm=2)
    hand.close()
    own.close()
    least = {f"{which}_least": min(found) / turn for which, found in seconds.items()}
    return {**{which: median(found) / turn for which, found in seconds.items()}, **least}


def run(steps: Generator[float, None, None], windows: int) -> None:
    for _ in range(windows):
        next(steps)


def start_up(times: int) -> dict[str, Any]:
    """`autoaccum --help` in a fresh process, and Python's own start beside it."""
    commands = {"help": [sys.executable, "-m", "autoaccum", "--help"], "python": [sys.executable, "-c", "pass"]}
    runs = {
        name: lambda command=command: subprocess.run(command, capture_output=True, check=True)
        for name, command in commands.items()
    }
    seconds = interleaved(runs, times=times)
    return {name: median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=9)
    times = parser.parse_args().times
    torch.set_num_threads(1)
    rows = loops(times)
    print(
        table(
            ["model", "micro-batch", "k", "window by hand", "ours ÷ by hand", "more", "least against least", "allowed"],
            [
                [r["model"], r["micro_batch"], r["k"], f"{r['window_ms']:.2f} ms", f"{r['ratio']:.3f}",
                 f"{r['more_us']:.0f} µs", f"{r['more_undisturbed_us']:.0f} µs",
                 "1.02 ×" if r["allowed_us"] is None else f"{r['allowed_us']} µs"]
                for r in rows
            ],
        )
    )  # fmt: skip
    start = start_up(times)
    print(f"\nautoaccum --help: {start['help']:.3f} s (python itself: {start['python']:.3f} s)")
    print(write("loop", {"times": times, "loops": rows, "start_up": start}))


if __name__ == "__main__":
    main()
