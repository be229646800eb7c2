"""Plots for files, with matplotlib, which is imported when one is drawn and not before.

The figure is made without pyplot: nothing global is touched, no window opens, and a notebook's own settings stay. The
colours are Okabe and Ito's, which colour-blind readers tell apart; line styles and markers differ as well.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from autoaccum.display.layout import on_curve
from autoaccum.errors import MissingExtraError, SetupError, shown
from autoaccum.units import GIB, KIB, MIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["picture_format", "probe_plot", "search_plot"]

_CURVE, _CHOSEN, _BUDGET, _INK = "#0072B2", "#D55E00", "#000000", "#333333"
# A part has the same colour in every picture; what is not among them has one of the rest.
_PARTS = {
    "parameters": "#0072B2", "buffers": "#F0E442", "batch": "#999999", "gradients": "#56B4E9",
    "optimizer_state": "#009E73", "activations": "#E69F00", "temporary": "#CC79A7", "other": "#D55E00",
    "released": "#666666", "other_threads": "#882255",
}  # fmt: skip
_REST = ("#44AA99", "#DDCC77", "#AA4499")
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def probe_plot(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the plot of a ProbeReport's `to_dict()` to `path`, whose suffix decides the format (.png, .svg, .pdf).

    Left: the forecast peak over the batch size with the measured trials, the budget and the chosen micro-batch. Right,
    where the report has a timeline: the memory in one window at the chosen size, stacked by part; `timeline["bytes"]`
    has one row a part, in the order of `timeline["parts"]`, and one column a moment; `timeline["phases"]`, which may be
    missing, has [name, first moment] of each phase. Beside them, where windows were timed: samples a second over the
    micro-batch, a line for each memory saver. Raises as `picture_format`, and an OSError where it cannot be written.
    """
    suffix = picture_format(path)
    from matplotlib.figure import Figure

    timeline = report.get("timeline")
    savers = [row for row in report.get("savers") or () if row.get("throughput")]
    number = 1 + bool(timeline) + bool(savers)
    figure = Figure(figsize=(1.3 + 5.1 * number, 4.8), dpi=150, layout="constrained")
    frame = _frame(report)
    grid = figure.add_gridspec(1, number)
    first = figure.add_subplot(grid[0])
    _peaks(first, report, frame)
    if timeline:
        second = figure.add_subplot(grid[1], sharey=first)
        second.tick_params(labelleft=False)
        _moments(second, report, timeline, frame)
    if savers:
        _speeds(figure.add_subplot(grid[number - 1]), savers)
    figure.savefig(path, format=suffix)


def search_plot(result: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the picture of a SearchResult's `to_dict()` to `path`, as `probe_plot` does.

    Left: the value of each trial, and the best so far. Then, where they are known: the parameters' importance, and the
    value over target batch and learning rate as searched.
    """
    suffix = picture_format(path)
    from matplotlib.figure import Figure

    found = [row for row in result["trials"] if row["value"] is not None and row["state"] in ("complete", "pruned")]
    both = [row for row in found if row["target_batch"] and row["params"].get("lr")]
    number = 1 + bool(result["importance"]) + bool(both)
    figure = Figure(figsize=(5.1 * number, 4.4), dpi=150, layout="constrained")
    first, *others = figure.subplots(1, number, squeeze=False)[0]
    _history(first, result, found)
    if result["importance"]:
        _importance(others.pop(0), result["importance"])
    if both:
        _landscape(others[0], result, both)
    figure.savefig(path, format=suffix)


def picture_format(path: str | os.PathLike[str]) -> str:
    """The format that a picture's name asks for: what comes before hours of work asks this first.

    A MissingExtraError without matplotlib, a SetupError where it cannot write that format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", "A plot") from error
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in Figure().canvas.get_supported_filetypes():
        raise SetupError(
            f"{shown(os.fspath(path))}: no plot can be written as {suffix!r}: end the name in .png, .svg or .pdf"
        )
    return suffix


class _Frame(NamedTuple):
    """What both panels are drawn in, so that the budget is one line through both."""

    curve: list[tuple[int, int]]  # (batch, bytes)
    top: int  # bytes
    unit: str
    scale: int
    budget: int | None  # bytes; None where it is unknown or far above all that is drawn


def _frame(report: Mapping[str, Any]) -> _Frame:
    curve = sorted((batch, size) for batch, size in report.get("curve") or ())
    measured = [trial.get("peak_bytes") or 0 for trial in report.get("trials") or ()]
    moments = [sum(column) for column in zip(*(report.get("timeline") or {}).get("bytes", ()), strict=True)]
    budget: int | None = report.get("budget_bytes")
    # A budget far above the curve would press it flat, and so would a curve that goes on far above the budget.
    if budget is not None and budget > 2.5 * max([1, *measured, *(size for _, size in curve)]):
        budget = None
    if budget is not None:
        curve = [pair for pair in curve if pair[1] <= 1.3 * budget] or curve[:1]
    top = max([1, budget or 0, *measured, *moments, *(size for _, size in curve)])
    unit, scale = next(
        ((name, size) for name, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)) if top >= size), ("B", 1)
    )
    return _Frame(curve, top, unit, scale, budget)


