"""`autoaccum probe` works in a child process: what comes out is the same as without one, also where a kill takes it."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

import psutil
import pytest
from click.testing import CliRunner

from autoaccum.cli.main import cli
from tests import warm

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

TARGET = """
import os, signal, sys, time
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, most=None):
        super().__init__(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 5))
        self.most = most

    def forward(self, x):
        if self.most is not None and len(x) >= self.most:
            os.abort()
        return super().forward(x)

def build(most=None, **more):
    print("the user's own words")
    os.write(1, b"from below Python\\n")
    torch.manual_seed(0)
    data = torch.randn(400, 20), torch.arange(400) % 5
    return {"model": Net(most), "data": data, "loss": nn.CrossEntropyLoss(), "device": "cpu", **more}

def padded(samples):
    return nn.utils.rnn.pad_sequence(samples, batch_first=True)

class Reader(nn.Linear):
    def forward(self, x):
        return super().forward(x).square().mean()

def lengths():
    samples = [torch.randn(1 + number % 9, 6) for number in range(60)]
    data = torch.utils.data.DataLoader(samples, batch_size=4, collate_fn=padded)
    return {"model": Reader(6, 40), "data": data, "device": "cpu"}

def aborts():
    return build(most=30)

def dies():
    os.kill(os.getpid(), signal.SIGKILL)

def fails():
    raise ValueError("my own\\nmistake")

def ends():
    sys.exit("enough")

def interrupted():
    raise KeyboardInterrupt

class Hangs(nn.Linear):
    def forward(self, x):
        with open("child.pid", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)

def hangs():
    return {**build(), "model": Hangs(20, 5)}

class Where(Net):
    def forward(self, x):
        with open("where", "w") as file:
            file.write(str(os.getppid()))
        return super().forward(x)

def here():
    return {**build(), "model": Where(), "isolate": False}

def there():
    return {**build(), "model": Where()}

def square(number):
    return number * number

def has_children():
    import multiprocessing
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.map(square, [1, 2])
    return build()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's train.py in the current folder, and a cache of its own."""
    (tmp_path / "train.py").write_text(TARGET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("train", None)


def command(*words):
    return [sys.executable, "-m", "autoaccum", "probe", *words]


def in_a_child(*words):
    return warm.run(*command(*words)[1:])


def here(*words):
    done = CliRunner().invoke(cli, ["probe", "--no-isolate", *words], prog_name="autoaccum")
    return done.exit_code, done.stdout, done.stderr


def told(text):
    """What was printed, without times and what is written below Python, which a runner in the process does not see."""
    return re.sub(r" +[0-9.]+ s\b", " # s", text).replace("from below Python\n", "")


def values(text):
    found = json.loads(text)
    for trial in found["trials"]:
        trial["seconds"] = None
    return found


ASKED = ("--target-batch", "64", "--memory", "1MiB", "--no-cache")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("train.py:build", *ASKED, "--for", "RTX 4090", "--plot", "probe.svg", "--save-plan", "plan.json"),
        ("train.py:lengths", "--target-batch", "8", "--memory", "200KiB", "--no-cache"),
    ],
)
def test_a_probe_in_a_child_answers_as_one_in_the_process(folder, words):
    code, out, err = in_a_child(*words, "--json")
    expected = here(*words, "--json")
    assert (code, expected[0]) == (0, 0), err
    assert values(out) == values(expected[1])
    assert told(err) == told(expected[2])
    assert values(out)["timeline"]
    assert values(out)["trials"]


@pytest.mark.slow
def test_a_probe_in_a_child_prints_the_same_for_people_and_writes_nothing_else_to_stdout(folder):
    code, out, err = in_a_child("train.py:build", *ASKED)
    assert code == 0, err
    assert told(out) == told(here("train.py:build", *ASKED)[1])
    assert "from below Python" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("train.py:build", "--memory", "4KiB", "--no-cache"), 3),
        (("train.py:build", "--device", "cuda:99"), 4),
        (("train.py:build", "--optimizer", "nonsense"), 2),
        (("train.py:nothing",), 2),
        (("train.py:fails",), 1),
        (("train.py:ends",), 1),
        (("train.py:interrupted",), 130),
    ],
)
def test_what_fails_in_a_child_fails_as_in_the_process(folder, words, code):
    found, out, err = in_a_child(*words)
    expected = here(*words)
    assert (found, out, told(err)) == (expected[0], expected[1], told(expected[2]))
    assert found == code
    assert not list((folder / "cache").glob("*.journal"))


