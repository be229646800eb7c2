"""Results as tables and a chart in a terminal, drawn from plain dicts (the `to_dict()`s of the results).

Three columns throughout: what it is, its value, and why it has it, since every decision here carries its reason. Text
is put together from `Text` objects and never from markup, so that a reason with square brackets in it stays as it is.
What runs while a command works (lines, a bar) is in progress.py.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autoaccum.display.chart import MemoryChart
from autoaccum.display.layout import (
    Row,
    apart,
    columns,
    facts,
    indented,
    lines,
    number,
    of_budget,
    on_curve,
    outcome_style,
    said,
)
from autoaccum.display.search_table import table_of
from autoaccum.units import format_bytes

__all__ = [
    "config_view",
    "devices_view",
    "elsewhere_view",
    "fit_view",
    "plan_view",
    "probe_view",
    "report_view",
    "savers_view",
    "search_view",
    "verify_view",
]


_PLAN_ORDER = ("target_batch", "share", "micro_batch", "accumulation_steps", "lr", "lr_rule", "betas", "eps")
_LABELS = {
    "micro_batch": "micro-batch",
    "lr": "learning rate",
    "lr_rule": "rule",
    "batch_norm": "BatchNorm",
    "bn_momentum": "BatchNorm momentum",
    "tail": "short last window",
}
_FIRST_CLAUSE = re.compile(r"[:;] | \(")
_LEADING_VALUE = re.compile(r"(\S{1,12}(?: [\w-]+)?)(?=:| = )")  # "pooled: ...", "0.4 = ..."


def plan_view(plan: Mapping[str, Any]) -> RenderableType:
    """A Plan's `to_dict()`: a line on every value, which is the value and its reason."""
    title = Text.assemble(("Plan  ", "bold"), (str(_samples(plan)), "bold green"), " samples a step")
    if plan.get("world_size", 1) > 1:
        title.append(f" over {plan['world_size']} ranks; rank {plan.get('rank', 0)} has {_sum(plan['micro_batches'])}")
    else:
        title.append(f" = {_sizes(plan)}")
    reasons = dict(plan.get("reasons") or {})
    rows = []
    for name in dict.fromkeys([*_PLAN_ORDER, *reasons]):
        line = reasons.get(name) or (number(plan[name]) if plan.get(name) is not None else "")
        if line:
            value = _LEADING_VALUE.match(line)
            text = Text(line)
            text.stylize("bold", 0, value.end(1) if value else 0)
            rows.append((_LABELS.get(name, name.replace("_", " ")), text))
    return Group(title, lines(rows))


def report_view(report: Mapping[str, Any]) -> RenderableType:
    """A ProbeReport's `to_dict()`: the answer, its proof, the budget, what was run, what fills the memory, a chart."""
    micro, budget = report["micro_batch"], report.get("budget_bytes")
    curve = [(int(batch), int(size)) for batch, size in report.get("curve") or ()]
    trials = list(report.get("trials") or ())
    title = Text.assemble(
        ("Probe  ", "bold"), "micro-batch ", (str(micro), "bold green"), f" fits on {report.get('device')}"
    )
    rows: list[Row] = []
    peak = max((trial.get("peak_bytes") or 0 for trial in on_curve(trials) if trial["batch"] == micro), default=0)
    if peak:
        rows.append(("peak", format_bytes(peak), f"measured at {micro}{of_budget(peak, budget)}"))
    rows.append(("limit", report.get("limit") or "not looked for", report["limit_reason"]))
    if budget:
        reason = str(report.get("budget_reason") or "").removeprefix(format_bytes(budget)).lstrip(",: ")
        rows.append(("budget", format_bytes(budget), reason))
    if (residual := report.get("residual")) is not None:
        error = f"{100 * residual:.2g}%" if abs(residual) >= 1e-6 else "0%"  # less is rounding in float64
        rows.append(("forecast error", error, "at a further trace that was not fitted"))
    rows += [
        ("throughput", f"{speed:,.1f} samples/s", f"at {batch}") for batch, speed in report.get("throughput") or ()
    ]
    if report.get("ladder"):
        rows.append(("saver", str(report["ladder"]), "the model runs under it"))
    rows += [("note", "", str(note)) for note in report.get("notes") or ()]
    measured = [(trial["batch"], trial["peak_bytes"]) for trial in on_curve(trials) if trial.get("peak_bytes")]
    savers, parts = report.get("savers") or (), report.get("parts")
    return apart(
        Group(title, facts(rows)),
        _trials(trials, report.get("out_of_memory_count") or 0) if trials else None,
        savers_view(savers, report.get("ladder")) if len(savers) > 1 else None,
        _parts(parts, micro) if parts else None,
        MemoryChart(curve, measured=measured, budget=budget, chosen=micro) if len(curve) > 1 else None,
    )


