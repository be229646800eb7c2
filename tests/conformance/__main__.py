"""Runs the conformance tests: `python -m tests.conformance [--table] [--trainers autoaccum,ignite] [pytest options]`.

--table writes table.json and table.md beside this file, with the versions of what was measured; with --merge the
figures that were not measured this time stay as they stand there.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.table import TableWriter

HERE = Path(__file__).parent


def main() -> int:
    """pytest on this folder, with the table's writer."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description="The conformance tests.")
    parser.add_argument("--table", action="store_true", help="write table.json and table.md")
    parser.add_argument("--merge", action="store_true", help="keep what stands there and is not measured now")
    parser.add_argument("--folder", type=Path, default=HERE, help="where they are written")
    parser.add_argument("--trainers", help="only these, by name, separated by commas")
    known, rest = parser.parse_known_args()
    plugins: list[Any] = [TableWriter(known.folder if known.table else None, merge=known.merge)]
    if known.trainers:
        plugins.append(Only(known.trainers.split(",")))
    paths = [] if any(Path(part.split("::")[0]).exists() for part in rest) else [str(HERE)]
    return int(pytest.main([*paths, *rest], plugins=plugins))


class Only:
    """A pytest plugin that leaves other trainers out."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        of_trainers = [item for item in items if "trainer" in getattr(item, "fixturenames", ())]
        items[:] = [item for item in of_trainers if item.callspec.params["trainer"].name in self._names]


if __name__ == "__main__":
    sys.exit(main())
