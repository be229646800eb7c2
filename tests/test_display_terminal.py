"""What people see in a terminal: each figure and its reason, whatever signs the terminal has, whatever is missing."""

import io
from contextlib import closing
from types import SimpleNamespace

import pytest
from rich.console import Console

from autoaccum.display.chart import MemoryChart
from autoaccum.display.layout import on_curve, open_console
from autoaccum.display.narrator import TrainingProgress, trial_line
from autoaccum.display.terminal import (
    devices_view,
    fit_view,
    plan_view,
    probe_view,
    report_view,
    savers_view,
    search_view,
    verify_view,
)

MIB = 2**20
PLAN = {
    "target_batch": 256, "world_size": 1, "rank": 0, "micro_batch": 86, "accumulation_steps": 3,
    "micro_batches": [86, 85, 85], "lr": 0.4, "lr_scale": 4.0, "tail": "step",
    "reasons": {
        "lr": "0.4 = 0.1 × 4 (linear: κ = 256/64)",
        "micro_batch": "86: the largest of 3",
        "denominator": "samples [N, C] of the loss",
    },
}  # fmt: skip


def peak(batch):
    return max(420 * MIB + batch * MIB, 200 * MIB + 6 * MIB * batch)


def trial(batch, kind="trace", outcome="fits", peak_bytes=None):
    return {"batch": batch, "kind": kind, "peak_bytes": peak_bytes or peak(batch), "reserved_bytes": None,
            "seconds": 0.25, "outcome": outcome}  # fmt: skip


REPORT = {
    "micro_batch": 86, "limit": 113, "limit_reason": "at 114 the forecast is 884.0 MiB", "device": "cpu",
    "budget_bytes": 880 * MIB,
    "budget_reason": "880.0 MiB, as asked for [memory]", "trials": [trial(2), trial(4), trial(86, "verify")],
    "out_of_memory_count": 0, "residual": 0.0012, "notes": ["one shape varies"], "throughput": [[86, 1234.5]],
    "parts": {"parameters": 100 * MIB, "buffers": 0, "optimizer_state": 200 * MIB, "per_sample": 6 * MIB},
    "curve": [[batch, peak(batch)] for batch in range(1, 150)], "timeline": None,
}  # fmt: skip


def record(step, loss=0.5):
    return {"step": step, "epoch": 0, "loss": loss, "lr": 1e-3, "grad_norm": None, "samples": 256, "micro_batches": 3,
            "seconds": 0.5, "samples_per_second": 512.0, "peak_bytes": 700 * MIB, "noise_scale": None}  # fmt: skip


def drawn(view, width=100, encoding="utf-8", terminal=None):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    console = open_console(stream, width=width)
    console._force_terminal = terminal
    console.print(view)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


ALL = {
    "plan": plan_view(PLAN),
    "report": report_view(REPORT),
    "verify": verify_view({"ok": False, "verifiable": True, "relative_error": 0.67, "ratio": 3.0, "cause": "k",
                           "worst_parameter": "layer['0'].weight", "text": "3 × too large"}),
    "devices": devices_view({"devices": [{"device": "cuda:0", "type": "cuda", "name": "H100", "total": 80 * 2**30,
                                          "free": 70 * 2**30, "driver": "550", "note": "as CUDA says",
                                          "processes": [{"pid": 7, "name": "python", "bytes": None}]}]}),
    "fit": fit_view({"plan": PLAN, "probe": REPORT, "verify": None, "history": [record(1, 2.0), record(2)],
                     "evaluations": [{"epoch": 0, "step": 2, "loss": 0.4, "accuracy": 0.9}]}),
    "search": search_view({"best_params": {"lr": 0.1}, "best_value": 0.25, "best_plan": PLAN, "trials": [1, 2]}),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_every_view_can_be_drawn_on_any_stream_at_any_width(name, encoding, width):
    text = drawn(ALL[name], width, encoding)

    assert text.strip()
    if encoding == "utf-8":
        assert max(len(line) for line in text.splitlines()) <= width
    if encoding == "ascii":
        assert "?" not in text, "a usual sign is spelled out"


def test_a_plan_shows_every_reason_as_it_is():
    text = drawn(ALL["plan"])

    for reason in PLAN["reasons"].values():
        assert reason in text
    assert "256 samples a step = 86 + 2 × 85" in text
    assert "accumulation steps  3" in text, "a value without a reason is shown all the same"


def test_a_plan_of_one_rank_among_several_says_which():
    assert "over 2 ranks; rank 1 has 86 + 2 × 85" in drawn(plan_view({**PLAN, "world_size": 2, "rank": 1}))


def test_a_report_shows_answer_proof_budget_and_error():
    text = " ".join(drawn(ALL["report"]).split())

    for part in ("micro-batch 86 fits on cpu", "113", "at 114 the forecast is 884.0 MiB", "0.12%",
                 "budget 880.0 MiB as asked for [memory]", "one shape varies", "1,234.5 samples/s",
                 "none out of memory", "86 × 6.0 MiB", "optimizer state"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"limit": None}, "not looked for"),
        ({"trials": [], "parts": {}, "curve": [], "residual": None}, "880.0 MiB"),
        ({"trials": [{**trial(8), "peak_bytes": None, "outcome": "killed"}], "out_of_memory_count": 1}, "killed"),
        ({"curve": [[86, peak(86)]]}, "880.0 MiB"),
        ({"budget_bytes": 64 * 2**30}, "64.0 GiB, far above"),
    ],
)
def test_a_report_says_what_it_knows_and_leaves_out_what_it_does_not(changes, said):
    assert said in drawn(report_view({**REPORT, **changes}))


