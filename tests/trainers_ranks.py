"""What torchrun starts: `-m tests.trainers_ranks FOLDER TRAINER...`: each rank trains, its figures go to FOLDER.

Windows of 8 of 21 samples: 4 + 4, 4 + 4, and a tail of 3 + 2. On the second rank memory runs out once, in the second
micro-batch of the second window.
"""

import logging
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import autoaccum
from autoaccum.errors import SetupError
from autoaccum.training.events import WindowReplayed
from tests.trainer_models import flat, model, padded, samples

__all__ = ["EPOCHS", "TARGET", "TRAINERS", "net", "text"]

TARGET, EPOCHS, LR = 8, 2, 0.1
FAILS_AT = 4  # forwards of a rank's training: two micro-batches of 2 in each of its first two windows


class Scarce(nn.Module):
    """A masked language model that runs out of memory once on the second rank, in training."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = model("BertForMaskedLM"), None

    def forward(self, input_ids, attention_mask=None, labels=None):
        if self.calls is not None:
            self.calls += 1
            if self.calls == FAILS_AT and os.environ.get("RANK") == "1":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def net():
    return Scarce()


def text():
    return samples("tokens", 21)


def transformers(folder, heard=None, batch=2, accumulated=2, **settings):
    """Its Trainer, with shuffled samples; attached where somebody listens."""
    import transformers as library

    module = net()
    made = library.Trainer(
        module,
        library.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
            num_train_epochs=EPOCHS, learning_rate=LR, optim="sgd", report_to=[], save_strategy="no", logging_steps=1,
            max_grad_norm=0.5, use_cpu=True, disable_tqdm=True, log_level="error", **settings,
        ),
        train_dataset=text(),
        data_collator=padded,
    )  # fmt: skip
    if heard is not None:
        autoaccum.attach(made, target_batch=TARGET, micro_batch=2, progress=False, callbacks=[heard.append])

    class Begins(library.TrainerCallback):
        def on_train_begin(self, *_, **named):
            module.calls = 0

    made.add_callback(Begins())
    made.train()
    return module, [entry["loss"] for entry in made.state.log_history if "loss" in entry], made.state.global_step


def lightning(folder, heard=None, batch=2, accumulated=2, ranks=2):
    """Its Trainer over DistributedDataParallel, with samples in order."""
    import lightning as library

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(library.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, batch_idx):
            loss = self.net(**batch).loss
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=LR)

    losses = []

    class Watch(library.Callback):
        def on_train_start(self, trainer, module):
            module.net.calls = 0

        def on_train_batch_end(self, trainer, *_):
            losses.append(float(trainer.callback_metrics["loss"]))

    library.seed_everything(5, verbose=False)
    module, ours = Module(), []
    if heard is not None:
        from autoaccum.integrations.lightning import TargetBatch

        ours = [TargetBatch(TARGET, micro_batch=2, progress=False, callbacks=[heard.append])]
    made = library.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=EPOCHS, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.5,
        precision="64-true", accumulate_grad_batches=accumulated, callbacks=[*ours, Watch()],
        default_root_dir=folder,
    )  # fmt: skip
    made.fit(module, DataLoader(text(), batch, collate_fn=padded))
    return module.net, losses, made.global_step


def accelerate(folder, heard):
    """A loop of one's own, each batch of the loader shared out over the processes."""
    import accelerate as library

    sharing = library.DataLoaderConfiguration(split_batches=True, even_batches=False)
    accelerator = library.Accelerator(cpu=True, dataloader_config=sharing)
    module = net()
    prepared, optimizer, loader = accelerator.prepare(
        module, torch.optim.SGD(module.parameters(), lr=LR), DataLoader(text(), TARGET, collate_fn=padded)
    )
    plan = autoaccum.plan(2, TARGET, world_size=accelerator.num_processes, rank=accelerator.process_index)
    accumulator = autoaccum.Accumulator(prepared, optimizer, plan, clip_norm=0.5, accelerator=accelerator)
    losses = []
    for _ in range(EPOCHS):
        for batch in loader:
            for micro in accumulator.window(batch):
                accumulator.backward(prepared(**micro).loss, denominator=(micro["labels"] != -100).sum())
            losses.append(accumulator.last.loss)
    return module, losses, accumulator.step


class Stream(IterableDataset):
    def __iter__(self):
        return iter(text().samples)


def refusals(folder):
    """What cannot be served on several ranks, and what each trainer says then."""
    import lightning as lit
    import transformers as library

    from autoaccum.integrations.lightning import TargetBatch

    def attach(data, target):
        args = library.TrainingArguments(output_dir=folder, max_steps=2, report_to=[], use_cpu=True)
        made = library.Trainer(net(), args, train_dataset=data, data_collator=padded)
        autoaccum.attach(made, target_batch=target, progress=False)

    class Module(lit.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, batch_idx):
            return self.net(**batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=LR)

    def fit(data, target):
        made = lit.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False, max_epochs=1,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[TargetBatch(target, progress=False)],
        )  # fmt: skip
        made.fit(Module(), DataLoader(data, 4, collate_fn=padded))

    said = {}
    for name, train in (("transformers", attach), ("lightning", fit)):
        for what, data, target in (("few", text(), 1), ("stream", Stream(), TARGET)):
            try:
                train(data, target)
            except SetupError as error:
                said[f"{name}, {what}"] = str(error)
    return said


TRAINERS = {"transformers": transformers, "lightning": lightning, "accelerate": accelerate}


def main():
    """Each trainer in turn; a rank's files are its own."""
    folder, *names = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if {"transformers", "lightning"} <= set(names):
        torch.save(refusals(folder), Path(folder) / f"refusals-{os.environ['RANK']}.pt")
    for name in names:
        heard = []
        module, losses, steps = TRAINERS[name](folder, heard)
        replays = sum(isinstance(event, WindowReplayed) for event in heard)
        found = {"weights": flat(module), "losses": losses, "steps": steps, "replays": replays}
        torch.save(found, Path(folder) / f"{name}-{os.environ['RANK']}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
