"""TARGET: found, called and checked, with every mistake named."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import autoaccum
from autoaccum.cli.command import exit_code, one_line
from autoaccum.cli.target import Target
from autoaccum.errors import SetupError

BUILD = """
def build():
    return {"model": "a model", "data": [1, 2], "lr": 0.1}

def fails():
    rate = 1 / 0
    return rate

def needs(trial):
    return {"model": trial, "data": []}

class Sets:
    @staticmethod
    def small():
        return {"model": "small", "data": []}

RATE = 0.1
LIST = lambda: [1, 2]
NOTHING = lambda: None
TYPO = lambda: {"modle": 1, "data": []}
EMPTY = lambda: {}
NO_DATA = lambda: {"model": 1, "lr": 1}
"""


def fit(model, data, *, target_batch=None, lr=1e-3, memory=None):
    """Stands for the library's: TARGET's keys are checked against its keywords."""


@pytest.fixture(autouse=True)
def _library(monkeypatch):
    monkeypatch.setitem(vars(autoaccum), "fit", fit)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A file train.py in the current folder; what is imported from it is forgotten afterwards."""
    (tmp_path / "train.py").write_text(BUILD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        # Only these: torch, which is loaded on the way, cannot be loaded a second time.
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def refused(text, *args):
    with pytest.raises(SetupError) as error:
        Target.parse(text)(*args)
    assert exit_code(error.value) == 2
    return str(error.value)


@pytest.mark.parametrize("text", ["train.py:build", "./train.py:build", "train:build"])
def test_a_function_is_found_in_a_file_and_in_a_module_of_the_current_folder(train, text):
    assert Target.parse(text)() == {"model": "a model", "data": [1, 2], "lr": 0.1}


def test_a_name_with_dots_leads_into_a_class(train):
    assert Target.parse("train.py:Sets.small")()["model"] == "small"


def test_what_is_given_on_the_command_line_wins_over_the_dict(train):
    assert Target.parse("train.py:build", {"lr": 0.5, "target_batch": 8})() == {
        "model": "a model",
        "data": [1, 2],
        "lr": 0.5,
        "target_batch": 8,
    }


def test_a_search_passes_its_trial_on(train):
    assert Target.parse("train.py:needs")("the trial")["model"] == "the trial"


def test_a_file_may_import_its_neighbours(train, monkeypatch, tmp_path_factory):
    (train / "helpers_of_train.py").write_text("NAME = 'neighbour'")
    (train / "uses.py").write_text("import helpers_of_train as h\nbuild = lambda: {'model': h.NAME, 'data': []}")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))

    assert Target.parse(f"{train / 'uses.py'}:build")()["model"] == "neighbour"


@pytest.mark.parametrize("name", ["json.py", "my-train.py", "my.train.py", "01_first.py"])
def test_a_file_is_found_whatever_it_is_called(train, name):
    (train / name).write_text(BUILD)

    assert Target.parse(f"{name}:build")()["model"] == "a model"
    assert sys.modules["json"].__name__ == "json"
    assert hasattr(sys.modules["json"], "dumps")


def test_a_file_is_run_once_however_often_it_is_called(train):
    (train / "counts.py").write_text("runs = []\nbuild = lambda: runs.append(1) or {'model': runs, 'data': []}")
    target = Target.parse("counts.py:build")
    target()

    assert len(target()["model"]) == 2


def test_a_child_in_another_folder_loads_the_same_function(train, tmp_path_factory):
    target = pickle.dumps(Target.parse("train.py:build", {"lr": 0.5}))
    child = "import pickle, sys; t = pickle.load(sys.stdin.buffer); print(t.load()()['model'], t.overrides['lr'])"
    done = subprocess.run(
        [sys.executable, "-c", child],
        input=target,
        capture_output=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={"PYTHONPATH": str(Path(autoaccum.__file__).parents[1])},
        timeout=60,
        check=False,
    )

    assert done.stdout.decode().strip() == "a model 0.5", done.stderr


