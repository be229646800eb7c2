"""Whether all ranks were given the same data: its kind, its length, and a look at its first samples."""

from typing import Any

import torch
from torch import Tensor

from autoaccum.data.base import Source
from autoaccum.data.draws import Lane
from autoaccum.data.structure import children
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
                looks.append(_leaves(source.first()))
    if len(looks[0]) == len(looks[1]):
        same = [a for a, b in zip(*looks, strict=True) if a == b]
        facts[f"{called}'s first samples"] = "; ".join(same[:4]) + f" (in all {digest(same):08x})"
    return facts


def _leaves(node: Any) -> list[str]:
    inside = children(node)
    if inside is not None:
        return [leaf for child in inside for leaf in _leaves(child)]
    if isinstance(node, Tensor) and node.layout == torch.strided and not node.is_nested:
        what = f"{str(node.dtype).removeprefix('torch.')} of shape {tuple(node.shape)}"
        return [f"{what} {digest(node):08x}"]
    if callable(getattr(node, "tobytes", None)):  # an array, an image
        return [f"{type(node).__name__} {digest(node.tobytes()):08x}"]
    if isinstance(node, (int, float, str, bytes)):
        return [repr(node)[:80]]
    return [type(node).__name__]
