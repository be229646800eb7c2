"""A small chart of memory against batch size, drawn with characters.

A cell holds 2 x 4 Braille dots, which makes a curve out of text; a console that cannot show them has `*` (layout.py).
The four things drawn differ in shape as well as in colour, so that the chart reads without colours.
"""

from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.text import Text

from autoaccum.units import format_bytes

__all__ = ["MemoryChart"]

_ROWS = 9
_COLUMNS = (16, 64)  # the narrowest and the widest plot
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # a Braille cell's bits by column and row
_SIGNS = {"curve": ("⠤", "cyan"), "budget": ("╌", "yellow"), "measured": ("○", "bold"), "chosen": ("◆", "bold green")}


class MemoryChart:
    """The forecast peak over the batch size, with the budget as a line and what was run as points.

    `curve` and `measured` are (batch, bytes) pairs; `chosen` is the micro-batch to mark, on the curve.
    """

    def __init__(
        self,
        curve: Sequence[tuple[int, int]],
        *,
        measured: Sequence[tuple[int, int]] = (),
        budget: int | None = None,
        chosen: int | None = None,
    ) -> None:
        self.curve = sorted(curve)
        highest = max(size for _, size in self.curve)
        # A budget far above all of the curve would press it flat, and a curve far above the budget would press flat
        # the part that matters: either is cut, and the legend has the figure.
        self.line = budget if budget is not None and budget <= 2.5 * highest else None
        if self.line is not None:
            self.curve = [pair for pair in self.curve if pair[1] <= 1.6 * self.line] or self.curve[:1]
            highest = max(self.line, *(size for _, size in self.curve))
        self.top = 1.08 * highest
        self.first, self.last = self.curve[0][0], max(self.curve[-1][0], self.curve[0][0] + 1)
        self.measured = [(n, size) for n, size in measured if self.first <= n <= self.last and 0 <= size <= self.top]
        self.budget = budget
        self.chosen = chosen if chosen is not None and self.first <= chosen <= self.last else None

    def _at(self, batch: float) -> float:
        """The curve's height at `batch`, on a straight line between its samples."""
        left = self.curve[0]
        for right in self.curve:
            if right[0] >= batch:
                share = (batch - left[0]) / (right[0] - left[0]) if right[0] > left[0] else 1.0
                return left[1] + share * (right[1] - left[1])
            left = right
        return self.curve[-1][1]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        labels = {_ROWS - 1: "0 B", 0: format_bytes(self.top)}
        if self.line is not None:
            row = self._row(self.line)
            labels = {key: text for key, text in labels.items() if abs(key - row) > 1 or key != 0}
            labels[row] = format_bytes(self.line)
        margin = max(len(text) for text in labels.values())
        columns = min(max(options.max_width - margin - len("  batch") - 1, _COLUMNS[0]), _COLUMNS[1])
        cells = self._cells(columns)
        for row in range(_ROWS):
            line = Text(f"{labels.get(row, ''):>{margin}} {'┤' if row in labels else '│'}", style="dim", no_wrap=True)
            for column in range(columns):
                line.append(*cells.get((row, column), (" ", "")))
            yield line
        yield Text(f"{'':{margin}} └{'─' * columns}", style="dim", no_wrap=True)
        yield Text(f"{'':{margin}}  {self._batches(columns)}", style="dim", no_wrap=True)
        yield Padding(self._legend(), (0, 0, 0, margin + 2))

    def _row(self, size: float, rows: int = _ROWS) -> int:
        return min(max(int((1 - size / self.top) * rows), 0), rows - 1)

    def _column(self, batch: float, columns: int) -> int:
        return round((batch - self.first) / (self.last - self.first) * (columns - 1))

    def _cells(self, columns: int) -> dict[tuple[int, int], tuple[str, str]]:
        """The (sign, style) at each (row, column), later layers over earlier ones."""
        cells: dict[tuple[int, int], tuple[str, str]] = {}
        if self.line is not None:
            cells |= {(self._row(self.line), column): _SIGNS["budget"] for column in range(columns)}
        cells |= {place: (chr(0x2800 + dots), _SIGNS["curve"][1]) for place, dots in self._dots(columns).items()}
        for batch, size in self.measured:
            cells[self._row(size), self._column(batch, columns)] = _SIGNS["measured"]
        if self.chosen is not None:
            cells[self._row(self._at(self.chosen)), self._column(self.chosen, columns)] = _SIGNS["chosen"]
        return cells

    def _dots(self, columns: int) -> dict[tuple[int, int], int]:
        """The curve as Braille dots by (row, column)."""
        dots: dict[tuple[int, int], int] = {}
        before: int | None = None
        for x in range(columns * 2):
            y = self._row(self._at(self.first + (self.last - self.first) * x / (columns * 2 - 1)), _ROWS * 4)
            # Where the curve jumps, the dots between the two columns keep it one line.
            start = y if before is None or y == before else before + (1 if y > before else -1)
            for dot in range(min(start, y), max(start, y) + 1):
                place = (dot // 4, x // 2)
                dots[place] = dots.get(place, 0) | _DOTS[x % 2][dot % 4]
            before = y
        return dots

    def _batches(self, columns: int) -> str:
        """The axis below: first and last batch at its ends, the chosen one between where there is room."""
        first, last = str(self.first), str(self.last)
        line = first + last.rjust(columns - len(first))
        if self.chosen is not None:
            text = str(self.chosen)
            start = max(self._column(self.chosen, columns) - (len(text) - 1) // 2, 1)
            if line[start - 1 : start + len(text) + 1].isspace():
                line = line[:start] + text + line[start + len(text) :]
        return f"{line.rstrip()} batch"

    def _legend(self) -> Columns:
        """What each sign stands for, an entry never broken over two lines."""
        entries = {"curve": "forecast"}
        if self.measured:
            entries["measured"] = "measured"
        if self.chosen is not None:
            entries["chosen"] = f"micro-batch {self.chosen}"
        if self.budget is not None:
            entries["budget"] = f"budget {format_bytes(self.budget)}{', far above' if self.line is None else ''}"
        signs = {kind: sign * 2 if kind in ("curve", "budget") else sign for kind, (sign, _) in _SIGNS.items()}
        return Columns(
            [
                Text(signs[kind], style=_SIGNS[kind][1]).append(f" {words}", style="not bold default")
                for kind, words in entries.items()
            ],
            padding=(0, 3),
        )
