"""What a trainer notes on itself while its step runs: plain values, put back after a probe or a pass that failed."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["Noted"]

_PLAIN = (int, float, bool, str, type(None))


class Noted:
    """The plain attributes of an object, and its containers of nothing but plain values."""

    def __init__(self, owner: Any) -> None:
        self._owner, self._names = owner, set(vars(owner))
        self._kept = {name: copy.deepcopy(value) for name, value in vars(owner).items() if _is_plain(value)}

    def restore(self) -> None:
        """Sets them back; what came since goes."""
        held = vars(self._owner)
        for name in [name for name in held if name not in self._names]:
            del held[name]
        held.update(copy.deepcopy(self._kept))  # a window may run more than twice


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return isinstance(value, dict) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, set, tuple)):
        return len(value) <= 1000 and all(map(_is_plain, value))
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and value.is_leaf
    return isinstance(value, _PLAIN)
