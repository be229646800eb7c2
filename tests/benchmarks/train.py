"""`make bench-train`: whole trainings under one budget, by autoaccum and by its peers, each in fresh processes.

    python -m tests.benchmarks.train [case ...] [--runs 3] [--small]

The same model, data, target batch, optimizer, number of epochs and room for the process's data segment (RLIMIT_DATA). A
training's time goes from the end of its imports to its last step, finding the micro-batch included. It is the
processor's, children's too, on one thread, so that what else runs on the machine counts for less:

- autoaccum: `fit`, with prefer="fastest";
- lightning: its batch size scaler (mode "power"), then accumulation up to the target;
- accelerate: `find_executable_batch_size` from the target down, around the training itself;
- transformers: its Trainer changes the effective batch where it looks for a size by itself, so that the target's halves
  are tried from the largest down, each in a process of its own.

Where the size that was found dies in training, half of it is tried, and the time of what died counts. Runs of the tools
take turns, each time with another seed for weights and order; medians are told. The loss on held-out data is computed
in the same way for all, afterwards. Rows of cases that are not named stay as they were measured before.
"""

import argparse
import contextlib
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from autoaccum.memory.oom import Verdict, out_of_memory
from tests.benchmarks.measure import median, merged, table, write
from tests.benchmarks.peers import limit_memory

IMPORTED = {
    "autoaccum": "autoaccum.api", "lightning": "lightning.pytorch", "accelerate": "accelerate.utils",
    "transformers": "transformers.trainer",
}  # fmt: skip
TOOLS = tuple(IMPORTED)
DIED = 3  # the exit status of a training that ran out of memory
LR, HELD_OUT, LONGEST = 1e-3, 0.2, 3600
EXAMPLES = Path(__file__).parents[2] / "examples"

Sample = dict[str, Tensor]


class Pictures(nn.Module):
    """pixels (samples, 1, 8, 8) -> loss, by convolutions with BatchNorm or by attention over patches."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention
        if attention:
            self.patch = nn.Linear(4, 64)
            layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
            self.body: nn.Module = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        else:
            layers: list[nn.Module] = []
            for before, after in ((1, 32), (32, 64), (64, 64)):
                layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64, 10)

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.attention:
            patches = functional.unfold(pixels, 2, stride=2).transpose(1, 2)
            features = self.body(self.patch(patches)).mean(1)
        else:
            features = self.body(pixels).mean((2, 3))
        return {"loss": functional.cross_entropy(self.head(features), labels)}


class Text(nn.Module):
    """tokens (samples, length), 0 where there is none -> loss of the next token, or of the text's class."""

    def __init__(self, vocabulary: int, causal: bool, width: int = 64) -> None:
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary if causal else 2)

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
            logits = self.head(self.body(self.embed(tokens), mask, is_causal=True))[:, :-1]
            return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())}
        nothing = tokens == 0
        x = self.body(self.embed(tokens), src_key_padding_mask=nothing).masked_fill(nothing.unsqueeze(-1), 0.0)
        return {"loss": functional.cross_entropy(self.head(x.sum(1) / (~nothing).sum(1, keepdim=True)), labels)}


def digits() -> list[Sample]:
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return [{"pixels": pixels[at], "labels": torch.tensor(int(found.target[at]))} for at in order]


def texts() -> list[Sample]:
    """Of 8 to 256 tokens, most of them short; a text's class is the half of the vocabulary that most of it is from."""
    chance = torch.Generator().manual_seed(0)
    made = []
    for _ in range(800):
        length = int(8 * 32 ** float(torch.rand((), generator=chance) ** 2))
        leaning = 0.3 if float(torch.rand((), generator=chance)) < 0.5 else 0.7
        high = torch.rand(length, generator=chance) < leaning
        tokens = torch.randint(1, 500, (length,), generator=chance) + 500 * high
        made.append({"tokens": tokens, "labels": torch.tensor(int(leaning > 0.5))})
    return made


def language() -> list[Sample]:
    """Each token says what the next one is, three times in four."""
    chance, vocabulary = torch.Generator().manual_seed(0), 10_000
    follows = torch.randint(1, vocabulary, (vocabulary,), generator=chance)
    made = []
    for _ in range(320):
        tokens = torch.randint(1, 200, (64,), generator=chance)
        for at in range(1, 64):
            if float(torch.rand((), generator=chance)) < 0.75:
                tokens[at] = follows[tokens[at - 1]]
        made.append({"tokens": tokens, "labels": tokens})
    return made


