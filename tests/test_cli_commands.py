"""The commands: what they pass on, what they print where, and what they end with.

The library behind them is stood in for by functions that take the same keywords: these tests are about the commands.
"""

import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import autoaccum
from autoaccum.cli.main import cli
from autoaccum.errors import DeviceError, LossError, NothingFitsError, PlanError
from autoaccum.planning.plan import Plan, plan
from tests import warm

BUILD = """
def build():
    print("the user's own words")
    return {"model": "a model", "data": [1, 2], "lr": 0.1, "epochs": 3}

def build_with_target():
    return {**build(), "target_batch": 64}

def fails():
    raise ValueError("my own\\nmistake")

def tries(trial):
    return {"model": trial, "data": []}
"""
TRIAL = {"batch": 2, "kind": "trace", "peak_bytes": 2**20, "reserved_bytes": None, "seconds": 0.1, "outcome": "fits"}


@dataclass
class Report:
    """Stands for a ProbeReport."""

    plan: Plan | None = None

    def to_dict(self):
        return {"micro_batch": 86, "limit": 112, "limit_reason": "", "budget_bytes": 2**30, "device": "cpu",
                "budget_reason": "asked", "trials": [TRIAL], "out_of_memory_count": 0, "residual": math.nan,
                "parts": {}, "curve": [], "timeline": None}  # fmt: skip

    def plot(self, path):
        Path(path).write_text("a plot")


class Result:
    """Stands for a FitResult."""

    model = SimpleNamespace(state_dict=lambda: {"weight": 1.0})
    plan = plan(100, 256)
    unsaved = None

    def to_dict(self):
        return {"plan": self.plan.to_dict(), "probe": None, "verify": None, "history": [], "evaluations": []}


class Library:
    """The functions the commands call; `calls` has what they were called with, `error` is raised if there is one."""

    def __init__(self):
        self.calls = []
        self.error = None
        self.verdict = {"ok": True, "verifiable": True}

    def _called(self, name, arguments):
        self.calls.append((name, {key: value for key, value in arguments.items() if key != "self"}))
        if self.error is not None:
            raise self.error

    def probe(self, model, data, *, target_batch=None, lr=None, memory=None, isolate=False, callbacks=()):
        self._called("probe", locals())
        for listen in callbacks:
            listen(SimpleNamespace(name="trial", to_dict=lambda: {"trial": TRIAL}))
        return Report(plan(100, target_batch) if target_batch else None)

    def fit(self, model, data, *, target_batch=None, lr=1e-3, epochs=1, check=True, memory=None, plan=None,
            progress=None, isolate=False):  # fmt: skip
        self._called("fit", locals())
        os.write(1, b"from below Python\n") if sys.stdout is sys.__stderr__ else print("from within")
        return Result()

    def verify(self, model, data, *, precision="auto"):
        self._called("verify", locals())
        values = {
            "relative_error": 0.5,
            "ratio": 3.0,
            "cause": "k",
            "worst_parameter": "w",
            "text": "3 times",
            **self.verdict,
        }
        return SimpleNamespace(to_dict=lambda: values, **values)

    def search(self, setup, *, n_trials, workers=1, storage=None, study_name=None, target_batch=(64,), progress=None,
               budget=None, space=None, sampler=None, pruner="once", trust_storage=False):  # fmt: skip
        self._called("search", locals())
        values = {"best_params": {"lr": 0.1}, "best_value": 0.5, "best_plan": None, "trials": []}
        return SimpleNamespace(
            to_dict=lambda: values, save=lambda path: Path(path).write_text("{}"), plot=lambda path: None
        )


@pytest.fixture
def library(monkeypatch, tmp_path):
    """The stand-ins in the library's place, and the user's train.py in the current folder."""
    library = Library()
    for name in ("probe", "fit", "verify", "search"):
        monkeypatch.setitem(vars(autoaccum), name, getattr(library, name))
    (tmp_path / "train.py").write_text(BUILD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield library
    sys.modules.pop("train", None)


def run(*words):
    """The command, in this process: a child would not find the stand-ins."""
    if words[0] == "probe":
        words = ("probe", "--no-isolate", *words[1:])
    return CliRunner().invoke(cli, words, prog_name="autoaccum")


# --- what is passed on -----------------------------------------------------------------------------------------------


def test_only_what_was_given_is_passed_on_and_wins_over_the_dict(library):
    done = run("fit", "train.py:build", "--target-batch", "256", "--lr", "0.5", "--check=warn")

    assert done.exit_code == 0, done.stderr
    assert library.calls == [
        ("fit", {"model": "a model", "data": [1, 2], "target_batch": 256, "lr": 0.5, "epochs": 3, "check": "warn",
                 "memory": None, "plan": None, "progress": True, "isolate": False}),
    ]  # fmt: skip


@pytest.mark.parametrize("card", ["Nonsense", ""])
def test_an_unknown_card_is_refused_before_anything_is_run(library, card):
    done = run("probe", "train.py:build", "--for", "RTX 4090", "--for", card)

    assert done.exit_code == 2
    assert f'--for "{card}": no such card is known' in done.stderr
    assert library.calls == []
    assert "the user's own words" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "value"),
    [(["--check"], True), (["--no-check"], False), (["--check=warn"], "warn"), ([], True), (["--check=no"], False)],
)
def test_check_stands_alone_or_has_a_word(library, words, value):
    done = run("fit", *words, "train.py:build_with_target")

    assert done.exit_code == 0, done.stderr
    assert library.calls[0][1]["check"] is value or library.calls[0][1]["check"] == value


