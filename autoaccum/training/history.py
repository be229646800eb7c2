"""The records of all windows so far, as rows of numbers: about a hundred bytes a window instead of a thousand.

A run of days has millions of windows. A list of records would be the one thing that grows without end in memory and in
every checkpoint; rows grow ten times slower, and go into a checkpoint as tensors, a column for each field, without a
step for each record.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, overload

import torch
from torch import Tensor

from autoaccum.window.record import StepRecord

__all__ = ["History"]

_NUMBERS = tuple(field.name for field in fields(StepRecord) if "str" not in str(field.type))
_TEXTS = tuple(field.name for field in fields(StepRecord) if "str" in str(field.type))
_numbers_of = attrgetter(*_NUMBERS)
_WHOLE = frozenset(field.name for field in fields(StepRecord) if "int" in str(field.type))


class History(Sequence[StepRecord]):
    """A sequence of records that can be appended to; an index gives a record, a slice gives a list of them."""

    def __init__(self, records: Iterable[StepRecord] = ()) -> None:
        self._rows = array("d")  # a row of numbers for each record; float64 holds counts up to 2**53 exactly
        self._absent = array("q")  # a bit for each number that is None
        self._texts: dict[str, dict[int, str]] = {name: {} for name in _TEXTS}
        for record in records:
            self.append(record)

    def append(self, record: StepRecord) -> None:
        """Adds a record at the end."""
        numbers: Sequence[float | None] = _numbers_of(record)
        absent = 0
        if None in numbers:
            absent = sum([1 << place for place, number in enumerate(numbers) if number is None])
        self._rows.extend(0.0 if number is None else number for number in numbers)
        for name in _TEXTS:
            text = getattr(record, name)
            if text is not None:
                self._texts[name][len(self._absent)] = text
        self._absent.append(absent)

    def __len__(self) -> int:
        return len(self._absent)

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
        absent = self._absent[index]
        values: dict[str, Any] = {name: texts.get(index) for name, texts in self._texts.items()}
        for place, name in enumerate(_NUMBERS):
            number = self._rows[index * len(_NUMBERS) + place]
            values[name] = None if absent >> place & 1 else int(number) if name in _WHOLE else number
        return StepRecord(**values)

    def state_dict(self) -> dict[str, Any]:
        """The columns as tensors, the texts by their places."""
        return {
            "numbers": dict(zip(_NUMBERS, _tensor(self._rows, torch.float64).view(-1, len(_NUMBERS)).T.contiguous())),
            "absent": _tensor(self._absent, torch.int64),
            "texts": {name: dict(texts) for name, texts in self._texts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Becomes the history that gave `state`; a column that one of the two does not know counts as None."""
        rows = array("q", state["absent"].tolist())
        unknown = torch.zeros(len(rows), dtype=torch.float64)
        columns = [state["numbers"].get(name, unknown) for name in _NUMBERS]
        missing = sum(1 << place for place, column in enumerate(columns) if column is unknown)
        texts = {name: dict(state["texts"].get(name, {})) for name in _TEXTS}
        if any(column.shape != unknown.shape for column in columns):
            raise ValueError(f"columns of other lengths than {len(rows)}")
        self._rows = array("d", torch.stack(columns, dim=1).flatten().tolist())
        self._absent = array("q", (bits | missing for bits in rows))
        self._texts = texts


def _tensor(column: "array[Any]", dtype: torch.dtype) -> Tensor:
    # A copy: the array cannot grow while a tensor looks at it.
    return torch.frombuffer(column, dtype=dtype).clone() if column else torch.empty(0, dtype=dtype)
