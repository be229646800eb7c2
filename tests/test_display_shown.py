"""`print(result)` and a notebook's cell show what the command line shows."""

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.display.layout import open_console
from autoaccum.display.terminal import fit_view, plan_view, probe_view, search_view, verify_view
from autoaccum.searching.search_result import SearchResult

DATA = torch.randn(24, 6), torch.randint(0, 4, (24,))
KEYS = ("target_batch", "accumulation_steps", "micro_batch", "lr", "memory_bytes", "error", "repeats")
SETTINGS = {"loss": nn.CrossEntropyLoss(), "device": "cpu"}


@pytest.fixture(scope="module")
def results():
    probe = autoaccum.probe(nn.Linear(6, 4), DATA, target_batch=8, cache=False, **SETTINGS)
    fitted = autoaccum.fit(nn.Linear(6, 4), DATA, target_batch=8, micro_batch=4, **SETTINGS)
    rows = (
        {
            **dict.fromkeys(KEYS),
            "reports": [],
            "number": 0,
            "state": "complete",
            "value": 0.5,
            "params": {"lr": 0.1},
            "samples": 24,
            "seconds": 1.0,
        },
    )
    search = SearchResult({"lr": 0.1}, 0.5, fitted.plan, rows, None)
    return {
        "plan": (fitted.plan, plan_view, fitted.plan.to_dict()),
        "probe": (probe, probe_view, {**probe.plan.to_dict(), **probe.to_dict()}),
        "fit": (fitted, fit_view, fitted.to_dict()),
        "verify": (fitted.verify, verify_view, fitted.verify.to_dict()),
        "search": (search, search_view, search.to_dict()),
    }


@pytest.mark.parametrize("name", ["plan", "probe", "fit", "verify", "search"])
def test_a_printed_result_is_what_the_command_line_draws(results, name, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "90")
    result, view, values = results[name]
    with (tmp_path / "drawn").open("w+", encoding="utf-8") as file:
        open_console(file, width=90).print(view(values))
        file.seek(0)
        drawn = [line.rstrip() for line in file.read().splitlines()]
    assert str(result).splitlines() == drawn
    assert len(drawn) > 2
    assert repr(result).startswith(type(result).__name__)


@pytest.mark.parametrize("name", ["plan", "probe", "fit", "verify", "search"])
def test_a_notebooks_cell_shows_the_same_words(results, name):
    result, _, _ = results[name]
    page = result._repr_html_()
    assert page.startswith("<pre")
    first = str(result).split()[0]
    assert first in page
    assert "<script" not in page


def test_what_stands_in_a_result_is_no_markup_of_the_page():
    plan = autoaccum.plan(8, 20, reasons={"note": "<b>bold</b> [red]"})
    assert "<b>" not in plan._repr_html_()
    assert "[red]" in str(plan)


@pytest.mark.parametrize(("progress", "told"), [(True, True), (False, False), (None, False)])
def test_a_probe_tells_each_trial_as_it_ends_where_that_is_asked(progress, told, capsys):
    report = autoaccum.probe(nn.Linear(6, 4), DATA, target_batch=8, cache=False, progress=progress, **SETTINGS)
    lines = [line for line in capsys.readouterr().err.splitlines() if "fits" in line]
    assert len(lines) == (len(report.trials) if told else 0)
