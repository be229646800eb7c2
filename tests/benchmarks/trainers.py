"""Trainers attached beside the same trainers alone: the time of a window, and of a window of text of mixed length.

    python -m tests.benchmarks.trainers [--windows 40] [--only NAME]

Where both do the same work: Transformers' Trainer and Lightning's, each by itself with four micro-batches a step and
attached with the same four. On text of mixed length: the Trainer by itself runs micro-batches of one size, the largest
of its longest samples that the budget holds, in its usual order and grouped by length; attached it cuts the same
windows of 64 by length, under that budget.

Each training runs in a process of its own, and they take turns window by window, so that a machine that slows down
slows both alike. A window goes from the end of a step to the end of the next, fetching and collating included. The
figure is the median of the ratios of neighbours. The figures go to results/trainers.json.
"""

import argparse
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "1")

import torch
from torch.nn.utils.rnn import pad_sequence

import autoaccum
from autoaccum.planning.length_rule import limit_at
from tests.benchmarks.measure import median, table, write

K, MICRO_BATCH, LENGTH, VOCABULARY = 4, 8, 64, 500
TARGET, SHORTEST, LONGEST, MEMORY = 64, 8, 256, "96MiB"
CLOCKS = ("wall", "processor")
WARM = 3  # windows that are not counted: the probe, the first allocations, the window of a measured noise scale

Sample = dict[str, Any]
Training = Callable[[Callable[[], None]], None]  # runs, and calls its argument at the end of each window


def in_turn(trainings: dict[str, Training], windows: int) -> dict[str, list[tuple[float, ...]]]:
    """Seconds of each window by each of CLOCKS: the trainings take turns, each in a process of its own.

    In threads of one process they would share its heap, and who comes first would have another part of it: that alone
    makes 3%.
    """
    fork = multiprocessing.get_context("fork")  # a training is a closure
    ours, pipes = {}, {}
    for name, training in trainings.items():
        pipes[name], theirs = fork.Pipe()
        ours[name] = fork.Process(target=_one, args=(training, theirs), daemon=True)
        ours[name].start()
        theirs.close()
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in trainings}
    for _ in range(windows):
        for name, pipe in pipes.items():
            pipe.send(None)
            taken[name].append(pipe.recv())
    for process in ours.values():
        process.kill()  # Lightning would note a SIGTERM and go on
    return taken


def _one(training: Training, turns: Any) -> None:
    """In a process of its own: a window whenever it is this training's turn."""
    turns.recv()
    began = time.perf_counter(), time.process_time()

    def ended() -> None:
        nonlocal began
        turns.send((time.perf_counter() - began[0], time.process_time() - began[1]))
        turns.recv()
        began = time.perf_counter(), time.process_time()

    training(ended)


def equal_texts(count: int) -> list[Sample]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=draw)
    return [{"input_ids": row, "labels": row} for row in ids]


def mixed_texts(count: int) -> list[Sample]:
    """Of 8 to 256 tokens, most of them short."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        length = int(SHORTEST * (LONGEST / SHORTEST) ** float(torch.rand((), generator=draw) ** 2))
        ids = torch.randint(1, VOCABULARY, (length,), generator=draw)
        made.append({"input_ids": ids, "labels": ids})
    return made


def padded(samples: list[Sample]) -> Sample:
    """A collate function, as a tokenizer's."""
    ids = pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
    inside = ids != 0
    return {"input_ids": ids, "attention_mask": inside.long(), "labels": ids.masked_fill(~inside, -100)}


def model(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    if kind == "BERT":
        return transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=VOCABULARY, hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=256,
            )
        )  # fmt: skip
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=96, n_layer=2, n_head=4, n_positions=LONGEST)
    )


