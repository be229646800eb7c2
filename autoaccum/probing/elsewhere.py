"""What would fit on another card: the forecast against its memory, nothing run there.

A card's memory is what its driver reports; from it goes what the driver keeps, and what a CUDA context and its
libraries take before the first tensor. The forecast is of this machine's kernels: on another kind of device they take
other workspaces, and a caching allocator reserves more than is asked for.
"""

import difflib
import re
from typing import Any

from autoaccum.errors import SetupError
from autoaccum.planning.bisection import largest
from autoaccum.probing.report import ProbeReport
from autoaccum.units import GIB, MIB, parse_bytes

__all__ = ["CARDS", "elsewhere", "known_card"]

CONTEXT_BYTES = GIB // 2
# What a driver keeps of the memory that it reports: 24,564 MiB of an RTX 4090 are 24,207 to CUDA, of a T4's 15,360 some
# 14,930, of an L4's 23,034 some 22,490.
DRIVERS_SHARE = 0.03

# MiB by chip and GB as sold, as nvidia-smi shows them with drivers since 510 (older ones left out what the driver
# keeps), ECC as the card is delivered: where it is on, it takes some of what was sold.
_MEMORY = {
    "GTX 1080 Ti": {11: 11264}, "RTX 2060": {6: 6144}, "RTX 2070": {8: 8192}, "RTX 2080": {8: 8192},
    "RTX 2080 Ti": {11: 11264}, "RTX 3050": {8: 8192}, "RTX 3060": {12: 12288}, "RTX 3060 Ti": {8: 8192},
    "RTX 3070": {8: 8192}, "RTX 3070 Ti": {8: 8192}, "RTX 3080": {10: 10240}, "RTX 3080 Ti": {12: 12288},
    "RTX 3090": {24: 24576}, "RTX 3090 Ti": {24: 24564}, "RTX 4060": {8: 8188}, "RTX 4060 Ti": {8: 8188, 16: 16380},
    "RTX 4070": {12: 12282}, "RTX 4070 Super": {12: 12282}, "RTX 4070 Ti": {12: 12282},
    "RTX 4070 Ti Super": {16: 16376}, "RTX 4080": {16: 16376}, "RTX 4080 Super": {16: 16376}, "RTX 4090": {24: 24564},
    "RTX 5070": {12: 12227}, "RTX 5070 Ti": {16: 16303}, "RTX 5080": {16: 16303}, "RTX 5090": {32: 32607},
    "T4": {16: 15360}, "P100": {16: 16384}, "V100": {16: 16384, 32: 32768}, "A10": {24: 23028}, "A10G": {24: 23028},
    "A40": {48: 46068}, "L4": {24: 23034}, "L40S": {48: 46068}, "RTX A4000": {16: 16376}, "RTX A5000": {24: 24564},
    "RTX A6000": {48: 49140}, "A100": {40: 40960, 80: 81920}, "H100": {80: 81559}, "H200": {141: 143771},
}  # fmt: skip
_SIZE = re.compile(r"\s*[\d.]+\s*[kmgt]i?b?\s*", re.IGNORECASE)
_SOLD = re.compile(r"\b(\d+) ?gi?b\b")
# What does not tell cards apart in a card's full name.
_SAID = re.compile(r"nvidia|geforce|quadro|tesla|rtx|gtx|sxm\d?|pcie?|hbm\d?e?|gpu|graphics|card|[^a-z0-9]")


def _chip(card: str) -> str:
    """A card's name without the words that all have, and without its memory."""
    return _SAID.sub("", _SOLD.sub(" ", card.lower().replace("-", " ")))


# By name: the chip as `_chip` has it, GB as sold, and bytes.
_KNOWN = {
    f"{chip} {sold}GB" if len(sizes) > 1 else chip: (_chip(chip), sold, mib * MIB)
    for chip, sizes in _MEMORY.items()
    for sold, mib in sizes.items()
}
CARDS = {name: size for name, (_, _, size) in _KNOWN.items()}


def elsewhere(report: ProbeReport, card: str) -> dict[str, Any]:
    """What would fit on `card`, by the report's forecast, as plain values.

    `budget_bytes` is its memory less what a driver keeps and a context takes, `limit` the largest micro-batch whose
    forecast fits (0 where none does), `note` how the card may differ.

    Args:
        report: of a probe that made a forecast, else a ProbeError.
        card: its name, as people or nvidia-smi write it, or its memory, such as "24GiB"; a SetupError names the
            nearest.
    """
    name = known_card(card)
    memory = CARDS[name] if name in CARDS else parse_bytes(name)
    budget = max(0, memory - int(memory * DRIVERS_SHARE) - CONTEXT_BYTES)
    limit = largest(lambda size: report.forecast(size) <= budget, 2**30)
    note = "forecast, not run there: the allocator of a card reserves up to a tenth more than is asked for"
    if report.device_type == "cpu":
        note += "; it is of CPU kernels, whose workspaces and attention differ from a GPU's: probe again on the card"
    return {"card": name, "memory_bytes": memory, "budget_bytes": budget, "limit": limit, "note": note}


def known_card(card: str) -> str:
    """The card's name in CARDS, or its memory as it was given; a SetupError names the nearest cards."""
    if _SIZE.fullmatch(card):
        parse_bytes(card)
        return card.strip()
    chip, said = _chip(card), _SOLD.search(card.lower())
    found = [name for name, (own, sold, _) in _KNOWN.items() if own == chip and (said is None or int(said[1]) == sold)]
    if len(found) == 1:
        return found[0]
    similar = difflib.get_close_matches(chip, [own for own, _, _ in _KNOWN.values()], cutoff=0.4)
    near = (
        [name for name, (own, _, _) in _KNOWN.items() if own == chip]
        or [name for name, (own, _, _) in _KNOWN.items() if chip and (own.startswith(chip) or chip.startswith(own))]
        or [name for name, (own, _, _) in _KNOWN.items() if own in similar]
    )[:4]
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(CARDS)};"
    raise SetupError(f'--for "{card}": no such card is known; {hint} give its memory instead, as --for 24GiB')
