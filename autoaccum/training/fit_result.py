"""What is known of a training: the records of all windows, what cutting by length gave, and what `fit` gives back.

A run of days has millions of windows. A list of records would be the one thing that grows without end in memory and in
every checkpoint: as rows of numbers they take about a hundred bytes a window instead of a thousand, and go into a
checkpoint as tensors, a column for each field, without a step for each record.
"""

import math
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, overload

import torch
from torch import nn

from autoaccum.checking.verify import VerifyReport
from autoaccum.checks import plain
from autoaccum.display.shown import Drawn
from autoaccum.planning.plan import Plan
from autoaccum.probing.report import ProbeReport
from autoaccum.window.record import StepRecord

__all__ = ["FitResult", "History", "LengthSummary"]

_KINDS = {field.name: str(field.type) for field in fields(StepRecord)}
_TEXTS = tuple(name for name, kind in _KINDS.items() if "str" in kind)
_NUMBERS = tuple(name for name in _KINDS if name not in _TEXTS)
_numbers_of = attrgetter(*_NUMBERS)


class History(Sequence[StepRecord]):
    """A sequence of records that can be appended to; an index gives a record, a slice gives a list of them."""

    def __init__(self, records: Iterable[StepRecord] = ()) -> None:
        # A row of numbers for each record; float64 holds counts up to 2**53 exactly. None is kept as NaN, so that what
        # need not be there and is not a number comes back as None.
        self._rows = array("d")
        self._texts: dict[str, dict[int, str]] = {name: {} for name in _TEXTS}
        for record in records:
            self.append(record)

    def append(self, record: StepRecord) -> None:
        """Adds a record at the end."""
        for name in _TEXTS:
            text = getattr(record, name)
            if text is not None:
                self._texts[name][len(self)] = text
        self._rows.extend([math.nan if number is None else number for number in _numbers_of(record)])

    def __len__(self) -> int:
        return len(self._rows) // len(_NUMBERS)

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[StepRecord]: ...
    def __getitem__(self, index: int | slice) -> StepRecord | list[StepRecord]:
        places = range(len(self))[index]
        return self._record(places) if isinstance(places, int) else [self._record(place) for place in places]

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, (History, list, tuple)) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"<History of {len(self)} windows>"

    def _record(self, index: int) -> StepRecord:
        values: dict[str, Any] = {name: texts.get(index) for name, texts in self._texts.items()}
        for name, number in zip(_NUMBERS, self._rows[index * len(_NUMBERS) : (index + 1) * len(_NUMBERS)]):
            kind = _KINDS[name]
            values[name] = None if "None" in kind and math.isnan(number) else int(number) if "int" in kind else number
        return StepRecord(**values)

    def state_dict(self) -> dict[str, Any]:
        """The columns as tensors, the texts by their places."""
        # A copy: the array cannot grow while a tensor looks at it.
        rows = torch.frombuffer(self._rows, dtype=torch.float64).clone() if self._rows else torch.empty(0)
        return {
            "numbers": dict(zip(_NUMBERS, rows.view(-1, len(_NUMBERS)).T.contiguous())),
            "texts": {name: dict(texts) for name, texts in self._texts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Becomes the history that gave `state`; a column that one of the two does not know counts as None."""
        unknown = torch.full_like(state["numbers"]["step"], math.nan)
        rows = torch.stack([state["numbers"].get(name, unknown) for name in _NUMBERS], dim=-1)
        texts = {name: dict(state["texts"].get(name, {})) for name in _TEXTS}
        self._rows, self._texts = array("d", rows.flatten().tolist()), texts


@dataclass(frozen=True)
class LengthSummary:
    """Sums over the windows that were cut by length, on this rank. A token is a unit of the length that varies.

    Attributes:
        tokens, padded: the samples' own; with their padding, as they ran.
        unsorted: with their padding, had they run in the order they came, in micro-batches that fit the longest samples
            seen.
        seconds: that the windows took.
        micro_batches: how many windows had so many micro-batches.
        tokens_per_second: padding not counted.
        padding: the share of all that ran which was padding.
        padding_unsorted: the share that it would be in micro-batches of one size, in the order the samples came.
    """

    tokens: int
    padded: int
    unsorted: int
    seconds: float
    micro_batches: dict[int, int]
    tokens_per_second: float
    padding: float
    padding_unsorted: float

    @classmethod
    def of(cls, history: Iterable[StepRecord]) -> "LengthSummary | None":
        """Over the windows that were cut by length; None where none were."""
        records = [record for record in history if record.tokens is not None and record.micro_batches]
        if not records:
            return None
        fields = ("tokens", "padded_tokens", "unsorted_tokens", "seconds")
        tokens, padded, unsorted, seconds = (sum(getattr(each, name) for each in records) for name in fields)
        counts = dict(Counter(record.micro_batches for record in records))
        speed = tokens / seconds if seconds else 0.0
        return cls(tokens, padded, unsorted, seconds, counts, speed, 1.0 - tokens / padded, 1.0 - tokens / unsorted)

    def lines(self) -> list[str]:
        """For a person."""
        usual = statistics.median_low(list(Counter(self.micro_batches).elements()))
        low, high = min(self.micro_batches), max(self.micro_batches)
        spread = f"{low} in every window" if low == high else f"{low} to {high} a window, {usual} in the middle"
        return [
            f"tokens: {self.tokens_per_second:,.0f} a second, padding not counted; {self.tokens:,} in "
            f"{sum(self.micro_batches.values())} windows",
            f"padding: {self.padding:.1%} of what ran; in micro-batches of one size it would have been "
            f"{self.padding_unsorted:.1%}, and {self.unsorted / self.padded:.2f} times as much would have run",
            f"micro-batches: {spread}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        counts = {str(count): windows for count, windows in sorted(self.micro_batches.items())}
        return {**vars(self), "micro_batches": counts}


@dataclass(frozen=True)
class FitResult(Drawn):
    """What `fit` gives back.

    Attributes:
        model: the trained model, the same object.
        plan: as it was at the end; k may have grown after an out-of-memory error.
        probe: None where the micro-batch or the plan was given.
        verify: None where the check was switched off.
        history: one record a window, also of those before a resume.
        evaluations: one dict an epoch, with "epoch" and "step"; empty without validation data.
        unsaved: what of the checkpoints and the run's record could not be saved; None where all was.
        stopped: why the training ended before its time, at a listener's wish; None where it ran to its end.
        lengths: tokens a second, padding, and micro-batches a window, where samples differ in length; else None.
    """

    model: nn.Module = field(repr=False)
    plan: Plan
    probe: ProbeReport | None = field(repr=False)
    verify: VerifyReport | None
    history: Sequence[StepRecord] = field(repr=False)
    evaluations: list[dict[str, float]]
    unsaved: str | None = None
    stopped: str | None = None
    lengths: LengthSummary | None = None

    _view = "fit_view"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: everything but the model."""
        values = {**vars(self), "history": list(self.history)}
        del values["model"]
        return dict(plain(values))
