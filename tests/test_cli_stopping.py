"""`autoaccum fit` and signals: the window is finished and saved, the exit code says what it was, all goes on again."""

import json
import signal
import sys
import time

import pytest

from tests.warm import Command

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

TARGET = """
import time
import torch
from torch import nn

class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.01)
        return super().forward(x)

def build():
    torch.manual_seed(0)
    return {"model": Slow(6, 3), "data": (torch.randn(64, 6), torch.arange(64) % 3), "loss": nn.CrossEntropyLoss(),
            "target_batch": 16, "micro_batch": 4, "max_steps": 30, "check": False, "seed": 0, "device": "cpu"}

def hanging():
    return {**build(), "model": Hangs(6, 3)}

class Hangs(nn.Linear):
    def forward(self, x):
        if self.training:
            time.sleep(60)
        return super().forward(x)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.py").write_text(TARGET)
    return tmp_path


def start(folder, *words, target="train.py:build"):
    return Command("-m", "autoaccum", "fit", target, *words, cwd=folder)


def wait_for(path, text):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.02)
    raise TimeoutError(f"{text} does not come up in {path}")


def test_sigterm_finishes_the_window_saves_and_ends_with_143_and_the_same_command_goes_on(folder):
    words = ["--checkpoint", "run", "--checkpoint-every", "1", "--json"]
    process = start(folder, *words)
    wait_for(folder / "run" / "metrics.jsonl", '"checkpoint"')
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert out == ""
    assert "SIGTERM: the window is finished and saved first" in err
    assert "The same command goes on from what is saved in 'run'" in err

    again = start(folder, *words)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    steps = [record["step"] for record in json.loads(out)["history"]]
    assert steps == list(range(1, 31))
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    first, second = [line["resumed_at"] for line in lines if line["event"] == "start"]
    assert (first, 0 < second < 30) == (0, True)


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once_with_130(folder):
    process = start(folder, "--checkpoint", "run", target="train.py:hanging")
    wait_for(folder / "run" / "metrics.jsonl", '"start"')
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.returncode is None, "it waits for the end of the window"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Ended by Ctrl-C" in err


@pytest.mark.slow
def test_without_a_folder_a_signal_ends_at_once_since_there_is_nothing_to_save(folder):
    process = start(folder, target="train.py:hanging")
    wait_for(process.stderr, "target")
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == ""


@pytest.mark.slow
def test_what_could_not_be_saved_makes_the_exit_code_5(folder):
    (folder / "file").write_text("")
    process = start(folder, "--checkpoint", "file/run", "--json", "--max-steps", "2")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 5, err
    assert "Not a directory" in json.loads(out)["unsaved"]
    assert "Error: 2 of 2 saves to 'file/run' failed" in err
    assert "Traceback" not in err
