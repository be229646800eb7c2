"""Where each rank is and what each one says, in words; and errors that all ranks know of."""

import ctypes
import json
import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["by_rank", "bytes_of", "digest", "listed", "short", "told", "was_told"]

# Marks an error that all ranks know of.
_TOLD = "_autoaccum_told_to_all_ranks"

E = TypeVar("E", bound=BaseException)


def told(error: E) -> E:
    """Marks an error that every rank knows of, so that nobody is told twice; returns it."""
    setattr(error, _TOLD, True)
    return error


def was_told(error: BaseException | None) -> bool:
    """Whether every rank knows of the error."""
    return hasattr(error, _TOLD)


def digest(value: Any) -> int:
    """A number below 2**32 that tells `value` from others: a tensor by its bytes, bytes as they are, else its text."""
    if isinstance(value, Tensor):
        value = bytes_of(value)
    return zlib.crc32(value if isinstance(value, bytes) else str(value).encode())


def bytes_of(tensor: Tensor) -> bytes:
    """A dense tensor's elements in order, as they lie in memory."""
    host = tensor.detach().cpu().contiguous()
    return ctypes.string_at(host.data_ptr(), host.numel() * host.element_size()) if host.numel() else b""


def listed(ranks: Sequence[int]) -> str:
    """Ranks in words, the first eight of them by number."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def by_rank(texts: Sequence[str], one: str, several: str) -> str:
    """What each rank says, ranks that say the same together: `rank 0 is in evaluate, ranks 1, 2 are in step 4`."""
    alike: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        alike.setdefault(text, []).append(rank)
    return ", ".join(f"{listed(ranks)} {several if len(ranks) > 1 else one} {text}" for text, ranks in alike.items())


def short(value: Any) -> str:
    """A plain value in at most 120 characters."""
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
