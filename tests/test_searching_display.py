"""The trials of a search as lines and as a table, from plain dicts."""

import io

import pytest
from rich.console import Console

from autoaccum.display.plots import search_plot
from autoaccum.display.search_table import TrialLines, table_of
from autoaccum.display.terminal import search_view


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


def test_each_trial_gets_one_line_when_it_ends():
    console, now, rows = Console(file=io.StringIO(), width=120), [0.0], ROWS[:2]
    lines = TrialLines(console, lambda: rows, 9, "optuna-dashboard x", clock=lambda: now[0])
    rows = ROWS
    lines.look()
    first = console.file.getvalue().splitlines()
    now[0] = 2.0
    for _ in range(2):
        lines.look()
    lines.close()
    found = console.file.getvalue().splitlines()

    assert [line.split()[1] for line in first[1:]] == ["0", "1"], "not looked at every moment"
    assert found[0] == "optuna-dashboard x"
    assert [line.split()[1] for line in found[1:]] == ["0", "1", "2", "3", "4", "5"]
    assert "complete      2 × 32          1.0 MiB     2.0 s  lr=0.01  target_batch=64" in found[1]


def test_on_a_terminal_the_trials_are_a_table_with_the_time_left():
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None, _environ={})
    lines = TrialLines(console, lambda: ROWS, 30, "optuna-dashboard x", workers=2)
    lines.close()
    text = console.file.getvalue()

    for word in ("6 of 30 trials, about 24 s left", "k × micro", "does not fit", "running", "optuna-dashboard x"):
        assert word in text


def test_the_cursor_comes_back_where_the_trials_can_no_longer_be_read():
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None, _environ={})
    rows = iter([ROWS])
    lines = TrialLines(console, lambda: next(rows), 30)
    with pytest.raises(StopIteration):
        lines.close()
    text = console.file.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_searchs_picture_has_history_importance_and_values_over_batch_and_rate(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    alone = {**RESULT, "importance": {}, "trials": [row(0, value=-0.7, params={})]}
    for name, result in {"all": RESULT, "alone": alone}.items():
        search_plot(result, tmp_path / f"{name}.svg")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        search_plot(RESULT, tmp_path / "words.svg")
    words = (tmp_path / "words.svg").read_text()
    for word in ("Best loss 0.2, trial 1", "best so far", "What mattered", "80%", "learning rate, before scaling"):
        assert word in words


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


def test_a_trial_that_failed_says_why_in_its_line():
    console = Console(file=io.StringIO(), width=60, force_terminal=False)
    rows = [row(0), row(1, "error", None, error={"type": "RuntimeError", "message": "no width of 5"})]
    TrialLines(console, lambda: rows, 2)
    first, second = console.file.getvalue().splitlines()
    assert "Error" not in first
    assert second.endswith("RuntimeError: no width of 5")