def test_probe_gets_only_those_of_fits_arguments_that_it_takes(library):
    done = run("probe", "train.py:build")

    assert done.exit_code == 0, done.stderr
    assert library.calls[0][1]["lr"] == 0.1
    assert "epochs" not in library.calls[0][1]


def test_trials_in_a_child_get_the_target_itself(library):
    done = run("fit", "train.py:build_with_target", "--isolate", "--memory", "80%")

    factory = library.calls[0][1]["isolate"]
    assert done.exit_code == 0, done.stderr
    assert factory()["memory"] == "80%"


def test_a_search_gets_the_function_that_takes_a_trial(library):
    done = run("search", "train.py:tries", "--n-trials", "4", "--study-name", "s", "--memory", "8GiB")

    (name, arguments), setup = library.calls[0], library.calls[0][1]["setup"]
    assert done.exit_code == 0, done.stderr
    assert (name, arguments["n_trials"], arguments["study_name"], arguments["workers"]) == ("search", 4, "s", 1)
    assert setup("a trial") == {"model": "a trial", "data": [], "memory": "8GiB"}


def test_a_search_gets_the_space_and_the_batches_to_choose_from(library):
    words = ["search", "train.py:tries", "--n-trials", "4"]
    done = run(*words, "--space", "lr=1e-4:1e-1:log", "--space", "layers=2:6", "--space", "trial=0,1e-4")
    assert done.exit_code == 0, done.stderr
    assert library.calls[-1][1]["space"] == {"lr": (1e-4, 1e-1, "log"), "layers": (2, 6), "trial": [0, 1e-4]}

    done = run(*words, "--space", "lr=1e-4,1e-3", "--target-batch", "64", "--target-batch", "128")
    assert done.exit_code == 0, done.stderr
    assert library.calls[-1][1]["space"] == {"lr": [1e-4, 1e-3]}
    assert library.calls[-1][1]["target_batch"] == (64, 128), "which the library adds to the space"


def test_a_search_gets_optunas_own_sampler_and_pruner_by_their_names(library):
    words = ["search", "train.py:tries", "--n-trials", "4"]
    done = run(*words, "--sampler", "random", "--pruner", "MedianPruner", "--trust-storage")
    assert done.exit_code == 0, done.stderr
    kinds = [type(library.calls[-1][1][name]).__name__ for name in ("sampler", "pruner")]
    assert kinds == ["RandomSampler", "MedianPruner"]
    assert library.calls[-1][1]["trust_storage"] is True

    done = run(*words, "--sampler", "tpe", "--pruner", "none")
    assert [library.calls[-1][1][name] for name in ("sampler", "pruner", "trust_storage")] == ["tpe", "none", False]
    for wrong, why in (("best", "is not known: choose .*random"), ("grid", "needs settings of its own")):
        done = run(*words, "--sampler", wrong)
        assert done.exit_code == 2
        assert re.search(f"--sampler {wrong}: {why}", " ".join(done.stderr.split()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--space", "lr"], "'lr' is neither a range nor choices: write NAME=LOW:HIGH"),
        (["--space", "lr=2:1"], "empty range: 2 is not below 1"),
        (["--space", "lr=1,2", "--space", "lr=3"], "is given twice"),
        (["--space", "target_batch=32,64", "--target-batch", "8"], "say the same: leave one out"),
    ],
)
def test_a_space_that_cannot_be_read_is_a_usage_error(library, words, said):
    done = run("search", "train.py:tries", "--n-trials", "4", *words)

    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert not library.calls


