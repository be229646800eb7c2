"""Bytes as people write them: "23.6 GiB" to and from an integer."""

import re

from autoaccum.errors import SetupError, shown

__all__ = ["GIB", "KIB", "MIB", "asked_bytes", "check_memory", "format_bytes", "named", "parse_bytes"]

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 10**3,
    "m": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gib": GIB, "gb": 10**9,
    "t": TIB, "tib": TIB, "tb": 10**12,
}  # fmt: skip
_PERCENT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*")
_PATTERN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """The bytes that `text` names: "8GiB" and "8G" are powers of two, "8GB" is a power of ten, "512" is bytes.

    Raises:
        SetupError: not a number with one of the known units, or less than one byte.
    """
    refused = f"{shown(text)} is not a memory size:"
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise SetupError(f'{refused} give bytes as an int, or a text such as "8GiB" or "512MiB"')
    if isinstance(text, int):
        size = text
    else:
        match = _PATTERN.fullmatch(text)
        factor = _UNITS.get(match.group(2).lower()) if match else None
        if match is None or factor is None:
            raise SetupError(f'{refused} write a number with KiB, MiB, GiB or TiB, such as "8GiB"')
        size = int(min(float(match.group(1)), 2.0**63) * factor)
    if size >= 2**63:
        raise SetupError(f"{refused} no machine has so much")
    if size < 1:
        raise SetupError(f'{refused} it must be at least one byte, such as "8GiB"')
    return size


def format_bytes(size: float) -> str:
    """`size` bytes in the largest unit that keeps the number at 1 or more: 25_340_000_000 -> "23.6 GiB"."""
    magnitude = abs(size)
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if magnitude >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


def check_memory(memory: int | str | None) -> None:
    """Refuses a `memory` that is no size, or a share outside (0%, 100%], before anything is touched for it."""
    if memory is not None:
        asked_bytes(memory, 1)


def asked_bytes(memory: int | str, total: int) -> tuple[int, str]:
    """The bytes that the user's `memory` means on a device of `total` bytes, and how to say where they come from."""
    text = named(memory)
    percent = _PERCENT.fullmatch(memory) if isinstance(memory, str) else None
    if percent is None:
        return parse_bytes(memory), f"as {text} asks"
    share = min(float(percent.group(1)), 101.0)
    if not 0 < share <= 100:
        raise SetupError(f'{text} is no share of a device: it must be above 0% and at most 100%, such as "80%"')
    return max(1, int(total * share / 100)), f"as {text} asks of {format_bytes(total)}"


def named(memory: int | str) -> str:
    """The setting as the user wrote it, for a message."""
    return f"memory={shown(memory)}".replace("'", '"')
