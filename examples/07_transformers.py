"""Keep your Transformers Trainer: one line gives it the batch that does not fit.

    python examples/07_transformers.py            (needs transformers and accelerate)

A small BERT with random weights learns to say which letter a paragraph of Python's language reference begins with, from
its words, which differ much in number. The Trainer alone accumulates 8 × 8; with one line more it trains on exactly 64
samples a step, under a budget that 64 do not fit in. Shown: what its own accumulation does to its gradient, then time
and update of both against one batch of 64 at once.
"""

import os
import pydoc_data.topics
import re
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import autoaccum

TARGET_BATCH, WORDS, CLASSES = 64, 512, 4


def samples() -> list[dict]:
    """Paragraphs as hashed words, of 4 to 128 of them."""
    text = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    found = sorted({" ".join(part.split()) for part in re.split(r"\n\s*\n", text)} - {""})
    words = [part.split()[:128] for part in found if len(part.split()) >= 4][:512]
    return [
        {"input_ids": torch.tensor([sum(map(ord, word)) % (WORDS - 1) + 1 for word in part]),
         "labels": ord(part[0][0].lower()) % CLASSES}
        for part in words
    ]  # fmt: skip


def pad(batch: list[dict]) -> dict:
    """A collate function, as a tokenizer's."""
    ids = pad_sequence([sample["input_ids"] for sample in batch], batch_first=True)
    labels = torch.tensor([sample["labels"] for sample in batch])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def trainer(batch: int, steps: int) -> Trainer:
    """The same model and data each time, without dropout, so that updates can be compared."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
        num_train_epochs=1, learning_rate=0.1, optim="sgd", max_grad_norm=0, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, log_level="error",
    )  # fmt: skip
    return Trainer(BertForSequenceClassification(config), args, train_dataset=samples(), data_collator=pad)


def update(made: Trainer) -> tuple[torch.Tensor, float]:
    """What training changed, and the seconds it took."""
    before = torch.cat([parameter.detach().flatten().clone() for parameter in made.model.parameters()])
    began = time.perf_counter()
    made.train()
    seconds = time.perf_counter() - began
    return torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()]) - before, seconds


def main() -> None:
    """Three trainings."""
    whole, whole_seconds = update(trainer(TARGET_BATCH, 1))
    alone = trainer(8, 8)
    print(autoaccum.verify(alone).text)
    own, own_seconds = update(alone)
    attached = autoaccum.attach(trainer(8, 8), target_batch=TARGET_BATCH, memory="32MiB", cache=False, progress=True)
    ours, our_seconds = update(attached)
    for name, change, seconds in (("8 × 8 by itself", own, own_seconds), ("attached", ours, our_seconds)):
        off = float((change - whole).norm() / whole.norm())
        print(f"{name}: {seconds:.1f} s, update {off:.1e} off that of {TARGET_BATCH} at once ({whole_seconds:.1f} s)")


if __name__ == "__main__":
    main()