def test_the_chart_marks_budget_and_chosen_size_where_they_are():
    lines = drawn(MemoryChart(REPORT["curve"], budget=880 * MIB, chosen=86), 80, "ascii").splitlines()

    budget = next(index for index, line in enumerate(lines) if "880.0 MiB +" in line)
    chosen = next(index for index, line in enumerate(lines) if "#" in line)
    axis = next(line for line in lines if line.endswith("batch"))
    assert set(lines[budget].split("+")[1].strip()) == {"-", "*"}
    assert budget < chosen, "the chosen size lies below the budget"
    assert abs(lines[chosen].index("#") - axis.index("86")) <= 1


def test_the_chart_leaves_out_what_lies_far_above_the_budget():
    steep = [(batch, batch * 100 * MIB) for batch in range(1, 200)]

    axis = next(line for line in drawn(MemoryChart(steep, budget=880 * MIB), 80).splitlines() if "batch" in line)

    assert axis.split()[-2] == "14"


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"ok": True}, "passed"), ({"ok": False}, "failed"), ({"ok": False, "verifiable": False}, "not verifiable")],
)
def test_a_gradient_check_has_one_of_three_verdicts(changes, said):
    report = {"verifiable": True, "relative_error": None, "ratio": None, "cause": None, "worst_parameter": None,
              "text": "", **changes}  # fmt: skip

    assert f"Gradient check  {said}" in drawn(verify_view(report))


def test_a_training_shows_loss_speed_peak_and_evaluation():
    text = drawn(ALL["fit"])

    for part in ("Trained  2 steps", "2 at step 1", "512.0", "700.0 MiB  80% of the budget", "accuracy", "0.9"):
        assert part in text, part


def test_a_training_without_a_step_is_drawn():
    empty = {"plan": PLAN, "probe": None, "verify": None, "history": [], "evaluations": []}

    assert "Trained  0 steps" in drawn(fit_view(empty))


# --- what runs by ----------------------------------------------------------------------------------------------------


def test_savers_are_told_at_eighty_columns_without_what_none_of_them_has():
    timed = {"limit": 120, "micro_batch": 64, "peak_bytes": 900 * MIB, "window_seconds": 1.2, "same_result": True}
    rows = [
        {"saver": None, **timed, "throughput": [(64, 207.1)]},
        {"saver": "chunked_loss+checkpointing", **timed, "throughput": [(64, 157.1)]},
        {"saver": "checkpointing", "limit": None, "obstacle": "its traces do not line up", "same_result": True},
    ]
    text = drawn(savers_view(rows), 80)
    assert text.startswith("Memory savers, each with the plain step's result")
    assert "207.1 at 64; taken" in text
    assert "157.1 at 64; taken" not in text
    assert text.splitlines()[-1] == "checkpointing: its traces do not line up"
    lines = [line.split() for line in text.splitlines()]
    assert ["chunked_loss+checkpointing", "120", "64", "900.0", "MiB", "1.20", "s", "157.1", "at", "64"] in lines
    looked_at = [{"saver": "bf16", "limit": None, "peak_bytes": 3 * MIB, "same_result": False, "obstacle": "no"}]
    text = drawn(savers_view(looked_at, "bf16"), 80)
    assert text.startswith("Memory savers\n")
    assert [line.split() for line in text.splitlines()[1:3]] == [
        ["saver", "peak"], ["bf16", "3.0", "MiB", "no;", "another", "result"]
    ]  # fmt: skip


def buffer(terminal=False, width=120):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, markup=False, highlight=False)


def test_a_trial_is_one_line():
    console = buffer(width=20)
    console.print(trial_line(trial(86, "verify", "over budget", 900 * MIB)), soft_wrap=True)
    console.print(trial_line({**trial(90), "peak_bytes": None, "outcome": "killed"}), soft_wrap=True)

    first, second = console.file.getvalue().splitlines()
    assert " ".join(first.split()) == "verify batch 86 900.0 MiB 0.25 s over budget"
    assert " ".join(second.split()) == "trace batch 90 0.25 s killed"


