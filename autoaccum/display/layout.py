"""What the views and the progress lines share: the console, the three columns, how numbers are written."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TextIO

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = [
    "Row",
    "apart",
    "columns",
    "facts",
    "indented",
    "lines",
    "number",
    "of_budget",
    "on_curve",
    "open_console",
    "outcome_style",
    "said",
]

_NARROWEST = 40  # columns: with fewer, values would be cut off
Row = tuple[str, object, str]  # what it is, its value, why


def on_curve(trials: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The trials that a curve over batches is of: where some chose a length, those of the longest."""
    trials = list(trials)
    longest = max((trial.get("length") or 0 for trial in trials), default=0)
    return [trial for trial in trials if (trial.get("length") or longest) == longest]


_PLAIN = str.maketrans({
    "×": "x", "−": "-", "–": "-", "—": "-", "→": "->", "≤": "<=", "≥": ">=", "·": ".", "…": "...", "’": "'",
    "κ": "kappa", "β": "beta", "ε": "epsilon", "σ": "sigma", "Σ": "sum ", "′": "'", "√": "sqrt ", "²": "^2", "µ": "u",
    "╌": "-", "○": "o", "◆": "#", "└": "+", "─": "-", "│": "|", "┤": "+",
    **dict.fromkeys("█▉▊▋▌▍▎▏", "#"), **{chr(dots): "*" for dots in range(0x2801, 0x2900)},
})  # fmt: skip


class _Plain:
    """A stream that cannot show every sign: the usual ones are spelled out, the rest become "?"."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self._stream.encoding
        self._stream.write(text.translate(_PLAIN).encode(encoding, errors="replace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_console(stream: TextIO | None = None, *, width: int | None = None) -> Console:
    """A console on `stream` (None: stderr) that cannot fail over a sign the stream's encoding lacks.

    Colours are rich's to decide: none where NO_COLOR is set or the stream is no terminal.
    """
    stream = sys.stderr if stream is None else stream
    if not (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf"):
        stream = _Plain(stream)  # type: ignore[assignment]  # it has all that rich asks of a file
    console = Console(file=stream, width=width, highlight=False, markup=False, emoji=False)
    if console.width < _NARROWEST:  # COLUMNS=0, as some terminals and job systems set it, would draw nothing
        console.width = 80 if console.width < _NARROWEST // 4 else _NARROWEST
    return console


def facts(rows: Iterable[Row]) -> RenderableType:
    """Rows of what it is, its value and why; those whose value is not known are left out."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style="bold", max_width=34, overflow="fold")
    table.add_column(overflow="fold")
    for what, value, why in rows:
        if value is not None:
            table.add_row(Text(what), Text(str(value)), Text(why))
    return indented(table)


def lines(rows: Iterable[tuple[str, Text]]) -> RenderableType:
    """Rows of a name and a line that says value and reason in one."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, line in rows:
        table.add_row(Text(name), line)
    return indented(table)


def indented(drawn: RenderableType) -> RenderableType:
    """What stands below a title."""
    return Padding(drawn, (0, 0, 0, 2), expand=False)


def columns(cells: Mapping[str, Sequence[str | Text]], *words: str) -> RenderableType:
    """A table without lines: `words` fold; figures to the right, and names (a `Text`) to the left, stay whole however
    narrow the terminal is.
    """
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name, values in cells.items():
        if name in words:
            table.add_column(name, overflow="fold")
        else:
            side: Literal["left", "right"] = "left" if values and isinstance(values[0], Text) else "right"
            table.add_column(name, justify=side, no_wrap=True, min_width=max(map(len, [name, *values])))
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    return indented(table)


def apart(*views: RenderableType | None) -> RenderableType:
    """Views one below another with a blank line between; None is left out."""
    blocks = [block for view in views if view is not None for block in (Text(), view)]
    return Group(*blocks[1:])


def of_budget(peak: int, budget: int | None) -> str:
    """ ", 81% of the budget", where there is one."""
    return f", {peak / budget:.0%} of the budget" if budget else ""


def said(value: Any, form: Callable[[Any], str]) -> str:
    """`form(value)`; nothing where the value is not known."""
    return "" if value is None else form(value)


def number(value: object, digits: int = 6) -> str:
    """`value` with its floats cut to `digits` digits."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(number(item, digits) for item in value)})"
    return str(value)


def outcome_style(outcome: object) -> str:
    """The colour for a trial's outcome."""
    return {"fits": "green", "over budget": "yellow"}.get(str(outcome), "red")
