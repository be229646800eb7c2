"""A room imports only from rooms that stand above it in the house's list; read from the imports themselves."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import autoaccum

PACKAGE = Path(autoaccum.__file__).parent

# From the ground up: each may import from those before it. Files of one room may import each other.
ROOMS = [
    "errors", "units", "files", "checks", "settings", "interrupts", "random_state", "display", "planning", "ranks",
    "memory", "data", "batch_norm", "model", "loss", "window", "checking", "probing", "training", "session",
    "searching", "integrations", "api", "cli", "__main__",
]  # fmt: skip


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The file's syntax tree; each file is read once for all tests."""
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(module: str) -> str | None:
    """The room that a module name such as "autoaccum.loss.mean" stands in; None outside the package."""
    parts = module.split(".")
    if parts[0] != "autoaccum" or len(parts) == 1:
        return None
    return parts[1]


def imports(path: Path) -> set[str]:
    """Every module of the package that the file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "autoaccum")
    return {name for name in found if name.split(".")[0] == "autoaccum"}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_above_it(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in ROOMS, f"{own} is not in the house's list"
    for name in imports(path):
        other = room_of(name)
        if other in (None, own, "__version__"):
            continue
        if other not in ROOMS:  # a public name, loaded lazily: only the command line uses the package from outside
            assert own in ("cli", "integrations"), f"{path} imports the public name {other}"
            continue
        assert ROOMS.index(other) < ROOMS.index(own), f"{own} imports from {other}, which stands below it"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_says_what_it_is_for_and_stays_readable(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(parsed(path)), "no word on what the file is for"
    assert text.count("\n") <= 500


def test_planning_loads_no_torch():
    code = "import sys, autoaccum; autoaccum.plan(10, 25); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_one_file_imports_pynvml():
    users = [path.name for path in PACKAGE.rglob("*.py") if "import pynvml" in path.read_text(encoding="utf-8")]
    assert users == ["nvml.py"]


def test_numpy_is_not_imported():
    for path in PACKAGE.rglob("*.py"):
        tree = parsed(path)
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not any((name or "").split(".")[0] == "numpy" for name in names | modules), path
