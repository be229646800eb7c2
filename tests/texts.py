"""Real text of mixed length, and a small language model over its bytes, for tests of windows that are cut by length."""

import functools
import re

import sklearn.datasets
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

PLACES = 4096


@functools.cache
def everything():
    text = " ".join(" ".join(getattr(sklearn.datasets, f"load_{name}")().DESCR.split()) for name in ("iris", "wine"))
    found = sorted({sentence for sentence in re.split(r"(?<=[.:;,)]) ", text) if len(sentence) > 3})
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[at].encode() for at in order]


def sentences(count=96, longest=160):
    """Sentences of scikit-learn's data set descriptions as bytes, in an order of their own."""
    return [torch.tensor(list(sentence[:longest])) for sentence in everything()[:count]]


def pad(samples):
    """As a collate function of the user's pads: ids with zeros, labels with what does not count."""
    ids = pad_sequence(samples, batch_first=True)
    return {"input_ids": ids, "labels": torch.where(ids > 0, ids, -100)}


def loader(samples=None, **keywords):
    return DataLoader(sentences() if samples is None else samples, batch_size=4, collate_fn=pad,
                      **{"shuffle": True, **keywords})  # fmt: skip


class Reader(nn.Module):
    """One block of causal attention over bytes; runs out of memory where `tight` says so."""

    def __init__(self, width=16, dropout=0.0, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(1)
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(PLACES, width)
        self.qkv, self.head = nn.Linear(width, 3 * width), nn.Linear(width, 256)
        self.dropout = nn.Dropout(dropout)
        self.tight = lambda batch, length: False
        self.shapes = []
        self.to(dtype)

    def forward(self, input_ids, labels):
        batch, length = input_ids.shape
        if self.training and torch.is_grad_enabled():
            self.shapes.append((batch, length))
        x = self.dropout(self.tokens(input_ids) + self.places(torch.arange(length)))
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        if self.training and torch.is_grad_enabled() and self.tight(batch, length):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        logits = self.head(x)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def setup():
    """What a child process builds anew."""
    return {"model": Reader(), "data": loader()}