def joined(samples: list[Sample]) -> Sample:
    """A batch, texts padded to the longest."""
    return {
        name: nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True)
        if samples[0][name].dim() == 1 else torch.stack([sample[name] for sample in samples])
        for name in samples[0]
    }  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, its data, the batch that is asked for, the room its data segment gets, and its epochs."""

    model: Callable[[], nn.Module]
    data: Callable[[], list[Sample]]
    target: int
    room_mib: int
    epochs: int


CASES = {
    "digits CNN": Case(lambda: Pictures(False), digits, 256, 80, 40),
    "BERT-like, mixed lengths": Case(lambda: Text(1000, False), texts, 64, 120, 8),
    "GPT-2-like, large vocabulary": Case(lambda: Text(10_000, True), language, 32, 160, 8),
    "ViT-like": Case(lambda: Pictures(True), digits, 256, 110, 40),
}


class Training:
    """What every tool gets: the model and both parts of its data. Its order is drawn from the global generator."""

    def __init__(self, case: Case, small: bool, seed: int) -> None:
        self.seed = seed
        torch.manual_seed(seed)
        self.model = case.model()
        samples = case.data()
        held_out = int(len(samples) * HELD_OUT)
        self.held_out, self.samples = samples[:held_out], samples[held_out:]
        if small:
            self.samples = self.samples[: 2 * case.target]
        self.target, self.epochs = case.target, 1 if small else case.epochs

    def loader(self, size: int) -> Any:
        return DataLoader(self.samples, batch_size=size, shuffle=True, collate_fn=joined)  # type: ignore[arg-type]

    def loss(self) -> float:
        """On the held-out samples, eight at a time."""
        self.model.eval()
        with torch.no_grad():
            pieces = [self.held_out[at : at + 8] for at in range(0, len(self.held_out), 8)]
            values = [float(self.model(**joined(piece))["loss"]) * len(piece) for piece in pieces]
        return sum(values) / len(self.held_out)


def by_autoaccum(training: Training, size: int | None) -> int:
    import autoaccum

    made = autoaccum.fit(
        training.model, training.loader(training.target), target_batch=training.target, optimizer="adamw", lr=LR,
        epochs=training.epochs, prefer="fastest", device="cpu", cache=False, progress=False, seed=training.seed,
    )  # fmt: skip
    return made.plan.micro_batch


def by_lightning(training: Training, size: int | None) -> int:
    import lightning.pytorch as lightning
    from lightning.pytorch.tuner import Tuner

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.batch_size = training.model, size or 2

        def training_step(self, batch: Sample, index: int) -> Tensor:
            loss: Tensor = self.net(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net.parameters(), lr=LR)

        def train_dataloader(self) -> Any:
            return training.loader(self.batch_size)

    def trainer(**more: Any) -> Any:
        return lightning.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tempfile.mkdtemp(), **more,
        )  # fmt: skip

    module = Module()
    if size is None:
        found = Tuner(trainer(max_epochs=1)).scale_batch_size(module, mode="power", init_val=2, max_trials=25) or 2
        module.batch_size = min(int(found), training.target)
    trainer(
        max_epochs=training.epochs, accumulate_grad_batches=max(1, training.target // module.batch_size)
    ).fit(module)  # fmt: skip
    return module.batch_size


def by_accelerate(training: Training, size: int | None) -> int:
    from accelerate import Accelerator
    from accelerate.utils import find_executable_batch_size

    start = {name: value.clone() for name, value in training.model.state_dict().items()}
    used = [0]

    @find_executable_batch_size(starting_batch_size=size or training.target)  # type: ignore[untyped-decorator]
    def train(batch_size: int) -> None:
        used[0] = batch_size
        training.model.load_state_dict(start)
        accelerator = Accelerator(gradient_accumulation_steps=max(1, training.target // batch_size), cpu=True)
        optimizer = torch.optim.AdamW(training.model.parameters(), lr=LR)
        model, optimizer, loader = accelerator.prepare(training.model, optimizer, training.loader(batch_size))
        for _ in range(training.epochs):
            for batch in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch)["loss"])
                    optimizer.step()
                    optimizer.zero_grad()

    train()
    return used[0]


def by_transformers(training: Training, size: int | None) -> int:
    from transformers import Trainer, TrainingArguments

    size = size or training.target
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=size, learning_rate=LR, use_cpu=True,
        seed=training.seed, num_train_epochs=training.epochs,
        gradient_accumulation_steps=max(1, training.target // size),
        lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=0.0, save_strategy="no", report_to=[],
        remove_unused_columns=False, disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(training.model, arguments, data_collator=joined, train_dataset=training.samples).train()  # type: ignore[arg-type]
    return size


def processor_time() -> float:
    """Seconds, of this process and of the children that have ended."""
    return time.process_time() + children_time(resource.getrusage(resource.RUSAGE_CHILDREN))


def children_time(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def killed_after(before: resource.struct_rusage) -> float:
    """Seconds of a child that told nothing, its imports included."""
    return children_time(resource.getrusage(resource.RUSAGE_CHILDREN)) - children_time(before)


def run_here(case: Case, tool: str, size: int | None, small: bool, seed: int) -> int:
    """One training in this process; prints its figures as JSON."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    work: Callable[[Training, int | None], int] = globals()[f"by_{tool}"]
    training = Training(case, small, seed)
    importlib.import_module(IMPORTED[tool])  # what a tool imports is no part of its training
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # nor what torch does with its first optimizer
    limit_memory(case.room_mib * 2**20)
    started = processor_time()
    figures: dict[str, Any] = {"seconds": 0.0}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            figures["micro_batch"] = work(training, size)
    except Exception as error:
        if out_of_memory(error) is Verdict.NO:
            raise
        figures["seconds"] = processor_time() - started
        print(json.dumps(figures))
        return DIED
    figures["seconds"] = processor_time() - started
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    figures |= {
        "samples_a_second": len(training.samples) * training.epochs / figures["seconds"],
        "held_out": training.loss(),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(figures))
    return 0


