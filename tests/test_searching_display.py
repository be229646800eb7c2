"""The live table and the picture of a search, from plain dicts."""

import io
from contextlib import closing

import pytest
from rich.console import Console

from autoaccum.display.search_plots import search_plot
from autoaccum.display.search_table import SearchTable, table_of
from autoaccum.display.terminal import search_view
from autoaccum.errors import SetupError


def row(number, state="complete", value=0.5, **more):
    return {
        "number": number, "state": state, "value": value, "params": {"lr": 0.01 * (number + 1), "target_batch": 64},
        "samples": 900, "seconds": 2.0, "target_batch": 64, "accumulation_steps": 2, "micro_batch": 32, "lr": 0.01,
        "memory_bytes": 2**20, "repeats": None, "error": None, "reports": [[900, value]], **more,
    }  # fmt: skip


ROWS = [
    row(0, value=0.7), row(1, value=0.2), row(2, "pruned", 0.9), row(3, "does not fit", None, memory_bytes=None),
    row(4, "error", None), row(5, "diverged", None), row(6, "running", 0.6, seconds=None),
]  # fmt: skip
RESULT = {
    "best_params": {"lr": 0.02, "target_batch": 64}, "best_value": 0.2, "best_number": 1, "best_plan": None,
    "metric": "loss", "direction": "minimize", "unit": "samples", "importance": {"lr": 0.8, "target_batch": 0.2},
    "weights": "run/trial-1.pt", "dashboard": "optuna-dashboard run/journal.log", "trials": ROWS,
}  # fmt: skip


def drawn(renderable, width=160):
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def test_the_table_has_parameters_value_state_sizes_and_memory():
    text = drawn(table_of(ROWS, best=1))

    for word in ("lr", "target batch", "k × micro", "0.2", "does not fit", "2 × 32", "1.0 MiB", "2.0 s"):
        assert word in text


def test_without_a_terminal_each_trial_gets_one_line_when_it_ends():
    console = Console(file=io.StringIO(), width=120)
    with closing(SearchTable(console, 10, "minimize", note="optuna-dashboard x")) as table:
        table.show(ROWS[:2])
        table.show(ROWS)
        table.show(ROWS)
    lines = console.file.getvalue().splitlines()

    assert lines[0] == "optuna-dashboard x"
    assert [line.split()[1] for line in lines[1:]] == ["0", "1", "2", "3", "4", "5"]


def test_on_a_terminal_the_table_is_redrawn_with_the_time_left():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    now = [0.0]
    with closing(SearchTable(console, 16, "minimize", workers=2, clock=lambda: now[0])) as table:
        table.show(ROWS)
        assert not table.is_due()
        now[0] = 0.6
        assert table.is_due()
    text = console.file.getvalue()

    assert "6 of 16 trials" in text
    assert "about 10 s left" in text


def test_a_long_search_shows_the_running_the_best_and_the_newest():
    rows = [row(n, value=1.0 if n != 3 else 0.1) for n in range(60)] + [row(60, "running")]
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with closing(SearchTable(console, 100, "minimize")) as table:
        shown = [each["number"] for each in table._chosen(rows)]

    assert shown[0] == 3
    assert shown[-2:] == [59, 60]
    assert len(shown) == 16


def test_the_result_names_the_best_its_weights_and_what_to_look_at():
    text = drawn(search_view(RESULT))

    for word in (
        "best loss 0.2 of 7 trials",
        "80% of the difference",
        "run/trial-1.pt",
        "optuna-dashboard",
        "1 pruned",
    ):
        assert word in text


@pytest.mark.parametrize("change", [
    {}, {"importance": {}}, {"direction": "maximize"}, {"trials": ROWS[:1]},
    {"trials": [row(0, params={"width": 3})], "best_number": 0}, {"trials": [row(n, value=0.5) for n in range(3)]},
])  # fmt: skip
def test_the_picture_is_drawn_for_any_search(tmp_path, change):
    search_plot({**RESULT, **change}, tmp_path / "search.png")

    assert (tmp_path / "search.png").stat().st_size > 5000
    with pytest.raises(SetupError, match="no plot can be written"):
        search_plot(RESULT, tmp_path / "search.docx")


def test_a_trial_that_failed_says_why_in_its_line():
    console = Console(file=io.StringIO(), width=60, force_terminal=False)
    with closing(SearchTable(console, 3, "minimize")) as table:
        table.show([row(0), row(1, "error", None, error={"type": "RuntimeError", "message": "no width of 5"})])
    first, second = console.file.getvalue().splitlines()
    assert "Error" not in first
    assert second.endswith("RuntimeError: no width of 5")
