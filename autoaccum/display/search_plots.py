"""A search as one picture: how it went, what mattered, and where the good values lie. For files, with matplotlib."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from autoaccum.display.plots import INK, dress, picture_format

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["search_plot"]

# Okabe and Ito's colours, as in plots.py; markers differ as well.
_DONE, _PRUNED, _BEST, _FAILED = "#0072B2", "#999999", "#D55E00", "#000000"
_FAR = 4.0  # a value this many spreads above the median is drawn at the edge, so that the others can be told apart


class _Point(NamedTuple):
    batch: int
    lr: float  # as searched, before it is scaled to the batch
    value: float
    complete: bool
    number: int


def search_plot(result: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the picture of a SearchResult's `to_dict()` to `path`, whose suffix decides the format (.png, .svg, .pdf).

    Left: the value of each trial in order, and the best so far. Middle, where it is known: the importance of the
    parameters. Right, where both were used: the value over target batch and learning rate as given. Raises as
    `picture_format`, and an OSError where the file cannot be written.
    """
    suffix = picture_format(path)
    from matplotlib.figure import Figure

    drawn: list[Any] = [_history]
    if result.get("importance"):
        drawn.append(_importance)
    if _points(result["trials"]):
        drawn.append(_landscape)
    widths = [{_history: 5.2, _importance: 3.6, _landscape: 5.4}[draw] for draw in drawn]
    figure = Figure(figsize=(sum(widths), 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(drawn), squeeze=False, width_ratios=widths)[0]
    for draw, panel in zip(drawn, panels, strict=True):
        draw(panel, result, figure)
    figure.savefig(path, format=suffix)


def _history(panel: "Axes", result: Mapping[str, Any], figure: "Figure") -> None:
    """Values in the order of the trials."""
    from matplotlib.ticker import MaxNLocator

    trials, metric = result["trials"], result["metric"]
    best = min if result["direction"] == "minimize" else max
    done = [(row["number"], row["value"]) for row in trials if row["state"] == "complete"]
    pruned = [(row["number"], row["value"]) for row in trials if row["state"] == "pruned" and row["value"] is not None]
    low, high = _limits([value for _, value in done] or [value for _, value in pruned], [v for _, v in pruned])
    for pairs, marker, colour, label in ((pruned, "v", _PRUNED, "pruned, last value"), (done, "o", _DONE, "complete")):
        if pairs:
            shown = [min(max(value, low), high) for _, value in pairs]
            beyond = sum(value not in (low, high) and at in (low, high) for at, (_, value) in zip(shown, pairs))
            count = f"{len(pairs)}, {beyond} beyond the edge" if beyond else str(len(pairs))
            panel.plot([n for n, _ in pairs], shown, marker, ms=5, mfc="white" if marker == "v" else colour, mec=colour,
                       label=f"{label} ({count})", zorder=3)  # fmt: skip
    others = [row["number"] for row in trials if row["state"] in ("does not fit", "diverged", "error", "killed")]
    if others:
        panel.plot(others, [high] * len(others), "x", ms=6, color=_FAILED, label=f"no value ({len(others)})", zorder=3)
    if done:
        so_far = [best(value for _, value in done[: index + 1]) for index in range(len(done))]
        ends = [number for number, _ in done]
        ends.append(max(row["number"] for row in trials))
        panel.step(ends, [*so_far, so_far[-1]], where="post", color=_BEST, lw=2, label="best so far")
    room = 0.05 * (high - low or 1)
    panel.set_ylim(low - room, high + room)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("trial")
    panel.set_ylabel(metric.replace("_", " "))
    title = f"Best {metric.replace('_', ' ')} {result['best_value']:.4g}, trial {result['best_number']}"
    dress(panel, title, legend=2)


def _importance(panel: "Axes", result: Mapping[str, Any], figure: "Figure") -> None:
    """Shares of the parameters, the largest on top."""
    shares = sorted(result["importance"].items(), key=lambda item: item[1])
    names = [name.replace("_", " ") for name, _ in shares]
    bars = panel.barh(names, [share for _, share in shares], color=_DONE, height=0.55)
    panel.bar_label(bars, fmt="{:.0%}", padding=3, fontsize=9)
    panel.set_xlim(0, 1.18 * max(share for _, share in shares))
    panel.set_ylim(-0.6, max(len(shares), 3) - 0.4)
    panel.set_xticks([])
    panel.tick_params(axis="y", length=0)
    dress(panel, "What mattered")
    panel.grid(visible=False)
    panel.spines["bottom"].set_visible(False)


def _landscape(panel: "Axes", result: Mapping[str, Any], figure: "Figure") -> None:
    """The value by colour over target batch and learning rate; pruned trials small, at their last value."""
    points = _points(result["trials"])
    complete = [point.value for point in points if point.complete]
    low, high = _limits(complete or [point.value for point in points], [])
    sizes = sorted({point.batch for point in points})
    colours = "viridis" if result["direction"] == "minimize" else "viridis_r"
    drawn = None
    for is_complete, area, marker, label in ((False, 26, "v", "pruned"), (True, 60, "o", "complete")):
        chosen = [point for point in points if point.complete is is_complete]
        if chosen:
            drawn = panel.scatter(
                [_place(point, sizes) for point in chosen], [point.lr for point in chosen],
                c=[point.value for point in chosen], s=area, marker=marker, cmap=colours, vmin=low, vmax=high, ec=INK,
                lw=0.5, label=label, zorder=3,
            )  # fmt: skip
    for point in points:
        if point.number == result["best_number"]:
            place = _place(point, sizes)
            panel.scatter([place], [point.lr], s=190, marker="o", fc="none", ec=_BEST, lw=2, label="best", zorder=4)
    panel.set_yscale("log")
    panel.set_xticks(range(len(sizes)), labels=[str(size) for size in sizes])
    panel.set_xlim(-0.6, len(sizes) - 0.4)
    panel.set_xlabel("target batch")
    panel.set_ylabel("learning rate, before scaling")
    metric = result["metric"].replace("_", " ")
    dress(panel, f"{metric.capitalize()} by target batch and learning rate", legend=3)
    if drawn is not None:
        figure.colorbar(drawn, ax=panel, extend="both", label=metric)


def _points(trials: Sequence[Mapping[str, Any]]) -> list[_Point]:
    """The trials that have a batch, a learning rate and a value."""
    return [
        _Point(row["target_batch"], row["params"]["lr"], row["value"], row["state"] == "complete", row["number"])
        for row in trials
        if row["target_batch"] is not None and row["params"].get("lr") and row["value"] is not None
        and row["state"] in ("complete", "pruned")
    ]  # fmt: skip


def _place(point: _Point, sizes: Sequence[int]) -> float:
    """Along the axis: one column a batch, its trials side by side, so that none hides another."""
    return sizes.index(point.batch) + 0.5 * ((point.number * 0.618) % 1 - 0.5)


def _limits(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """From the least to the most, without what lies so far out that the rest could not be told apart."""
    ranked = sorted(values)
    middle, lower = ranked[len(ranked) // 2], ranked[len(ranked) // 4]
    upper = ranked[(3 * len(ranked)) // 4]
    spread = max(upper - lower, abs(middle) * 0.02, 1e-12)
    low = max(min([*ranked, *others]), lower - _FAR * spread)
    high = min(max([*ranked, *others]), upper + _FAR * spread)
    return low, high if high > low else low + spread