def test_without_a_terminal_there_is_a_line_now_and_then_and_the_last_step():
    console, seconds = buffer(), iter(range(100))
    with closing(TrainingProgress(console, 25, 880 * MIB, clock=lambda: next(seconds))) as progress:
        for step in range(1, 26):
            progress.step(SimpleNamespace(**record(step)))

    lines = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "11/25", "21/25", "25/25"]
    assert "loss 0.5  lr 0.001  512 samples/s  700.0 MiB of 880.0 MiB" in lines[0]
    assert "\x1b" not in console.file.getvalue()


def test_without_a_number_of_steps_the_line_has_none():
    console = buffer()
    with closing(TrainingProgress(console, None)) as progress:
        progress.step(SimpleNamespace(**{**record(7), "peak_bytes": None, "loss": None}))

    assert console.file.getvalue() == "step 7  loss None  lr 0.001  512 samples/s\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_evaluations_stay_as_they_are_written(terminal):
    console = buffer(terminal)
    with closing(TrainingProgress(console, 2, clock=lambda: 0.0)) as progress:
        progress.step(SimpleNamespace(**record(1)))
        progress.evaluation({"loss": 0.123456, "accuracy": 0.9})
        progress.step(SimpleNamespace(**record(2)))

    assert "loss 0.1235  accuracy 0.9" in console.file.getvalue()
    assert "step 2/2" in console.file.getvalue()


def test_a_bar_stays_on_one_line_of_a_narrow_terminal():
    console = buffer(terminal=True, width=60)
    with closing(TrainingProgress(console, 1000, 880 * MIB)) as progress:
        progress.step(SimpleNamespace(**record(1)))

    shown = console.file.getvalue().split("step 1/1000")[-1]
    assert shown.count("\n") == 1, "its end"


def test_trials_of_chosen_lengths_say_so_and_only_those_of_the_longest_are_on_the_curve():
    trials = [
        {"batch": 4, "length": 20, "kind": "trace", "peak_bytes": 10, "seconds": 0.1, "outcome": "fits"},
        {"batch": 4, "length": 80, "kind": "trace", "peak_bytes": 30, "seconds": 0.1, "outcome": "fits"},
    ]
    assert [trial["length"] for trial in on_curve(trials)] == [80]
    assert on_curve([{"batch": 1}, {"batch": 2}]) == [{"batch": 1}, {"batch": 2}]


def test_a_plan_over_lengths_shows_no_sizes_that_no_window_need_have():
    shown = drawn(plan_view({**PLAN, "by_length": [[30, 64], [300, 1]]}))
    assert "256 samples a step = micro-batches by length" in shown


def test_what_fits_how_has_a_row_for_each_way_and_the_first_clause_of_what_is_against_it():
    rows = [
        {"way": "replicated", "fits": False, "taken": False, "limits": None, "peak_bytes": [3 * MIB, None],
         "why_not": "not even one sample fits in 2.0 MiB (as asked): and so on"},
        {"way": "sharded", "fits": True, "taken": True, "limits": [9, 4], "peak_bytes": [MIB, 2 * MIB],
         "why_not": None},
        {"way": "sharded with checkpointing", "fits": True, "taken": False, "limits": [8, 8], "peak_bytes": [MIB, MIB],
         "why_not": None},
    ]  # fmt: skip
    shown = drawn(probe_view({**REPORT, "ways": rows})).splitlines()
    first, second, third = shown[-3:]
    assert first.split("  ")[-1].strip() == "not even one sample fits in 2.0 MiB"
    assert "4 to 9" in second
    assert "was run" in second
    assert "1.0 MiB to 2.0 MiB" in second
    assert third.rstrip().endswith("forecast only")
    assert " to " not in third


def test_a_training_over_lengths_says_what_cutting_by_length_gave():
    lengths = {"tokens": 900, "tokens_per_second": 450.0, "padding": 0.1, "padding_unsorted": 0.5,
               "micro_batches": {"3": 2, "10": 1}}  # fmt: skip
    shown = drawn(fit_view({"history": [{"step": 1, "loss": 1.0, "lr": 0.1, "seconds": 2.0}], "lengths": lengths}))
    assert "450" in shown
    assert "10.0%" in shown
    assert "3 to 10" in shown


@pytest.mark.parametrize("width", [40, 50, 80])
def test_figures_stay_whole_in_a_narrow_terminal_and_bars_give_way(width):
    report = {**REPORT, "parts": {"parameters": 227 * MIB, "optimizer_state": 454 * MIB, "per_sample": 3 * MIB}}
    shown = drawn(report_view(report), width=width)
    assert "…" not in shown
    for figure in ("227.0 MiB", "454.0 MiB", "optimizer state", *(f"{t['seconds']:.2f} s" for t in report["trials"])):
        assert figure in shown, figure
    assert all(len(line) <= width for line in shown.splitlines())
    bars = [line.count("█") for line in shown.splitlines() if "454.0 MiB" in line]
    assert bars == [20] if width == 80 else bars[0] < 20
