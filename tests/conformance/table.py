"""The table of measured figures: taken from the tests' reports, written as JSON and Markdown."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.conformance.trainers import TRAINERS

__all__ = ["Figure", "TableWriter", "shown"]

Figure = dict[str, Any]
"""row, title, label, trainer, outcome ("error", "verdict", "raised", "not offered"), error, ratio, ok, text."""

PROPERTY = "conformance figure"

_HEADER = """# Accumulated gradients against the whole batch's

Written by `python -m tests.conformance --table`. A figure is ‖g − ref‖ / ‖ref‖ over all parameters, the worst over the
optimizer steps of a run: g what the optimizer was given, ref the gradient of the step's samples in one batch, in
float64, dropout off. Behind × stands ⟨g, ref⟩ / ⟨ref, ref⟩ of that step. "exact" is an error of at most 1e-10; what
else a case asks for is said in its title. autoaccum must pass; the others' figures are what was measured with each used
as its documentation says, and "raised" is what it raised. "n/a": it offers nothing for the case. A column's empty cell
was not measured: the trainer is not installed here, or the case is about autoaccum's own interface.
"""


class TableWriter:
    """A pytest plugin that gathers the figures of all tests and writes them at the end."""

    def __init__(self, folder: Path | None, *, merge: bool = False) -> None:
        self._folder, self._merge = folder, merge
        self.figures: list[Figure] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            self.figures += [value for name, value in report.user_properties if name == PROPERTY]

    def pytest_sessionfinish(self, session: Any) -> None:
        if self._folder is None or hasattr(session.config, "workerinput"):
            return
        if self._merge:
            before = json.loads((self._folder / "table.json").read_text(encoding="utf-8"))["figures"]
            new = {_cell(figure): figure for figure in self.figures}
            known = {_cell(figure) for figure in before}
            self.figures = [new.get(_cell(figure), figure) for figure in before]
            self.figures += [figure for cell, figure in new.items() if cell not in known]
        self.figures.sort(key=lambda figure: figure["row"])
        versions = _versions()
        data = {"schema": 1, "versions": versions, "figures": self.figures}
        (self._folder / "table.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (self._folder / "table.md").write_text(markdown(self.figures, versions), encoding="utf-8")


def shown(figure: Figure) -> str:
    """A figure as a cell of the table."""
    if figure["outcome"] != "error":
        return str(figure["text"])
    error, ratio = figure["error"], figure["ratio"]
    cell = "exact" if error <= 1e-10 else f"{error:.1e}" if error < 1e-2 else f"{error:.2f}"
    if error > 1e-10 and ratio is not None and abs(ratio - 1) > 5e-3:
        cell += f" (× {ratio:.2f})" if abs(ratio) < 100 else f" (× {ratio:.0f})"
    return cell + (f", {figure['text']}" if figure["text"] else "")


_NOTES = """
What their documentation has for a person to write by hand:

- transformers: `compute_loss_func(outputs, labels, num_items_in_batch)` divides by the labels of the whole window where
  the function does so; a subclass may own `compute_loss`. Not measured.
- accelerate: the guide's recipe for samples of variable size has a column of its own. It counts labels other than -100,
  and so is for losses over those.
- lightning: manual optimization, in which the division, the step and the clipping are the user's. Not measured.
- ignite: an update function of one's own instead of `create_supervised_trainer`, clipping included. Not measured.
- sentence-transformers: measured is its cached loss over pairs alone, the one thing that it has for this (case 21).
- case 13: DistributedDataParallel's `find_unused_parameters=True`, measured.
- case 23: lightning warns that a checkpoint in mid-epoch is not exact unless the loader keeps its own state; ignite's
  deterministic engine promises its order for restarts at an epoch, with workers; accelerate has `use_seedable_sampler`.

Not here: SyncBatchNorm runs on GPUs only (tests/gpu/test_batch_norm.py); so does fp16 itself. Case 15 looks at the
scaler around a float64 model, which autocast leaves alone.
"""


def markdown(figures: list[Figure], versions: dict[str, str]) -> str:
    """All of it: a section a case, a line for each thing measured, a column a trainer."""
    names = [trainer.name for trainer in TRAINERS if any(figure["trainer"] == trainer.name for figure in figures)]
    lines = [_HEADER, ", ".join(f"{name} {value}" for name, value in versions.items()) + ".", ""]
    lines += [f"| case | | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    cells: dict[tuple[int, str, str], dict[str, str]] = {}
    for figure in figures:
        line = cells.setdefault((figure["row"], figure["title"], figure["label"]), {})
        line[figure["trainer"]] = shown(figure).replace("|", "\\|")
    last = None
    for (row, title, label), line in cells.items():
        head = f"{row}. {title}" if row != last else ""
        last = row
        lines.append(f"| {head} | {label} | {' | '.join(line.get(name, '') for name in names)} |")
    return "\n".join(lines) + "\n" + _NOTES


def _cell(figure: Figure) -> tuple[Any, ...]:
    return tuple(figure[name] for name in ("row", "title", "label", "trainer"))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for distribution in ("torch", *dict.fromkeys(trainer.distribution for trainer in TRAINERS)):
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    return found
