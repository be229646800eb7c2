"""`make bench-peers`: the probe against Lightning's and Accelerate's finders, under a real limit.

Each finder runs in a fresh child process, on the same model, data and optimizer. The child builds everything, imports
what it needs, and then lets its data segment grow by a fixed room and no further (RLIMIT_DATA), so that overruns raise
PyTorch's own allocation errors. Trials, sample-steps and errors are counted in the model's own forward.
All run on one thread, or as many as OMP_NUM_THREADS says. "True" is a bisection with two steps a trial. At the size
found, ten windows of two micro-batches each are then trained in another fresh child under the same limit; "÷ window" is
the finder's time over one of these. A finder about as quick as ours runs seven times, in turn with it; of each the run
with the median time is shown, with the most errors of any.

    python -m tests.benchmarks.peers [--models "ResNet|LSTM"] [--finders autoaccum,true]
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from autoaccum.memory.oom import Verdict, out_of_memory
from tests.benchmarks.measure import median, table, write

FINDERS = ("true", "autoaccum", "lightning power", "lightning binsearch", "accelerate")
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
MOST_SECONDS = 180  # several times what the slowest that ends takes
CLOSE, ROUNDS = 2.0, 7  # times our time within which a finder is run so many times, the median run counting
CEILING = 1024  # where Accelerate starts, and the most that anyone may try


class Block(nn.Module):
    """Two convolutions with BatchNorm around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Text(nn.Module):
    """Transformer layers over token ids; causal: predicts each next token, else one class a text."""

    def __init__(self, layers: int, width: int, vocabulary: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary if causal else 2)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]) if self.causal else None
        x = self.layers(self.embed(tokens), mask=mask, is_causal=self.causal)
        return self.head(x).transpose(1, 2) if self.causal else self.head(x.mean(1))


