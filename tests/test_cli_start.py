"""What the command line costs before it does anything: --help and the arithmetic import no torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import autoaccum

RUN = """
import sys
sys.argv = ["autoaccum", *sys.argv[1:]]
from autoaccum.__main__ import main
try:
    main()
except SystemExit as end:
    code = end.code
heavy = {"torch", "numpy", "matplotlib", "optuna", "pynvml"} & {name.split(".")[0] for name in sys.modules}
print("heavy:", *sorted(heavy), file=sys.stderr)
sys.exit(code)
"""


def run(*words, cwd, **environment):
    root = str(Path(autoaccum.__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", RUN, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", ["", "probe", "plan", "fit", "verify", "search", "devices"])
def test_help_imports_no_torch(command, tmp_path):
    done = run(*command.split(), "--help", cwd=tmp_path)

    assert done.returncode == 0
    assert done.stdout.startswith("Usage: autoaccum")
    assert done.stderr.split("heavy:")[-1].strip() == ""


def test_plan_imports_no_torch_and_prints_only_the_plan(tmp_path):
    done = run("plan", "--limit", "100", "--target-batch", "256", cwd=tmp_path)

    assert done.returncode == 0
    assert "86 + 2 × 85" in done.stdout
    assert done.stderr.strip() == "heavy:"


def test_a_result_with_signs_that_ascii_lacks_is_spelled_out(tmp_path):
    done = run(
        *["plan", "--limit", "100", "--target-batch", "256", "--lr", "0.1", "--lr-batch", "64", "--optimizer", "sgd"],
        cwd=tmp_path,
        PYTHONIOENCODING="ascii",
    )

    assert done.returncode == 0, done.stderr
    assert "86 + 2 x 85" in done.stdout
    assert done.stdout.isascii()


def test_a_wrong_option_is_a_usage_error_that_points_to_the_help(tmp_path):
    done = run("plan", "--limit", "0", "--target-batch", "8", cwd=tmp_path)

    assert done.returncode == 2
    assert done.stdout == ""
    assert "--help" in done.stderr
    assert "--limit" in done.stderr


def test_nothing_is_coloured_where_no_color_is_set(tmp_path):
    words = ["plan", "--limit", "100", "--target-batch", "256"]

    coloured = run(*words, cwd=tmp_path, FORCE_COLOR="1", TERM="xterm-256color").stdout
    plain = run(*words, cwd=tmp_path, FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1").stdout

    assert "\x1b[1;32m" in coloured  # bold green
    assert "32m" not in plain
