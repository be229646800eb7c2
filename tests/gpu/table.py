"""The rows of `make gpu` as a table for tests/benchmarks/README.md: `python -m tests.gpu.table FILE`."""

import json
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import table

HEAD = [
    "model", "memory", "found", "forecast ÷ measured − 1: requested, reserved", "windows of 2, of 4", "without a retry",
    "without an error", "errors in the probe",
]  # fmt: skip


def main(path: str) -> int:
    models: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "model" in row:
            key = (row["model"], row["precision"], row["memory"])
            models[key] = {**models.get(key, {}), **row}
    print(table(HEAD, [_cells(row) for row in models.values()]))
    return 0


def _cells(row: dict[str, Any]) -> list[str]:
    errors = [row.get(f"{what}_error") for what in ("requested", "reserved")]
    results = [row["windows"][count]["result"] for count in ("2", "4")]
    return [
        f"{row['model']}, {row['precision']}",
        row["memory"],
        str(row["found"]),
        ", ".join("none" if error is None else f"{error:+.2%}" for error in errors),
        ", ".join(found if isinstance(found, str) else f"{found} retries" for found in results),
        str(row.get("largest_without_a_retry", "not looked for")),
        str(row.get("largest_without_an_error", "not looked for")),
        str(row["out_of_memory"]),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