def by_transformers(
    kind: str, data: list[Sample], windows: int, batch: int, accumulated: int, attach: dict[str, Any] | None = None,
    **settings: Any,
) -> Training:  # fmt: skip
    import transformers

    def run(ended: Callable[[], None]) -> None:
        class Ends(transformers.TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ended()

        args = transformers.TrainingArguments(
            output_dir=tempfile.mkdtemp(prefix="autoaccum-trainers-"), per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated, max_steps=windows + WARM, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True, log_level="error", **settings,
        )  # fmt: skip
        made = transformers.Trainer(
            model(kind),
            args,
            train_dataset=data,
            data_collator=padded,
            callbacks=[Ends()],  # type: ignore[arg-type]
        )
        made.remove_callback(transformers.PrinterCallback)
        if attach is not None:
            autoaccum.attach(made, progress=False, cache=False, **attach)
        made.train()

    return run


def by_lightning(
    kind: str, data: list[Sample], windows: int, batch: int, accumulated: int, attach: dict[str, Any] | None = None
) -> Training:
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model(kind)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.net(**batch).loss
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def run(ended: Callable[[], None]) -> None:
        class Ends(lightning.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
                    ended()

        made = lightning.Trainer(
            accelerator="cpu", devices=1, max_steps=windows + WARM, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
            accumulate_grad_batches=accumulated, callbacks=[Ends()],
        )  # fmt: skip
        if attach is not None:
            autoaccum.attach(made, progress=False, cache=False, **attach)
        made.fit(Module(), torch.utils.data.DataLoader(data, batch, shuffle=True, collate_fn=padded))  # type: ignore[arg-type]

    return run


def compared(name: str, trainings: dict[str, Training], windows: int) -> dict[str, Any]:
    """Medians of the windows' seconds, and of ours over each of the others'."""
    every = in_turn(trainings, windows + WARM)
    found: dict[str, Any] = {"case": name, "windows": windows}
    for at, clock in enumerate(CLOCKS):
        taken = {each: [seconds[at] for seconds in values[WARM:]] for each, values in every.items()}
        ours, others = taken["attached"], {each: values for each, values in taken.items() if each != "attached"}
        found[clock] = {
            "milliseconds": {each: 1000 * median(values) for each, values in taken.items()},
            "ratio": {each: median([a / b for a, b in zip(ours, values)]) for each, values in others.items()},
            "ratio_of_totals": {each: sum(ours) / sum(values) for each, values in others.items()},
        }
    return found


def same_work(name: str, windows: int) -> dict[str, Any]:
    kind, trainer = name.split(", ")
    by = by_transformers if trainer == "Transformers" else by_lightning
    data = equal_texts((windows + WARM) * K * MICRO_BATCH)
    attach = {"target_batch": K * MICRO_BATCH, "micro_batch": MICRO_BATCH}
    return compared(
        name,
        {"alone": by(kind, data, windows, MICRO_BATCH, K), "attached": by(kind, data, windows, MICRO_BATCH, K, attach)},
        windows,
    )


def mixed(kind: str, windows: int) -> dict[str, Any]:
    data = mixed_texts((windows + WARM) * TARGET)
    plans: list[autoaccum.Plan] = []

    def begun(event: Any) -> None:
        if event.name == "start":
            plans.append(autoaccum.Plan.from_dict(event.plan))

    asked = {"target_batch": TARGET, "memory": MEMORY}
    by_transformers(kind, data, 1 - WARM, 1, 1, {**asked, "callbacks": [begun]})(lambda: None)
    (plan,) = plans
    fits = limit_at(plan.by_length, LONGEST)
    steps = -(-TARGET // fits)
    batch = TARGET // steps
    found = compared(
        f"{kind}, mixed text",
        {
            "alone": by_transformers(kind, data, windows, batch, steps),
            "grouped by length": by_transformers(
                kind, data, windows, batch, steps, train_sampling_strategy="group_by_length"
            ),
            "attached": by_transformers(kind, data, windows, batch, steps, {**asked, "plan": plan}),
        },
        windows,
    )
    return {**found, "micro_batch_alone": batch, "accumulation_steps_alone": steps}


SAME = ("BERT, Transformers", "GPT-2, Transformers", "BERT, Lightning", "GPT-2, Lightning")
MIXED = ("BERT", "GPT-2")


def main() -> None:
    """All cases; a table on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    results = []
    for names, measure in ((SAME, same_work), (MIXED, mixed)):
        for name in names:
            if arguments.only in f"{name}{', mixed' if measure is mixed else ''}":
                results.append(measure(name, arguments.windows))
                print(results[-1], file=sys.stderr, flush=True)
    if not arguments.only:
        write("trainers", {"cases": results})
    rows = [
        [found["case"], *(f"{found['wall']['milliseconds'][name]:.0f} ms" for name in ("alone", "attached")),
         *(", ".join(f"{ratio:.3f} × {name}" for name, ratio in found[clock]["ratio"].items()) for clock in CLOCKS)]
        for found in results
    ]  # fmt: skip
    print(table(["case", "a window alone", "attached", "ratio", "of processor time"], rows))


if __name__ == "__main__":
    main()
