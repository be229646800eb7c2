"""A small chart of memory against batch size, drawn with characters.

A cell holds 2 x 4 Braille dots where the terminal can show them, which makes a curve out of text; elsewhere one `*` a
column does. The four things drawn differ in shape as well as in colour, so that the chart reads without colours.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.text import Text

from autoaccum.units import format_bytes

__all__ = ["MemoryChart"]

_ROWS = 9
_COLUMNS = (16, 64)  # the narrowest and the widest plot
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # a Braille cell's bits by column and row


class _Signs(NamedTuple):
    curve: str  # in the legend, and for every cell where there is no Braille
    budget: str
    measured: str
    chosen: str
    corner: str
    bottom: str
    side: str
    tick: str


_UNICODE = _Signs("⠤⠤", "╌", "○", "◆", "└", "─", "│", "┤")
_ASCII = _Signs("*", "-", "o", "#", "+", "-", "|", "+")
_STYLES = {"curve": "cyan", "budget": "yellow", "measured": "bold", "chosen": "bold green"}


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
        self.budget_shown = budget is not None and budget <= 2.5 * highest
        if budget is not None and self.budget_shown:
            self.curve = [pair for pair in self.curve if pair[1] <= 1.6 * budget] or self.curve[:1]
            highest = max(budget, *(size for _, size in self.curve))
        self.top = 1.08 * highest
        self.first, self.last = self.curve[0][0], max(self.curve[-1][0], self.curve[0][0] + 1)
        self.measured = [pair for pair in measured if self._inside(*pair)]
        self.budget = budget
        self.chosen = chosen if chosen is not None and self.first <= chosen <= self.last else None

    def _inside(self, batch: float, size: float) -> bool:
        return self.first <= batch <= self.last and 0 <= size <= self.top

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
        signs = _ASCII if options.ascii_only else _UNICODE
        labels = {_ROWS - 1: "0 B", 0: format_bytes(self.top)}
        if self.budget is not None and self.budget_shown:
            row = self._row(self.budget)
            labels = {key: text for key, text in labels.items() if abs(key - row) > 1 or key != 0}
            labels[row] = format_bytes(self.budget)
        margin = max(len(text) for text in labels.values())
        columns = min(max(options.max_width - margin - len("  batch") - 1, _COLUMNS[0]), _COLUMNS[1])
        cells = self._cells(columns, signs, braille=not options.ascii_only)
        for row in range(_ROWS):
            line = Text(no_wrap=True)
            line.append(f"{labels.get(row, ''):>{margin}} ", style="dim")
            line.append(signs.tick if row in labels else signs.side, style="dim")
            for column in range(columns):
                sign, style = cells.get((row, column), (" ", ""))
                line.append(sign, style=style)
            yield line
        yield Text(f"{'':{margin}} {signs.corner}{signs.bottom * columns}", style="dim", no_wrap=True)
        yield Text(f"{'':{margin}}  {self._batches(columns)}", style="dim", no_wrap=True)
        yield Padding(self._legend(signs, options.max_width - margin - 2), (0, 0, 0, margin + 2))

    def _row(self, size: float) -> int:
        return min(max(int((1 - size / self.top) * _ROWS), 0), _ROWS - 1)

    def _column(self, batch: float, columns: int) -> int:
        return round((batch - self.first) / (self.last - self.first) * (columns - 1))

    def _cells(self, columns: int, signs: _Signs, *, braille: bool) -> dict[tuple[int, int], tuple[str, str]]:
        """What stands in each (row, column), later layers over earlier ones."""
        cells: dict[tuple[int, int], tuple[str, str]] = {}
        if self.budget is not None and self.budget_shown:
            row = self._row(self.budget)
            cells.update({(row, column): (signs.budget, _STYLES["budget"]) for column in range(columns)})
        cells.update({place: (sign, _STYLES["curve"]) for place, sign in self._line(columns, braille).items()})
        for batch, size in self.measured:
            cells[self._row(size), self._column(batch, columns)] = (signs.measured, _STYLES["measured"])
        if self.chosen is not None:
            place = self._row(self._at(self.chosen)), self._column(self.chosen, columns)
            cells[place] = (signs.chosen, _STYLES["chosen"])
        return cells

    def _line(self, columns: int, braille: bool) -> dict[tuple[int, int], str]:
        """The curve as characters by (row, column)."""
        wide, high = (2, 4) if braille else (1, 1)
        bits: dict[tuple[int, int], int] = {}
        before: int | None = None
        for x in range(columns * wide):
            batch = self.first + (self.last - self.first) * x / (columns * wide - 1)
            y = min(max(int((1 - self._at(batch) / self.top) * _ROWS * high), 0), _ROWS * high - 1)
            # Where the curve jumps, the dots between the two columns keep it one line.
            start = y if before is None or y == before else before + (1 if y > before else -1)
            for dot in range(min(start, y), max(start, y) + 1):
                place = (dot // high, x // wide)
                bits[place] = bits.get(place, 0) | _DOTS[x % wide][dot % high]
            before = y
        return {place: chr(0x2800 + mask) if braille else _ASCII.curve for place, mask in bits.items()}

    def _batches(self, columns: int) -> str:
        """The axis below: first and last batch at its ends, the chosen one between where there is room."""
        line = [" "] * columns
        ticks = [(self.first, 0.0), (self.last, 1.0)]
        if self.chosen is not None and self.chosen not in (self.first, self.last):
            ticks.append((self.chosen, 0.5))
        for batch, share in ticks:
            text = str(batch)
            column = self._column(batch, columns)
            start = min(max(column - int(share * (len(text) - 1)), 0), columns - len(text))
            around = line[max(start - 1, 0) : start + len(text) + 1]
            if all(sign == " " for sign in around):
                line[start : start + len(text)] = text
        return "".join(line).rstrip() + " batch"

    def _legend(self, signs: _Signs, width: int) -> Text:
        """What each sign stands for, an entry never broken over two lines."""
        entries = [(signs.curve, "curve", "forecast")]
        if self.measured:
            entries.append((signs.measured, "measured", "measured"))
        if self.chosen is not None:
            entries.append((signs.chosen, "chosen", f"micro-batch {self.chosen}"))
        if self.budget is not None:
            above = "" if self.budget_shown else ", far above"
            entries.append((signs.budget * 2, "budget", f"budget {format_bytes(self.budget)}{above}"))
        lines = [Text()]
        for sign, kind, words in entries:
            entry = Text(sign, style=_STYLES[kind]).append(f" {words}", style="not bold default")
            if lines[-1].cell_len and lines[-1].cell_len + 3 + entry.cell_len > width:
                lines.append(Text())
            lines[-1].append("   " if lines[-1].cell_len else "").append_text(entry)
        return Text("\n").join(lines)