def probe_view(values: Mapping[str, Any]) -> RenderableType:
    """A ProbeReport's `to_dict()` with its plan's keys beside, and what would fit elsewhere where that was asked."""
    return apart(
        report_view(values),
        plan_view(values) if values.get("target_batch") else None,
        elsewhere_view(values["elsewhere"]) if values.get("elsewhere") else None,
        _ways(values["ways"]) if values.get("ways") else None,
    )


def _ways(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A row for each way in which a model may lie on several ranks; what differs on them as "least to most"."""
    ends = ["was run, and is the answer above" if row["taken"] else row["why_not"] or "forecast only" for row in rows]
    cells: dict[str, Sequence[str | Text]] = {
        "way": [Text(row["way"], style="bold green" if row["taken"] else "") for row in rows],
        "smallest step": [_span([peak for peak in row["peak_bytes"] if peak], format_bytes) for row in rows],
        "fits": [_span(row["limits"] or [], str) for row in rows],
        "": [Text(_FIRST_CLAUSE.split(text)[0]) for text in ends],
    }
    return Group(Text("What fits how", style="bold"), columns(cells, "way", ""))


def _span(values: Sequence[int], text: Callable[[int], str]) -> str:
    return " to ".join(dict.fromkeys(map(text, sorted(values)[:: max(len(values) - 1, 1)]))) or "-"


def config_view(values: Mapping[str, Any]) -> RenderableType:
    """The lines for another trainer's configuration, as they are."""
    return Text(values["config"], no_wrap=True, overflow="ignore")


def verify_view(report: Mapping[str, Any]) -> RenderableType:
    """A VerifyReport's `to_dict()`."""
    if not report.get("verifiable", True):
        verdict = ("not verifiable", "yellow")
    else:
        verdict = ("passed", "bold green") if report["ok"] else ("failed", "bold red")
    rows = [
        ("relative error", said(report.get("relative_error"), "{:.2g}".format) or None, "of the accumulated gradient"),
        ("ratio", said(report.get("ratio"), "{:.6g}".format) or None, "accumulated gradient to whole-batch gradient"),
        ("cause", report.get("cause"), ""),
        ("worst parameter", report.get("worst_parameter"), ""),
    ]
    title = Text.assemble(("Gradient check  ", "bold"), verdict)
    return Group(title, *([Text(str(report["text"]))] if report.get("text") else []), facts(rows))


def devices_view(values: Mapping[str, Any]) -> RenderableType:
    """What `autoaccum.memory.device.devices()` lists, under "devices"."""
    blocks: list[RenderableType] = []
    for device in values["devices"]:
        blocks.append(Text.assemble((str(device["device"]), "bold green"), f"  {device.get('name') or ''}"))
        total, free, note = device.get("total"), device.get("free"), device.get("note")
        rows: list[Row] = []
        if total is not None:
            rows.append(("memory", format_bytes(total), "" if free is None else f"{format_bytes(free)} free"))
        for process in device.get("processes") or ():
            size = process.get("bytes")
            whose = f"pid {process['pid']} {process.get('name') or ''}"
            rows.append(("in use by", "unknown" if size is None else format_bytes(size), whose.rstrip()))
        rows += [("driver", device.get("driver") or None, ""), ("note", "" if note else None, str(note))]
        blocks.append(facts(rows))
    return Group(*blocks) if blocks else Text("No devices.")


def elsewhere_view(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What would fit on other cards."""
    fits = [f"micro-batch {row['limit']}" if row["limit"] else "nothing fits" for row in rows]
    drawn = [(str(row["card"]), fit, f"in {format_bytes(row['budget_bytes'])}") for row, fit in zip(rows, fits)]
    notes = [Text(f"  {note}", style="dim") for note in dict.fromkeys(str(row["note"]) for row in rows)]
    return Group(Text("Elsewhere", style="bold"), facts(drawn), *notes)


def fit_view(result: Mapping[str, Any]) -> RenderableType:
    """A FitResult's `to_dict()`: what was trained, how it ended, and how fast."""
    history = list(result.get("history") or ())
    rows: list[Row] = []
    if history:
        first, last = history[0], history[-1]
        rows.append(("loss", number(last["loss"]), f"{number(first['loss'])} at step {first['step']}"))
        rows.append(("learning rate", number(last.get("lr")), "at the last step"))
        seconds = sum(record.get("seconds") or 0.0 for record in history)
        samples = sum(record.get("samples") or 0 for record in history)
        if seconds:
            rows.append(("samples/s", f"{samples / seconds:,.1f}", f"{samples:,} samples in {seconds:,.1f} s of steps"))
        if lengths := result.get("lengths"):
            counts = [int(count) for count in lengths["micro_batches"]]
            unsorted, windows = lengths["padding_unsorted"], sum(lengths["micro_batches"].values())
            tokens, speed = lengths["tokens"], lengths["tokens_per_second"]
            rows += [
                ("tokens/s", f"{speed:,.0f}", f"{tokens:,} tokens, padding not counted"),
                ("padding", f"{lengths['padding']:.1%}", f"{unsorted:.1%} in micro-batches of one size"),
                ("micro-batches", f"{min(counts)} to {max(counts)}", f"a window, over {windows} windows"),
            ]
        peak = max(record.get("peak_bytes") or 0 for record in history)
        if peak:
            budget = (result.get("probe") or {}).get("budget_bytes")
            rows.append(("peak memory", format_bytes(peak), of_budget(peak, budget).lstrip(", ")))
    evaluations = list(result.get("evaluations") or ())
    if evaluations:
        values = dict(evaluations[-1])
        when = f"held-out data, after step {values.pop('step', '?')}, epoch {values.pop('epoch', '?')}"
        rows += [(str(name), number(value), when) for name, value in values.items()]
    steps = history[-1]["step"] if history else 0
    title = Text.assemble(("Trained  ", "bold"), (str(steps), "bold green"), " step" if steps == 1 else " steps")
    if result.get("plan"):
        plan = result["plan"]
        title.append(f" of {_samples(plan)} samples = {_sizes(plan)}")
    return Group(title, facts(rows))


def search_view(result: Mapping[str, Any]) -> RenderableType:
    """A SearchResult's `to_dict()`: the best setting, what mattered, the best trials, what to do next."""
    trials = [trial for trial in result.get("trials") or () if isinstance(trial, Mapping)]
    count = len(result.get("trials") or ())
    best, sign = result.get("best_number"), 1 if result.get("direction", "minimize") == "minimize" else -1
    title = Text.assemble(
        ("Search  ", "bold"), f"best {result.get('metric', 'value')} ",
        (number(result.get("best_value")), "bold green"), f" of {count} trials",
    )  # fmt: skip
    shares = result.get("importance") or {}
    rows: list[Row] = [
        (key, number(value), f"{shares[key]:.0%} of the difference" if key in shares else "")
        for key, value in (result.get("best_params") or {}).items()
    ]
    for name, key in (("weights", "weights"), ("look at it", "dashboard")):
        rows.append((name, "" if result.get(key) else None, str(result.get(key))))
    table = None
    if ranked := sorted((t for t in trials if t["state"] == "complete"), key=lambda t: sign * t["value"])[:5]:
        states = ", ".join(f"{n} {word}" for word, n in Counter(trial["state"] for trial in trials).items())
        table = Group(Text.assemble(("Trials  ", "bold"), states), table_of(ranked, best=best))
    plan = result.get("best_plan")
    return apart(Group(title, facts(rows)), table, plan_view(plan) if plan else None)


def _trials(trials: Sequence[Mapping[str, Any]], out_of_memory: int) -> RenderableType:
    outcomes = [str(each.get("outcome", "")) for each in trials]
    cells: dict[str, Sequence[str | Text]] = {
        "batch": [str(each["batch"]) + (f" × {each['length']}" if each.get("length") else "") for each in trials],
        "peak": [said(each.get("peak_bytes"), format_bytes) for each in trials],
        "time": [said(each.get("seconds"), "{:.2f} s".format) for each in trials],
        "kind": [str(each.get("kind", "")) for each in trials],
        "outcome": [Text(outcome, style=outcome_style(outcome)) for outcome in outcomes],
    }
    runs = f"{len(trials)} runs" if len(trials) != 1 else "1 run"
    title = Text.assemble(("Trials  ", "bold"), f"{runs}, {out_of_memory or 'none'} out of memory")
    return Group(title, columns(cells, "kind", "outcome"))


def savers_view(rows: Sequence[Mapping[str, Any]], taken: str | None = None) -> RenderableType:
    """A row for each memory saver that ran, and below them in words why others did not."""
    ran = [row for row in rows if row.get("limit") or row.get("peak_bytes")]
    rates = [", ".join(f"{rate:,.1f} at {size}" for size, rate in row.get("throughput") or ()) for row in ran]
    ends = ["taken" if row["saver"] == taken and rate else row.get("obstacle") for rate, row in zip(rates, ran)]
    results = ["" if row["same_result"] else "another result" for row in ran]
    cells: dict[str, Sequence[str | Text]] = {
        "saver": [Text(row["saver"] or "none", style="bold green" if row["saver"] == taken else "") for row in ran],
        "fits": [str(row["limit"] or "") for row in ran],
        "batch": [str(row.get("micro_batch", "")) for row in ran],
        "peak": [said(row.get("peak_bytes"), format_bytes) for row in ran],
        "window": [said(row.get("window_seconds"), "{:.2f} s".format) for row in ran],
        "samples/s" if any(rates) else "": ["; ".join(filter(None, each)) for each in zip(rates, ends, results)],
    }
    shown = {name: values for name, values in cells.items() if any(values)}
    same = "" if any(results) else ", each with the plain step's result"
    left: dict[str, list[str]] = {}
    for row in rows:
        if row not in ran:
            left.setdefault(str(row["obstacle"]), []).append(str(row["saver"]))
    lines = [Text(f"{', '.join(savers)}: {why}") for why, savers in left.items()]
    return Group(Text(f"Memory savers{same}", style="bold"), columns(shown, "samples/s", ""), *lines)


def _parts(parts: Mapping[str, Any], micro: int) -> RenderableType:
    """What fills the memory at the chosen size, the samples' part being `per_sample` times the micro-batch."""
    sizes = {
        name.replace("_", " "): int(size) for name, size in parts.items() if name != "per_sample" and size is not None
    }
    whys = dict.fromkeys(sizes, "")
    if parts.get("per_sample"):
        whys["samples"] = f"{micro} × {format_bytes(parts['per_sample'])}"
        sizes["samples"] = micro * int(parts["per_sample"])
    most = max(sizes.values(), default=0) or 1
    table = Table.grid(padding=(0, 2, 0, 0))
    widest = max((len(format_bytes(size)) for size in sizes.values()), default=0)
    table.add_column(style="dim", no_wrap=True, min_width=max(map(len, sizes), default=0))
    table.add_column(justify="right", style="bold", no_wrap=True, min_width=widest)
    table.add_column(max_width=20)  # gives way where there is little room
    table.add_column(overflow="fold")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        table.add_row(name, format_bytes(size), Bar(most, 0, size, color="cyan"), whys[name])
    return Group(Text("Memory by part", style="bold"), indented(table))


def _samples(plan: Mapping[str, Any]) -> int:
    """Samples of a step: the target, or all of an epoch that has fewer."""
    alone = plan.get("world_size", 1) == 1 and not plan.get("by_length") and plan.get("micro_batches")
    return sum(plan["micro_batches"]) if alone else int(plan["target_batch"])


def _sizes(plan: Mapping[str, Any]) -> str:
    return "micro-batches by length" if plan.get("by_length") else _sum(plan.get("micro_batches") or ())


def _sum(sizes: Sequence[int]) -> str:
    """(86, 85, 85) as "86 + 2 × 85"."""
    runs = [(size, len(list(group))) for size, group in groupby(sizes)]
    return " + ".join(str(size) if count == 1 else f"{count} × {size}" for size, count in runs) or "nothing"
