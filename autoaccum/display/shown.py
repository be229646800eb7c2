"""What a result shows of itself: `print(result)` and a notebook's cell draw what the command line draws."""

import shutil
from io import StringIO
from typing import Any

__all__ = ["Drawn"]

# Where a notebook draws, there is room; the page scrolls sideways rather than breaking a table's rows.
_CELL = '<pre style="white-space:pre;overflow-x:auto;line-height:normal;font-family:monospace">{code}</pre>'
_CELL_COLUMNS = 110


class Drawn:
    """A result with a `to_dict()`, drawn by the view that its class names in `_view`: of display/terminal.py.

    `repr` stays what it is, so that a debugger and a test's failure show the fields.
    """

    _view: str

    def __str__(self) -> str:
        """As the command line prints it where stdout is no terminal: without colours, as wide as the terminal."""
        from autoaccum.display.layout import open_console

        console = open_console(StringIO(), width=shutil.get_terminal_size().columns)
        console.print(self._drawn())
        text: str = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO above
        return "\n".join(line.rstrip() for line in text.splitlines())

    def _repr_html_(self) -> str:
        """For a notebook's cell, with the terminal's colours."""
        from rich.console import Console

        console = Console(
            file=StringIO(), record=True, width=_CELL_COLUMNS, highlight=False, markup=False, emoji=False,
            force_terminal=True, color_system="truecolor", legacy_windows=False,
        )  # fmt: skip
        console.print(self._drawn())
        return console.export_html(inline_styles=True, code_format=_CELL)

    def _drawn(self) -> Any:
        from autoaccum.display import terminal

        return getattr(terminal, self._view)(self._values())

    def _values(self) -> dict[str, Any]:
        """What the view draws."""
        values: dict[str, Any] = self.to_dict()  # type: ignore[attr-defined]  # the result's own
        return values