def _peaks(panel: "Axes", report: Mapping[str, Any], frame: _Frame) -> None:
    """Peak over batch size."""
    from matplotlib.ticker import MaxNLocator

    scale, chosen, trials = frame.scale, report["micro_batch"], on_curve(report.get("trials") or ())
    if frame.curve:
        panel.plot(*_columns(frame.curve, scale), color=_CURVE, linewidth=2, label="forecast")
    for fits, marker, label in ((True, "o", "measured"), (False, "X", "did not fit")):
        some = [trial for trial in trials if (trial.get("outcome", "fits") == "fits") is fits and trial["peak_bytes"]]
        if known := [(trial["batch"], trial["peak_bytes"]) for trial in some]:
            panel.plot(*_columns(known, scale), marker, ms=6, mfc="white", mec=_INK, label=label, zorder=3)
    if frame.budget is not None:
        label = f"budget {format_bytes(frame.budget)}"
        panel.axhline(frame.budget / scale, color=_BUDGET, linestyle="--", linewidth=1.4, label=label)
    panel.axvline(chosen, color=_CHOSEN, linestyle=":", linewidth=1.8, label=f"micro-batch {chosen}")
    panel.set_ylim(0, 1.06 * frame.top / scale)
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    budget = report.get("budget_bytes")
    above = f" (budget {format_bytes(budget)}, far above)" if budget and frame.budget is None else ""
    _dress(panel, f"Peak memory by batch size{above}", "batch size", f"memory ({frame.unit})", legend=2)


def _speeds(panel: "Axes", savers: Sequence[Mapping[str, Any]]) -> None:
    """Samples a second over the micro-batch."""
    for number, row in enumerate(savers):
        sizes, rates = zip(*sorted(row["throughput"]), strict=True)
        panel.plot(sizes, rates, "o-", color=_LINES[number % len(_LINES)], label=row["saver"] or "as it is")
    panel.set_ylim(bottom=0)
    panel.set_xlim(left=0)
    _dress(panel, "Throughput by memory saver", "micro-batch", "samples a second", legend=2)


