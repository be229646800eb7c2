"""The plot of a probe: written in any of its formats, without touching what the user has set up."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import autoaccum
from autoaccum.display.plots import probe_plot
from autoaccum.errors import MissingExtraError, SetupError

pytest.importorskip("matplotlib")

MIB = 2**20
REPORT = {
    "micro_batch": 8, "budget_bytes": 100 * MIB,
    "trials": [
        {"batch": 2, "peak_bytes": 20 * MIB, "outcome": "fits"},
        {"batch": 8, "peak_bytes": 80 * MIB, "outcome": "fits"},
        {"batch": 12, "peak_bytes": 120 * MIB, "outcome": "over budget"},
        {"batch": 16, "peak_bytes": None, "outcome": "out of memory"},
    ],
    "curve": [[batch, 10 * MIB * batch] for batch in range(1, 40)],
    "timeline": {"parts": ["parameters", "buffers", "optimizer_state"],
                 "bytes": [[5 * MIB] * 4, [0] * 4, [0, MIB, 2 * MIB, 60 * MIB]],
                 "phases": [["forward", 0], ["zero_grad", 3]]},
}  # fmt: skip


def texts(path):
    return Path(path).read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _text_in_svg(monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # letters, not their outlines


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_plot_is_written_in_the_format_of_its_suffix(tmp_path, suffix):
    probe_plot(REPORT, tmp_path / f"probe{suffix}")

    start = (tmp_path / f"probe{suffix}").read_bytes()[:8]
    assert {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix] in start


def test_a_plot_names_everything_in_it(tmp_path):
    probe_plot(REPORT, tmp_path / "probe.svg")

    for text in ("forecast", "measured", "did not fit", "budget 100.0 MiB", "micro-batch 8", "batch size",
                 "memory (MiB)", "One window at micro-batch 8", "optimizer state", "forward"):  # fmt: skip
        assert text in texts(tmp_path / "probe.svg"), text
    assert "buffers" not in texts(tmp_path / "probe.svg"), "a part that is empty throughout"


@pytest.mark.parametrize(
    ("changes", "there", "gone"),
    [
        ({"timeline": None}, "forecast", "One window"),
        ({"curve": []}, "measured", "forecast"),
        ({"trials": []}, "forecast", "measured"),
        ({"budget_bytes": 2**40}, "budget 1.0 TiB, far above", "budget 1.0 TiB<"),
    ],
)
def test_what_the_report_does_not_have_is_left_out(tmp_path, changes, there, gone):
    probe_plot({**REPORT, **changes}, tmp_path / "probe.svg")

    assert there in texts(tmp_path / "probe.svg")
    assert gone not in texts(tmp_path / "probe.svg")


@pytest.mark.parametrize("name", ["probe.xyz", "probe"])
def test_a_format_that_cannot_be_written_is_named_before_anything_is_drawn(tmp_path, name):
    with pytest.raises(SetupError, match=name):
        probe_plot(REPORT, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(MissingExtraError, match=r"autoaccum\[plots\]"):
        probe_plot(REPORT, tmp_path / "probe.png")


def test_matplotlib_is_imported_on_use_and_pyplot_never(tmp_path):
    code = (
        "import sys; from autoaccum.display.plots import probe_plot; before = 'matplotlib' in sys.modules; "
        "probe_plot({'micro_batch': 1, 'curve': [[1, 1], [2, 2]]}, 'a.png'); "
        "print(before, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(autoaccum.__file__).parents[1]), "MPLCONFIGDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )

    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("parts", [["gradients", "activations"], ["parameters", "activations", "gradients"]])
def test_a_part_has_the_same_colour_in_every_picture(tmp_path, parts):
    timeline = {"parts": parts, "bytes": [[MIB, 2 * MIB]] * len(parts), "phases": []}
    probe_plot({**REPORT, "curve": [], "timeline": timeline}, tmp_path / "probe.svg")
    drawn = re.findall(r"fill: (#[0-9a-f]{6})", texts(tmp_path / "probe.svg"))
    found = {"#56b4e9": "gradients", "#e69f00": "activations", "#0072b2": "parameters"}
    assert {found[colour] for colour in drawn if colour in found} == set(parts)


def test_parts_that_nobody_knows_have_colours_of_their_own(tmp_path):
    timeline = {"parts": ["parameters", "a", "b"], "bytes": [[MIB, MIB]] * 3, "phases": []}
    probe_plot({**REPORT, "curve": [], "timeline": timeline}, tmp_path / "probe.svg")
    assert {"#0072b2", "#44aa99", "#ddcc77"} <= set(re.findall(r"#[0-9a-f]{6}", texts(tmp_path / "probe.svg")))
