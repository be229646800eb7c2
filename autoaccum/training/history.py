"""The records of all windows so far, as rows of numbers: about a hundred bytes a window instead of a thousand.

A run of days has millions of windows. A list of records would be the one thing that grows without end in memory and in
every checkpoint; rows grow ten times slower, and go into a checkpoint as tensors, a column for each field, without a
step for each record.
"""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, overload

import torch

from autoaccum.window.record import StepRecord

__all__ = ["History"]

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