def _history(panel: "Axes", result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Values in the order of the trials."""
    metric, best = result["metric"].replace("_", " "), min if result["direction"] == "minimize" else max
    for state, marker, colour in (("complete", "o", _CURVE), ("pruned", "v", "#999999")):
        if pairs := [(row["number"], row["value"]) for row in rows if row["state"] == state]:
            panel.plot(*zip(*pairs, strict=True), marker, color=colour, label=f"{state} ({len(pairs)})", zorder=3)
    done = [(row["number"], row["value"]) for row in rows if row["state"] == "complete"]
    so_far = list(itertools.accumulate((value for _, value in done), best))
    panel.step([number for number, _ in done], so_far, where="post", color=_CHOSEN, lw=2, label="best so far")
    if min(row["value"] for row in rows) > 0:  # one that went astray would press the others flat
        panel.set_yscale("log")
    title = f"Best {metric} {result['best_value']:.4g}, trial {result['best_number']}"
    _dress(panel, title, "trial", metric, legend=3)


def _importance(panel: "Axes", shares: Mapping[str, float]) -> None:
    """Shares of the parameters, the largest on top."""
    names = sorted(shares, key=lambda name: shares[name])
    bars = panel.barh([name.replace("_", " ") for name in names], [shares[name] for name in names], color=_CURVE)
    panel.bar_label(bars, fmt="{:.0%}", padding=3, fontsize=9)
    panel.set_xlim(0, 1.18 * max(shares.values()))
    _dress(panel, "What mattered", "share of the difference")


def _landscape(panel: "Axes", result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """The value by colour over target batch and learning rate; pruned trials at their last value."""
    values, least = [row["value"] for row in rows], result["direction"] == "minimize"
    middle = sorted(values)[len(values) // 2]
    low, high = (min(values), middle) if least else (middle, max(values))  # the better half can be told apart
    for state, marker in (("pruned", "v"), ("complete", "o")):
        if some := [row for row in rows if row["state"] == state]:
            drawn = panel.scatter(
                [row["target_batch"] for row in some], [row["params"]["lr"] for row in some],
                c=[row["value"] for row in some], cmap="viridis" if least else "viridis_r", vmin=low, vmax=high,
                marker=marker, ec=_INK, lw=0.5, label=state, zorder=3,
            )  # fmt: skip
    for row in rows:
        if row["number"] == result["best_number"]:
            best = (row["target_batch"], row["params"]["lr"])
            panel.scatter(*best, s=190, fc="none", ec=_CHOSEN, lw=2, label="best", zorder=4)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    sizes = sorted({row["target_batch"] for row in rows})
    panel.set_xticks(sizes, labels=list(map(str, sizes)))
    title = f"{result['metric'].replace('_', ' ').capitalize()} by batch and learning rate"
    _dress(panel, title, "target batch", "learning rate, before scaling", legend=3)
    panel.figure.colorbar(drawn, ax=panel, extend="both")


def _moments(panel: "Axes", report: Mapping[str, Any], timeline: Mapping[str, Any], frame: _Frame) -> None:
    """Memory over time, stacked by part."""
    parts = [(name, row) for name, row in zip(timeline["parts"], timeline["bytes"], strict=True) if any(row)]
    names = [str(name).replace("_", " ") for name, _ in parts]
    rows = [[size / frame.scale for size in row] for _, row in parts]
    unknown = itertools.cycle(_REST)
    colours = [_PARTS.get(name) or next(unknown) for name, _ in parts]
    panel.stackplot(range(len(rows[0])), rows, labels=names, colors=colours, ec="white", lw=0.4)
    if frame.budget is not None:
        panel.axhline(frame.budget / frame.scale, color=_BUDGET, linestyle="--", linewidth=1.4)
    panel.set_xlim(0, max(len(rows[0]) - 1, 1))
    # A mark on the axis where each phase begins, and its name below where there is room for it.
    phases, moments = timeline.get("phases") or (), len(rows[0])
    panel.set_xticks([start for _, start in phases], labels=[])
    panel.set_xticks([], minor=True)
    ends = [*(start for _, start in phases[1:]), moments - 1][: len(phases)]
    for (name, start), end in zip(phases, ends, strict=True):
        if (end - start) / moments > 0.016 * len(name):
            panel.annotate(name.replace("_", " "), ((start + end) / 2, 0), (0, -5), xycoords=("data", "axes fraction"),
                           textcoords="offset points", ha="center", va="top", fontsize=8, color=_INK)  # fmt: skip
    _dress(panel, f"One window at micro-batch {report['micro_batch']}", "time, one window", legend=3)
    panel.xaxis.labelpad = 16  # below the names of the phases


def _dress(panel: "Axes", title: str, x: str, y: str = "", *, legend: int = 0) -> None:
    """A title, the axes' names, a quiet frame, and a legend of so many columns, if any."""
    panel.set(xlabel=x, ylabel=y)
    panel.set_title(title, fontsize=11, loc="left", color=_INK)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)
    if legend:
        # Below the panel: wherever it stood inside, a curve or the budget could run through its words.
        panel.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=legend, fontsize=9)


def _columns(pairs: Sequence[tuple[int, int]], scale: int) -> tuple[list[int], list[float]]:
    return [batch for batch, _ in pairs], [size / scale for _, size in pairs]