def test_without_optuna_a_space_is_no_usage_error_and_the_extra_is_named(library, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = run("search", "train.py:tries", "--n-trials", "4", "--space", "lr=1,2")

    assert done.exit_code == 1
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert 'pip install "autoaccum[search]"' in done.stderr


# --- what is printed -------------------------------------------------------------------------------------------------


def test_a_probe_with_a_target_prints_the_reports_keys_and_the_plans_in_one_object(library):
    done = run("probe", "train.py:build", "--target-batch", "256", "--json")

    values = json.loads(done.stdout)
    assert values["schema"] == 1
    assert (values["limit"], values["device"]) == (112, "cpu")
    assert (values["target_batch"], values["accumulation_steps"]) == (256, 3)
    assert values["residual"] is None, "JSON has no NaN"


def test_a_probe_without_a_target_prints_the_report_alone(library):
    values = json.loads(run("probe", "train.py:build", "--json").stdout)

    assert values == {**Report().to_dict(), "residual": None, "schema": 1}


def test_stdout_has_the_result_alone_and_stderr_the_trials_and_the_users_words(library):
    done = run("probe", "train.py:build", "--target-batch", "256", "--json")

    assert len(done.stdout.splitlines()) == 1
    assert "the user's own words" in done.stderr
    assert "trace" in done.stderr


def test_no_progress_keeps_stderr_quiet(library):
    assert "trace" not in run("probe", "train.py:build", "--no-progress").stderr


def test_a_probes_result_for_people_has_report_and_plan(library):
    done = run("probe", "train.py:build_with_target")

    assert "micro-batch 86 fits on cpu" in done.stdout
    assert "64 samples a step" in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())


@pytest.mark.parametrize("command", ["fit", "verify", "search"])
def test_every_command_prints_one_json_object(library, command):
    target = "train.py:tries" if command == "search" else "train.py:build_with_target"
    done = run(command, target, "--json", *(["--n-trials", "1"] if command == "search" else []))

    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == 1


def test_devices_are_listed(library):
    values = json.loads(run("devices", "--json").stdout)

    assert values["schema"] == 1
    assert "cpu" in [device["device"] for device in values["devices"]]
    assert "cpu" in run("devices").stdout


@pytest.mark.slow
def test_what_is_written_below_python_does_not_reach_stdout(tmp_path):
    (tmp_path / "train.py").write_text(BUILD)
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_cli_commands as here
library = here.Library()
for name in ("probe", "fit"):
    vars(here.autoaccum)[name] = getattr(library, name)