@pytest.mark.slow
def test_debug_shows_the_childs_traceback(folder):
    code, _, err = in_a_child("train.py:fails", "--debug")
    assert code == 1
    assert err.count("Traceback (most recent call last)") == 1
    assert 'raise ValueError("my own' in err
    assert err.splitlines()[-1].startswith("Error: ValueError: my own (train.py, line ")


@pytest.mark.slow
def test_a_model_that_aborts_from_a_size_on_ends_with_an_answer_in_one_run(folder):
    code, out, err = in_a_child("train.py:aborts", "--no-cache", "--json", "--max-batch", "60")
    assert code == 0, err
    found = values(out)
    assert 28 <= found["micro_batch"] <= 29
    killed = [trial["batch"] for trial in found["trials"] if trial["outcome"] == "killed"]
    assert min(killed) >= 30
    assert max(map(killed.count, killed)) == 2, "once more at that size"
    assert found["out_of_memory_count"] == len(killed)
    assert err.count("killed") == len(killed), "each is told once"
    assert any("killed its process more than once" in note for note in found["notes"])
    assert not list((folder / "cache").glob("*.journal"))


def test_a_child_that_is_killed_outside_of_a_trial_is_an_error_that_says_so(folder):
    code, out, err = in_a_child("train.py:dies")
    assert (code, out) == (1, "")
    assert "ended outside of any trial: SIGKILL" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "child"),
    [
        (("train.py:here",), False),  # TARGET's own key counts where the command line does not say
        (("train.py:here", "--isolate"), True),
        (("train.py:there", "--no-isolate"), False),
    ],
)
def test_the_command_line_then_targets_key_then_a_child(folder, words, child):
    process = subprocess.Popen(command(*words, "--max-batch", "4"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    parent = int((folder / "where").read_text())
    assert (parent == process.pid) is child


@pytest.mark.slow
def test_the_users_code_may_have_children_of_its_own(folder):
    code, _, err = in_a_child("train.py:has_children", *ASKED)
    assert code == 0, err


@pytest.mark.slow
def test_the_parent_does_not_load_what_the_child_needs(folder):
    script = """
        import sys
        from autoaccum.cli.main import cli
        if __name__ == "__main__":
            try:
                cli(["probe", "train.py:build", "--max-batch", "4", "--json"], prog_name="autoaccum")
            finally:
                print("torch" in sys.modules, "train" in sys.modules, file=sys.stderr)
    """
    (folder / "run.py").write_text(textwrap.dedent(script))
    done = subprocess.run([sys.executable, "run.py"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "False False"


def hanging(folder):
    """(the command, its child in a trial that does not end)."""
    listening = """
        import signal
        from autoaccum.__main__ import main
        if __name__ == "__main__":
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which is off where the tests run in background
            main()
    """
    (folder / "run.py").write_text(textwrap.dedent(listening))
    words = [sys.executable, "run.py", "probe", "train.py:hangs"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    path, deadline = folder / "child.pid", time.monotonic() + 120
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, psutil.Process(int(path.read_text()))


def wait_until_gone(child):
    """A child without its parent may stay a zombie where nobody takes it over."""
    deadline = time.monotonic() + 60
    with suppress(psutil.NoSuchProcess):
        while child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [False, True])
def test_ctrl_c_ends_both_with_130_and_no_traceback(folder, whole_group):
    process, child = hanging(folder)
    if whole_group:  # as a terminal sends it
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in err
    wait_until_gone(child)
    assert not list((folder / "cache").iterdir()), "an interrupt is no kill: nothing is left to learn from"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_in_silence_with_its_parent(folder, number):
    process, child = hanging(folder)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)  # until the child, which holds the pipe as well, has closed it
    assert process.returncode == -number
    wait_until_gone(child)
    assert sorted(err.splitlines()) == ["from below Python", "the user's own words"]
    assert not list((folder / "cache").iterdir()), "its trial killed nothing"
