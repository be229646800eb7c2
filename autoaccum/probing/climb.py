"""Up the ladder, rung by rung, where not even the smallest micro-batch fits; and what was found, in words.

A rung is not judged by a forecast: its smallest step is run, which is the very question, and shows its peak. Where
nothing is to be taken, and a person has to choose, those that fit are probed whole: how many samples, and how soon.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from autoaccum.errors import ProbeError
from autoaccum.model.memory_savers import BY_NAME, CHANGES
from autoaccum.units import format_bytes

__all__ = ["NOT_BORNE", "Tried", "cannot_run", "told"]

# What a model's own code raises that does not bear a saver, such as a cache that is filled a second time.
NOT_BORNE = (ProbeError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Tried:
    """What one rung showed.

    Attributes:
        rung: its name.
        peak_bytes: of the smallest micro-batch; None where it did not come to its end.
        fits: whether that is within the budget.
        obstacle: why the rung was not run or could not be; None where it was.
        probed: where it was probed whole: limit, micro_batch and what else a row of a report's `savers` says.
    """

    rung: str
    peak_bytes: int | None = None
    fits: bool = False
    obstacle: str | None = None
    probed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """One clause."""
        if self.obstacle is not None:
            return self.obstacle
        if self.peak_bytes is None:
            return "ran out of memory"
        limit = self.probed.get("limit", 0)
        more = f", and {limit} samples at once" if limit > 1 else ""
        return f"{'fits' if self.fits else 'does not fit'}, at {format_bytes(self.peak_bytes)}{more}"

    @property
    def row(self) -> dict[str, Any]:
        """As a row of a report's `savers`; `obstacle` says why it is not taken, where it does not fit."""
        why = None if self.fits else "does not fit" if self.peak_bytes else self.text
        return {
            "limit": None, **self.probed, "peak_bytes": self.probed.get("peak_bytes") or self.peak_bytes,
            "saver": self.rung, "same_result": self.rung not in CHANGES,
            "obstacle": why or ("fits; by name only" if self.rung in BY_NAME else "fits"),
        }  # fmt: skip


def cannot_run(error: BaseException) -> str:
    """Why a saver could not be run, in one clause."""
    return f"cannot be run, {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def told(tried: Iterable[Tried]) -> str:
    """The end of an error's message: what each rung showed, and how the cheapest that fits is taken."""
    tried = list(tried)
    alike: dict[str, list[str]] = {}
    for each in tried:
        alike.setdefault(each.text, []).append(each.rung)
    found = "; ".join(f"{', '.join(rungs)}: {text}" for text, rungs in alike.items())
    fitting = [each.rung for each in tried if each.fits]
    named = [f'ladder="{rung}"' for rung in fitting if rung in BY_NAME]
    taken = [rung for rung in fitting if rung not in BY_NAME]
    ends = [f"Only where it is asked for: {' or '.join(named)}"] if named else []
    ends += [f'ladder="auto" takes {taken[0]}, the cheapest that fits'] if taken else []
    end = ". ".join(ends) or "None of them is enough"
    changing = [each.rung for each in tried if each.rung in CHANGES and each.obstacle is None]
    same = f". The result is the plain step's but for {', '.join(changing)}" if changing else ""
    return f"The ladder, with the smallest micro-batch: {found}{same}. {end}"
