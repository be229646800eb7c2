"""What would fit on another card: the forecast against its memory, nothing run there.

A card's memory is what its maker states; from it goes what a CUDA context and its libraries take before the first
tensor. The forecast is of this machine's kernels: on another kind of device they take other workspaces, and a caching
allocator reserves more than is asked for.
"""

import difflib
from dataclasses import asdict, dataclass
from typing import Any

from autoaccum.errors import SetupError
from autoaccum.probing.report import ProbeReport
from autoaccum.units import GIB

__all__ = ["CARDS", "Elsewhere", "elsewhere", "known_card"]

CONTEXT_BYTES = GIB // 2

# Memory in GiB, as sold.
CARDS = {
    "GTX 1080 Ti": 11, "RTX 2060": 6, "RTX 2080 Ti": 11, "RTX 3050": 8, "RTX 3060": 12, "RTX 3070": 8, "RTX 3080": 10,
    "RTX 3090": 24, "RTX 4060": 8, "RTX 4060 Ti 16GB": 16, "RTX 4070": 12, "RTX 4080": 16, "RTX 4090": 24,
    "RTX 5070": 12, "RTX 5080": 16, "RTX 5090": 32, "T4": 16, "P100": 16, "V100 16GB": 16, "V100 32GB": 32, "A10": 24,
    "A40": 48, "L4": 24, "L40S": 48, "RTX A4000": 16, "RTX A5000": 24, "RTX A6000": 48, "A100 40GB": 40,
    "A100 80GB": 80, "H100": 80, "H200": 141,
}  # fmt: skip


@dataclass(frozen=True)
class Elsewhere:
    """What is forecast to fit on a card.

    Attributes:
        card: its name.
        memory_bytes: all of it.
        budget_bytes: less what a context takes.
        limit: the largest micro-batch whose forecast fits; 0 where none does.
        note: what the forecast is of, and how the card may differ.
    """

    card: str
    memory_bytes: int
    budget_bytes: int
    limit: int
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def elsewhere(report: ProbeReport, card: str, *, on_cpu: bool) -> Elsewhere:
    """What would fit on `card`, by the report's forecast.

    Args:
        report: of a probe that made a forecast.
        card: a name in CARDS, in any case, with or without "NVIDIA" and "GeForce".
        on_cpu: whether the forecast is of CPU kernels.

    Raises:
        SetupError: an unknown card; the nearest names are given.
        ProbeError: the report has no forecast.
    """
    name = known_card(card)
    memory = CARDS[name] * GIB
    budget = memory - CONTEXT_BYTES
    low, high = 0, 1
    while report.forecast(high) <= budget and high < 2**30:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if report.forecast(middle) <= budget else (low, middle)
    note = "forecast, not run there: the allocator of a card reserves up to a tenth more than is asked for"
    if on_cpu:
        note += "; it is of CPU kernels, whose workspaces and attention differ from a GPU's: probe again on the card"
    return Elsewhere(name, memory, budget, low, note)


def known_card(card: str) -> str:
    """The card's name in CARDS.

    Raises:
        SetupError: an unknown card; the nearest names are given.
    """
    plain = card.lower().replace("nvidia", "").replace("geforce", "").replace("tesla", "").strip()
    by_name = {name.lower(): name for name in CARDS}
    if plain in by_name:
        return by_name[plain]
    near = difflib.get_close_matches(plain, by_name, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(by_name[name] for name in near)}?" if near else f"known are {', '.join(CARDS)};"
    raise SetupError(f'--for "{card}": no such card is known; {hint} give its memory instead, as --memory 24GiB')
