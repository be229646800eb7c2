"""Tiny random models and padded samples for the tests of trainers, and a person's own loop over whole batches."""

import os

import torch
from torch.utils.data import Dataset

from tests.versions import peer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "1")

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
SAMPLES = 22


class Listed(Dataset):
    """A list as a Dataset; module-level, so that workers can be given it."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def samples(kind, count=SAMPLES):
    """Token ids of different lengths; `kind` is "class" for one label a sample, or "tokens", some of them ignored."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        ids = torch.randint(1, 50, (5 + index % 9,), generator=draw)
        label = torch.randint(0, 3, (), generator=draw)
        if kind == "tokens":
            label = ids.clone()
            label[index % 5 + 1 :][::2] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label})
    return Listed(made)


def padded(batch):
    """A collate function that pads."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.nn.utils.rnn.pad_sequence([sample[name] for sample in batch], True, value)
        if batch[0][name].dim()
        else torch.stack([sample[name] for sample in batch])
        for name, value in fill.items()
    }


def model(name):
    """In float64, without dropout."""
    transformers = peer("transformers")
    torch.manual_seed(0)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    config = {
        "Bert": lambda: transformers.BertConfig(**TINY, **quiet),
        "Robe": lambda: transformers.RobertaConfig(**TINY, **quiet),
        "GPT2": lambda: transformers.GPT2Config(
            vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, attn_implementation="eager",  # the oldest release's other one overflows in float64
        ),
        "Llam": lambda: transformers.LlamaConfig(**TINY, max_position_embeddings=32),
        "T5Fo": lambda: transformers.T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
            dropout_rate=0.0,
        ),
    }[name[:4]]()  # fmt: skip
    return getattr(transformers, name)(config).double()


def by_hand(model, data, batch, *, epochs=1, lr=0.1, schedule=None, clip=None):
    """Plain SGD over whole batches in order: (the parameters, the loss of each step)."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = None if schedule is None else schedule(optimizer)
    losses = []
    model.train()
    for _ in range(epochs):
        for start in range(0, len(data), batch):
            loss = model(**padded([data[i] for i in range(start, min(start + batch, len(data)))])).loss
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if scheduler is not None:
                scheduler.step()
    return flat(model), losses


def flat(model):
    """What is trained, as one vector."""
    return torch.cat([p.detach().flatten().double() for p in model.parameters() if p.requires_grad])


def moved(after, before, reference):
    """‖update − reference's‖ / ‖reference's‖."""
    return float((after - reference).norm() / (reference - before).norm())