here.cli(["fit", "train.py:build_with_target", "--json"], prog_name="autoaccum")
"""
    _, out, err = warm.run("-c", script, cwd=tmp_path)

    assert json.loads(out)["schema"] == 1
    assert "from below Python" in err


def test_only_the_first_of_several_ranks_speaks(library, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    done = run("fit", "train.py:build_with_target", "--json", "--save", "weights.pt")

    assert (done.exit_code, done.stdout) == (0, "")
    assert library.calls[0][1]["progress"] is False
    assert not Path("weights.pt").exists()


# --- what it ends with -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LossError("the gradient is 3 times too large"), 1),
        (RuntimeError("shapes"), 1),
        (PlanError("no such target"), 2),
        (NothingFitsError("not even 1"), 3),
        (DeviceError("no cuda:7"), 4),
        (KeyboardInterrupt(), 130),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_an_error_is_one_line_on_stderr_and_its_code(library, error, code, flags):
    library.error = error
    done = run("fit", "train.py:build_with_target", *flags)

    lines = [line for line in done.stderr.splitlines() if line != "the user's own words"]
    assert done.exit_code == code
    assert done.stdout == ""
    assert len(lines) == 1
    assert str(error) in lines[0]


def test_an_error_of_the_users_code_has_its_place_and_debug_the_traceback(library):
    plain, debug = run("probe", "train.py:fails"), run("probe", "train.py:fails", "--debug")

    assert plain.exit_code == debug.exit_code == 1
    assert plain.stderr.splitlines() == [
        "Error: ValueError: my own (train.py, line 10, in fails); --debug shows the traceback"
    ]
    assert "Traceback (most recent call last)" in debug.stderr
    assert plain.stdout == debug.stdout == ""


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "trian.py:build", "--target-batch", "8"],  # no such file
        ["fit", "train.py:build"],  # no target batch anywhere
        ["fit", "train.py:build", "--target-batch", "0"],
        ["fit", "train.py:build", "--target-batch", "8", "--memory", "much"],
        ["fit", "train.py:build", "--target-batch", "8", "--memory", "120%"],
        ["fit", "train.py:build", "--target-batch", "8", "--plan", "no-such-plan.json"],
        ["fit", "train.py:build", "--target-batch", "8", "--save", "no-such-folder/weights.pt"],
        ["fit", "train.py:build", "--target-batch", "8", "--tail", "drop"],  # this stand-in takes no tail
        ["probe", "train.py:build", "--save-plan", "plan.json"],  # a plan needs a target
        ["probe"],
        ["plan", "--limit", "8"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_ends_with_2_before_anything_is_run(library, words):
    done = run(*words)

    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr
    assert library.calls == []


def test_a_failed_gradient_check_ends_with_1_and_prints_its_report(library):
    library.verdict = {"ok": False, "verifiable": True}
    done = run("verify", "train.py:build", "--json")

    assert done.exit_code == 1
    assert json.loads(done.stdout)["cause"] == "k"


def test_a_gradient_that_cannot_be_checked_ends_with_0_and_says_so(library):
    library.verdict = {"ok": False, "verifiable": False}
    done = run("verify", "train.py:build")

    assert done.exit_code == 0
    assert "not verifiable" in done.stdout


# --- what is saved ---------------------------------------------------------------------------------------------------


def test_plan_plot_and_weights_are_saved_where_asked(library):
    import torch

    probe = run("probe", "train.py:build_with_target", "--save-plan", "plan.json", "--plot", "plot.png")
    fit = run("fit", "train.py:build", "--plan", "plan.json", "--save", "weights.pt")

    assert (probe.exit_code, fit.exit_code) == (0, 0), probe.stderr + fit.stderr
    assert Plan.load("plan.json").target_batch == 64
    assert Path("plot.png").exists()
    assert library.calls[1][1]["plan"] == "plan.json"
    assert torch.load("weights.pt", weights_only=True) == {"weight": 1.0}
    assert sorted(path.name for path in Path().glob("*weights*")) == ["weights.pt"]


@pytest.mark.parametrize("command", ["probe", "search"])
def test_a_picture_of_no_known_kind_is_refused_before_the_work(library, command):
    trials = ["--n-trials", "3"] if command == "search" else []
    done = run(command, "train.py:build", *trials, "--plot", "plot.xyz")

    assert done.exit_code == 2
    assert "'plot.xyz': no plot can be written as 'xyz': end the name in .png, .svg or .pdf" in done.stderr
    assert not library.calls


def test_a_training_that_cannot_be_saved_ends_with_5_and_prints_its_result(library, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    done = run("fit", "train.py:build_with_target", "--save", "weights.pt", "--json")

    assert done.exit_code == 5
    assert json.loads(done.stdout)["schema"] == 1
    assert "the weights could not be saved to 'weights.pt'" in done.stderr
    assert list(Path().glob("*weights*")) + list(Path().glob(".*weights*")) == []


def test_several_limits_are_of_as_many_ranks():
    done = run("plan", "--limit", "100", "--limit", "50", "--target-batch", "256", "--json")
    assert done.exit_code == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["world_size"], made["limits"]) == (2, [100, 50])


@pytest.mark.parametrize(
    "target",
    [
        "..x:f",
        ".:f",
        "a b:c",
        "1:f",
        "a..b:c",
        "x" * 9000 + ":f",
        "x\0y.py:f",
        "/:f",
        "t.py:build:",
        "t.py:build()",
        ":",
    ],
)
def test_a_target_that_cannot_be_named_so_is_a_usage_error_in_one_short_line(target):
    done = run("verify", "--", target)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert len(done.stderr) < 600
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("columns", ["0", "1", "20", "wide", ""])
def test_a_terminal_that_says_it_has_no_columns_is_written_to_all_the_same(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    done = run("plan", "--limit", "8", "--target-batch", "20")
    assert done.exit_code == 0
    assert "7 + 7 + 6" in done.stdout or "2 × 7 + 6" in done.stdout
    assert "exactly as asked" in " ".join(done.stdout.split())


def test_a_plan_of_more_micro_batches_than_can_be_listed_is_refused_at_once():
    done = run("plan", "--limit", "1", "--target-batch", "100000000")
    assert done.exit_code == 2
    assert "lower the target batch to 1048576" in done.stderr


def test_a_plan_is_printed_in_another_trainers_words_alone():
    done = run("plan", "--limit", "100", "--target-batch", "256", "--as", "axolotl")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-2:] == ["micro_batch_size: 64", "gradient_accumulation_steps: 4"]
    assert all(line.startswith("# ") for line in done.stdout.splitlines()[:-2])
    assert run("plan", "--limit", "8", "--target-batch", "8", "--as", "keras").exit_code == 2
