"""How things are timed here: interleaved, so that a machine that slows down slows both alike; medians; as JSON."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(
    things: dict[str, Callable[[], Any]], *, times: int, warm: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each thing by a clock, `times` each, in turn."""
    for _ in range(warm):
        for thing in things.values():
            thing()
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for turn in range(times):
        names = list(things) if turn % 2 == 0 else list(reversed(things))
        for name in names:
            started = clock()
            things[name]()
            seconds[name].append(clock() - started)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }


def write(name: str, values: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **values}, indent=2) + "\n", encoding="utf-8")
    return path


def merged(name: str, rows: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """The rows measured before, with those measured now in place of theirs: a long benchmark can run piece by piece."""
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    made = {tuple(row[key] for key in keys): row for row in [*before, *rows]}
    return list(made.values())


def table(headings: list[str], rows: list[list[Any]]) -> str:
    """Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
