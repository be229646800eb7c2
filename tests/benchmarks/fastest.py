"""prefer="fastest" against a grid of every saver and size that fits, on five models.

    python -m tests.benchmarks.fastest [model ...] [--windows 9]

The grid: under each saver the size with the fewest micro-batches, and two, four and eight times as many. Of each pair
whole windows are trained, in turn; what is told is the time of the pair that the probe takes, over that of the best.
Time is the processor's (one thread), so that what else runs on the machine counts for less. Rows of models that are not
named stay as they were measured before.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import autoaccum
from autoaccum.errors import AutoaccumError
from tests.benchmarks.measure import interleaved, median, merged, table, write
from tests.benchmarks.train import Pictures, Text

SAVERS = (None, "chunked_loss", "checkpointing/2", "checkpointing", "chunked_loss+checkpointing")


def pictures(samples: int) -> dict[str, Tensor]:
    return {"pixels": torch.randn(samples, 1, 8, 8), "labels": torch.randint(10, (samples,))}


def tokens(samples: int, length: int, vocabulary: int, causal: bool) -> dict[str, Tensor]:
    made = torch.randint(1, vocabulary, (samples, length))
    return {"tokens": made, "labels": made if causal else torch.randint(2, (samples,))}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Tensor]], int, str]] = {
    "digits CNN": (lambda: Pictures(False), pictures, 512, "12MiB"),
    "ViT-like": (lambda: Pictures(True), pictures, 256, "24MiB"),
    "BERT-like": (lambda: Text(1000, False), lambda n: tokens(n, 64, 1000, False), 64, "16MiB"),
    "GPT-2-like, small vocabulary": (lambda: Text(500, True), lambda n: tokens(n, 64, 500, True), 64, "16MiB"),
    "GPT-2-like, large vocabulary": (lambda: Text(8000, True), lambda n: tokens(n, 64, 8000, True), 32, "40MiB"),
}


def made(name: str) -> dict[str, Any]:
    model, data, target, memory = MODELS[name]
    torch.manual_seed(0)
    return {"model": model(), "data": data(2 * target), "target_batch": target, "memory": memory, "device": "cpu"}


def grid(name: str) -> dict[tuple[str | None, int], Iterator[Any]]:
    """A training under each saver, at each size that fits; those that cannot be are left out."""
    pairs: dict[tuple[str | None, int], Iterator[Any]] = {}
    for saver in SAVERS:
        with contextlib.suppress(AutoaccumError):
            report = autoaccum.probe(**made(name), ladder=saver, cache=False)
            if report.plan is None:
                continue
            count, target = report.plan.accumulation_steps, MODELS[name][2]
            for size in sorted({-(-target // (count * times)) for times in (1, 2, 4, 8)}):
                given = made(name) | {"micro_batch": size, "ladder": saver or False}
                pairs[saver, size] = iter(autoaccum.prepare(**given, epochs=10**6, check=False, progress=False))
    return pairs


def measured(name: str, windows: int) -> dict[str, Any]:
    reports: dict[str, Any] = {}

    def probed(prefer: str) -> Callable[[], None]:
        return lambda: reports.update({prefer: autoaccum.probe(**made(name), prefer=prefer, cache=False)})

    probes = interleaved({each: probed(each) for each in ("fewest", "fastest")}, times=3, clock=time.process_time)
    search = median(probes["fastest"]) - median(probes["fewest"])
    fewest, report = reports["fewest"], reports["fastest"]
    pairs = grid(name)
    seconds: dict[tuple[str | None, int], list[float]] = {pair: [] for pair in pairs}
    for turn in range(windows + 1):
        for pair in list(pairs) if turn % 2 else reversed(list(pairs)):
            begun = time.process_time()
            next(pairs[pair])
            if turn:  # the first warms up
                seconds[pair].append(time.process_time() - begun)
    times = {pair: median(each) for pair, each in seconds.items()}
    best = min(times, key=times.__getitem__)
    taken = (report.ladder, report.plan.micro_batch)
    own = times.get(taken, times[min(times, key=lambda pair: (pair[0] != taken[0], abs(pair[1] - taken[1])))])
    return {
        "model": name, "taken": list(taken), "best": list(best), "over_best": own / times[best],
        "fewest_over_best": times.get((None, fewest.plan.micro_batch), own) / times[best],
        "search_windows": search / times[best], "grid": [[*pair, each] for pair, each in times.items()],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--windows", type=int, default=9)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.models or MODELS:
        rows = merged("fastest", [measured(name, asked.windows)], "model")
        path = write("fastest", {"windows": asked.windows, "rows": rows})
    text = table(
        ["model", "taken", "best of the grid", "time over the best's", "the fewest micro-batches' over it",
         "search beyond the probe, windows"],
        [[row["model"], row["taken"], row["best"], f"{row['over_best']:.2f}", f"{row['fewest_over_best']:.2f}",
          f"{row['search_windows']:.1f}"] for row in rows],
    )  # fmt: skip
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
