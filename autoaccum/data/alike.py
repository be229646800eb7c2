"""Whether all ranks were given the same data: its kind, its length, and a look at its first samples."""

from typing import Any

import torch
from torch import Tensor

from autoaccum.data.base import Source
from autoaccum.data.draws import Lane
from autoaccum.data.structure import leaves
from autoaccum.ranks import digest

__all__ = ["data_facts"]

_SEEDS = (1, 2)


def data_facts(called: str, source: Source | None) -> dict[str, Any]:
    """What every rank must have alike, as plain values by name; `called` is the data's keyword.

    Samples are read twice, seeded alike on every rank, and only what is the same both times is compared: what a
    dataset draws at random may differ.
    """
    if source is None:
        return {called: "none"}
    facts: dict[str, Any] = {called: "given"}
    facts |= {f"{called}'s {name}": value for name, value in source.fingerprint().items()}
    facts |= {f"{called}'s batch_size": source.loader_batch, f"{called}'s drop_last": source.drop_last}
    looks = []
    with source._untouched():
        for seed in _SEEDS:
            with Lane(seed):
                looks.append([_told(leaf) for _, leaf in leaves(source.first())])
    if len(looks[0]) == len(looks[1]):
        same = [a for a, b in zip(*looks, strict=True) if a == b]
        facts[f"{called}'s first samples"] = "; ".join(same[:4]) + f" (in all {digest(same):08x})"
    return facts


def _told(leaf: Any) -> str:
    """What is compared of a leaf."""
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_nested:
        return f"{str(leaf.dtype).removeprefix('torch.')} of shape {tuple(leaf.shape)} {digest(leaf):08x}"
    if callable(getattr(leaf, "tobytes", None)):  # an array, an image
        return f"{type(leaf).__name__} {digest(leaf.tobytes()):08x}"
    return repr(leaf)[:80] if isinstance(leaf, (int, float, str, bytes)) else type(leaf).__name__