@pytest.mark.parametrize("text", ["train.py", ":build", "train.py:", "build"])
def test_a_text_of_another_form_says_which_form_it_should_have(train, text):
    message = refused(text)

    assert repr(text) in message
    assert "train.py:build" in message


def test_a_missing_file_names_the_one_that_was_probably_meant(train):
    message = refused("trian.py:build")

    assert str(train / "trian.py") in message
    assert "did you mean 'train.py'?" in message


def test_a_file_of_a_package_that_imports_relative_to_it_is_told_how_to_be_named(tmp_path, monkeypatch):
    folder = tmp_path / "relating"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "sizes.py").write_text("N = 2")
    (folder / "jobs.py").write_text("from .sizes import N\ndef build():\n    return {'model': N, 'data': []}")
    with pytest.raises(SetupError, match=r"write it as a module from above its package, such as relating\.jobs:build"):
        Target.parse(f"{folder / 'jobs.py'}:build").load()
    monkeypatch.chdir(tmp_path)
    assert Target.parse("relating.jobs:build")() == {"model": 2, "data": []}


def test_a_missing_module_is_told_from_one_that_fails_to_import_another(train):
    (train / "imports.py").write_text("import no_such_package_anywhere\n")

    assert "no module named 'trian'" in refused("trian:build")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_anywhere"):
        Target.parse("imports:build")()


def test_a_missing_name_names_the_one_that_was_probably_meant(train):
    message = refused("train.py:biuld")

    assert "'biuld'" in message
    assert "did you mean 'build'?" in message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("RATE", "is 0.1, which cannot be called"),
        ("LIST", "returned list, but must return a dict"),
        ("NOTHING", "returned NoneType, but must return a dict"),
        ("TYPO", "unknown key 'modle': did you mean 'model'?"),
        ("EMPTY", "without 'model', only with nothing"),
        ("NO_DATA", "without 'data', only with 'model', 'lr'"),
        ("needs", "is called with no arguments"),
    ],
)
def test_what_is_wrong_with_the_function_or_its_dict_is_named(train, name, said):
    message = refused(f"train.py:{name}")

    assert f"'train.py:{name}'" in message
    assert said in message


def test_an_error_in_the_users_code_is_one_line_with_the_place(train):
    with pytest.raises(ZeroDivisionError) as error:
        Target.parse("train.py:fails")()

    line = one_line(error.value)

    assert line.startswith("ZeroDivisionError: division by zero (train.py, line 6, in fails)")
    assert exit_code(error.value) == 1


def test_an_error_deep_in_a_library_points_to_the_line_that_led_there(train):
    (train / "deep.py").write_text("import json\n\ndef build():\n    return json.loads('{')\n")
    with pytest.raises(ValueError) as error:
        Target.parse("deep.py:build")()

    assert "(deep.py, line 4, in build)" in one_line(error.value)


def test_a_file_that_python_cannot_read_points_to_its_line(train):
    (train / "broken.py").write_text("def build(:\n")
    with pytest.raises(SyntaxError) as error:
        Target.parse("broken.py:build")()

    assert "(broken.py, line 1)" in one_line(error.value)


def test_a_file_that_failed_half_way_is_not_taken_for_loaded(train):
    (train / "half.way.py").write_text("build = lambda: {'model': 1, 'data': []}\n1 / 0\n")

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            Target.parse("half.way.py:build")()


def test_a_script_that_ends_the_program_by_itself_is_told_so(train):
    (train / "script.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(SystemExit) as error:
        Target.parse("script.py:build")()

    assert "(script.py, line 2, in <module>)" in one_line(error.value)
    assert "__main__" in one_line(error.value)
    assert exit_code(error.value) == 1


def test_the_error_of_a_loaders_worker_is_found_at_the_end_of_its_traceback():
    text = (
        "Caught ValueError in worker 0.\nOriginal Traceback (most recent call last):\n  File x\nValueError: bad sample"
    )

    assert "bad sample" in one_line(ValueError(text))