class Recurrent(nn.Module):
    """Two LSTM layers over a series."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 128, num_layers=2, batch_first=True)
        self.head = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Checkpointed(nn.Module):
    """Wide perceptron blocks, each recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 4096), nn.GELU(), nn.Linear(4096, 128)) for _ in range(3)
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def convolutions(widths: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def resnet() -> nn.Module:
    stem = (nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
    return nn.Sequential(
        *stem, *(Block(24) for _ in range(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)
    )


def images(size: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda n: (torch.randn(n, 3, size, size), torch.randint(0, 10, (n,)))


def tokens(length: int, causal: bool) -> Callable[[int], tuple[Tensor, Tensor]]:
    def made(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(0, 1000, (n, length))
        return x, (torch.roll(x, -1, 1) if causal else torch.randint(0, 2, (n,)))

    return made


@dataclass(frozen=True)
class Case:
    """A model, its data, and the room its data segment gets."""

    model: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    room_mib: int


CASES = {
    "BatchNorm CNN": Case(lambda: convolutions((32, 64, 128)), images(32), 160),
    "BatchNorm CNN, large images": Case(lambda: convolutions((32, 64)), images(160), 160),
    "ResNet": Case(resnet, images(32), 140),
    "GPT-2-like": Case(lambda: Text(3, 128, 1000, True), tokens(64, True), 360),
    "BERT-like": Case(lambda: Text(3, 128, 1000, False), tokens(64, False), 300),
    "LSTM": Case(Recurrent, lambda n: (torch.randn(n, 100, 16), torch.randint(0, 5, (n,))), 140),
    "checkpointed perceptron": Case(Checkpointed, lambda n: (torch.randn(n, 128), torch.randint(0, 10, (n,))), 100),
}


@dataclass
class Count:
    """What a finder ran, as the model's forward saw it."""

    sizes: list[int] = field(default_factory=list)
    errors: int = 0

    def watch(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(
            lambda module, args: self.sizes.append(len(args[0])) if module.training else None
        )

    def guard(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **keywords: Any) -> Any:
            try:
                return step(*args, **keywords)
            except Exception as error:
                self.errors += out_of_memory(error) is not Verdict.NO
                raise

        return guarded


class Training:
    """Plain steps at any size: one micro-batch after another, and the optimizer."""

    def __init__(self, case: Case, count: Count) -> None:
        torch.manual_seed(0)
        self.case, self.model, self.loss = case, case.model(), nn.CrossEntropyLoss()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.data = case.batch(CEILING)
        count.watch(self.model)

    def step(self, size: int, micro_batches: int = 1) -> None:
        x, y = (part[:size] for part in self.data)
        for _ in range(micro_batches):
            self.loss(self.model(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def limit_memory(room: int) -> None:
    """From here on the process's data segment may grow by `room` bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + room, resource.RLIM_INFINITY))


def find_true(training: Training, count: Count) -> int:
    def fits(size: int) -> bool:
        try:
            count.guard(lambda: [training.step(size, 2) for _ in range(2)])()
        except Exception as error:
            if out_of_memory(error) is Verdict.NO:
                raise
        else:
            return True
        training.optimizer.zero_grad()
        return False

    low, high = 0, 1
    while high <= CEILING and fits(high):
        low, high = high, high * 2
    high = min(high, CEILING + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def find_autoaccum(training: Training, count: Count) -> tuple[int, int]:
    import autoaccum

    report = autoaccum.probe(
        training.model, training.data, loss=training.loss, optimizer=training.optimizer, device="cpu", cache=False,
        max_batch=CEILING,
    )  # fmt: skip
    count.errors = report.out_of_memory_count
    return report.micro_batch, len(report.trials)


def find_lightning(training: Training, count: Count, mode: str) -> int:
    import logging

    import lightning.pytorch as lightning
    from lightning.pytorch.tuner import Tuner

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.batch_size = training.model, 2

        def training_step(self, batch: Any, index: int) -> Tensor:
            return count.guard(lambda: training.loss(self.net(batch[0]), batch[1]))()

        def configure_optimizers(self) -> Any:
            return training.optimizer

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(*training.data), batch_size=self.batch_size)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tempfile.mkdtemp(prefix="autoaccum-peers-"),
    )  # fmt: skip
    found = Tuner(trainer).scale_batch_size(module, mode=mode, init_val=2, max_trials=25)
    return int(found or 0)


def find_accelerate(training: Training, count: Count) -> int:
    from accelerate.utils import find_executable_batch_size

    found = []

    @find_executable_batch_size(starting_batch_size=CEILING)
    def train(batch_size: int) -> None:
        count.guard(lambda: [training.step(batch_size) for _ in range(2)])()
        found.append(batch_size)

    train()
    return found[-1]


def run_finder(case: Case, finder: str) -> dict[str, Any]:
    """In the child: prepares, limits, finds."""
    count = Count()
    training = Training(case, count)
    if finder.startswith("lightning"):
        import lightning.pytorch  # noqa: F401 (imported before the limit, as everyone's imports are)
    elif finder == "accelerate":
        import accelerate  # noqa: F401
    else:
        import autoaccum.api  # noqa: F401
    limit_memory(case.room_mib * 2**20)
    trials = None
    started = time.perf_counter()
    if finder == "true":
        size = find_true(training, count)
    elif finder == "autoaccum":
        size, trials = find_autoaccum(training, count)
    elif finder == "accelerate":
        size = find_accelerate(training, count)
    else:
        size = find_lightning(training, count, finder.split()[1])
    seconds = time.perf_counter() - started
    return {"size": size, "trials": trials, "samples": sum(count.sizes), "ooms": count.errors, "seconds": seconds}


def run_survival(case: Case, size: int, windows: int = 10) -> dict[str, Any]:
    """In the child: ten windows of two micro-batches."""
    training = Training(case, Count())
    limit_memory(case.room_mib * 2**20)
    started = time.perf_counter()
    for _ in range(windows):
        training.step(size, 2)
    return {"window_seconds": (time.perf_counter() - started) / windows}


def child(*arguments: str) -> dict[str, Any]:
    """Runs this file in a fresh process; {"error": ...} where it fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.peers", "--child", *arguments], capture_output=True, text=True,
            env={"OMP_NUM_THREADS": "1", **os.environ, **MALLOC}, check=False, timeout=MOST_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {MOST_SECONDS} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def compare(names: list[str], finders: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        survival: dict[int, dict[str, Any]] = {}
        for finder, runs in in_turn(name, finders).items():
            answers = sorted((run for run in runs if "error" not in run), key=lambda run: run["seconds"])
            row = {"model": name, "finder": finder, **(answers[len(answers) // 2] if answers else runs[0])}
            if answers:
                row |= {"ooms": max(run["ooms"] for run in answers), "all_seconds": [run["seconds"] for run in answers]}
            if row.get("size"):
                if row["size"] not in survival:
                    survival[row["size"]] = child(name, "survive", str(row["size"]))
                row["survives"] = "error" not in survival[row["size"]]
                row["window_seconds"] = survival[row["size"]].get("window_seconds")
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def in_turn(name: str, finders: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Each finder's runs: those that take about as long as ours run in turn with it, since a machine's speed varies."""
    runs = {finder: [child(name, finder)] for finder in finders}
    own = runs.get("autoaccum", [{}])[0].get("seconds", 0.0)
    close = [finder for finder, (first,) in runs.items() if first.get("seconds", math.inf) < CLOSE * own]
    for _ in range(ROUNDS - 1 if len(close) > 1 else 0):
        for finder in close:
            runs[finder].append(child(name, finder))
    return runs


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the models of what the others cost for each of ours."""
    by = {(row["model"], row["finder"]): row for row in rows}
    found: dict[str, Any] = {}
    for finder in FINDERS[2:]:
        pairs = [
            (by[model, finder], by[model, "autoaccum"])
            for model, other in by
            if other == finder
            and "error" not in by[model, finder]
            and "error" not in by.get((model, "autoaccum"), {"error": 1})
        ]
        if pairs:
            found[finder] = {
                "models": len(pairs),
                "time_ratio": median([peer["seconds"] / own["seconds"] for peer, own in pairs]),
                "samples_ratio": median([peer["samples"] / own["samples"] for peer, own in pairs]),
                "least_time_ratio": min(peer["seconds"] / own["seconds"] for peer, own in pairs),
            }
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["--child"]:
        name, finder, *rest = sys.argv[2:]
        values = run_survival(CASES[name], int(rest[0])) if finder == "survive" else run_finder(CASES[name], finder)
        print("\n" + json.dumps(values))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="|".join(CASES))
    parser.add_argument("--finders", default=",".join(FINDERS))
    arguments = parser.parse_args()
    rows = compare([n for n in CASES if n in arguments.models.split("|")], arguments.finders.split(","))
    truth = {row["model"]: row.get("size") for row in rows if row["finder"] == "true"}
    cells = []
    for row in rows:
        if "error" in row:
            cells.append([row["model"], row["finder"], f"failed: {row['error'][:60]}", "", "", "", "", "", ""])
            continue
        true = truth.get(row["model"])
        cells.append(
            [row["model"], row["finder"], row["size"], f"{row['size'] / true:.2f}" if true else "", row["samples"],
             row["ooms"], f"{row['seconds']:.1f} s", f"{row['seconds'] / row['window_seconds']:.1f}"
             if row.get("window_seconds") else "", "yes" if row.get("survives") else "no"]
        )  # fmt: skip
    text = table(
        ["model", "finder", "size", "÷ true", "samples run", "OOMs", "time", "÷ window", "ten windows survive"], cells
    )
    print(text)
    totals = summary(rows)
    print(json.dumps(totals, indent=2))
    path = write("peers", {"rows": rows, "summary": totals})
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