def run(name: str, tool: str, small: bool, seed: int) -> dict[str, Any]:
    """One training in processes of its own; with smaller sizes where it dies."""
    spent, size = 0.0, None
    while True:
        command = [
            sys.executable, "-m", "tests.benchmarks.train", name, "--here", tool, "--size", str(size or 0),
            "--seed", str(seed),
        ]  # fmt: skip
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [*command, *(["--small"] if small else [])], capture_output=True, text=True, timeout=LONGEST, check=False
        )
        if done.returncode == 0:
            figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            figures["total_seconds"] = figures["seconds"] + spent
            return figures
        size = (size or CASES[name].target) // 2
        if done.returncode not in (DIED, -6, -9) or size < 1:
            return {"error": done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]}
        said = done.stdout.splitlines()
        spent += json.loads(said[-1])["seconds"] if said else killed_after(before)


def summary(name: str, tool: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    good = [each for each in runs if "error" not in each]
    if not good:
        return {"case": name, "tool": tool, "error": runs[-1]["error"]}
    keys = ("total_seconds", "samples_a_second", "held_out", "peak_mib", "micro_batch")
    return {"case": name, "tool": tool, **{key: median([each[key] for each in good]) for key in keys}, "runs": runs}


def against_peers(rows: list[dict[str, Any]]) -> list[str]:
    """For each case the best peer's time over ours, and the held-out losses."""
    lines = []
    for name in dict.fromkeys(row["case"] for row in rows):
        done = {row["tool"]: row for row in rows if row["case"] == name and "error" not in row}
        peers = [row for tool, row in done.items() if tool != "autoaccum"]
        if "autoaccum" in done and peers:
            ours, best = done["autoaccum"], min(peers, key=lambda row: row["total_seconds"])
            times = best["total_seconds"] / ours["total_seconds"]
            losses = f"held-out loss {ours['held_out']:.3f}, its {best['held_out']:.3f}"
            lines.append(f"{name}: {best['tool']} takes {times:.2f} times our time; {losses}")
    return lines


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Each tool's time in each case, as bars."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(3 * len(names), 2.4), squeeze=False)
    for name, place in zip(names, axes[0]):
        done = [row for row in rows if row["case"] == name and "error" not in row]
        colours = ["tab:green" if row["tool"] == "autoaccum" else "tab:gray" for row in done]
        place.barh([row["tool"] for row in done], [row["total_seconds"] for row in done], color=colours)
        place.invert_yaxis()
        place.set_title(name, fontsize=9)
        place.set_xlabel("seconds, finding included", fontsize=8)
        place.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", metavar="case")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="one epoch of two windows, in minutes")
    parser.add_argument("--here", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        sys.exit(run_here(CASES[asked.cases[0]], asked.here, asked.size or None, asked.small, asked.seed))
    kept = "train-small" if asked.small else "train"
    for name in asked.cases or CASES:
        made: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
        for seed in range(asked.runs):
            for tool in TOOLS:  # in turn, so that a machine that slows down slows all alike
                made[tool].append(run(name, tool, asked.small, seed))
        rows = merged(kept, [summary(name, tool, made[tool]) for tool in TOOLS], "case", "tool")
        path = write(kept, {"runs": asked.runs, "rows": rows})
    text = table(
        ["model", "tool", "time", "samples/s", "held-out loss", "peak", "micro-batch"],
        [[row["case"], row["tool"], *([" ".join(row["error"])] + [""] * 4 if "error" in row else [
            f"{row['total_seconds']:.1f} s", f"{row['samples_a_second']:.0f}", f"{row['held_out']:.3f}",
            f"{row['peak_mib']:.0f} MiB", int(row["micro_batch"])])] for row in rows],
    )  # fmt: skip
    text = "\n".join([text, "", *against_peers(rows)])
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    picture(rows, path.with_suffix(".png") if asked.small else EXAMPLES / "train.png")
    print(text)


if __name__ == "__main__":
    main()
