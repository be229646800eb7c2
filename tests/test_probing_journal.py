"""A hard kill costs one trial and teaches the next run."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.errors import ProbeError, SetupError
from autoaccum.probing.isolate import Killed, run_in_child
from autoaccum.probing.journal import Journal


def die_in_a_trial(path, size):
    """A process of its own starts a trial and is killed in it."""
    code = f"""
        import os, signal
        from pathlib import Path
        from autoaccum.probing.journal import Journal
        Journal(Path({str(path)!r}), "key").start({size}, "verify")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL


def test_one_kill_is_chance_two_mean_that_it_does_not_fit(tmp_path):
    path = tmp_path / "trials.journal"
    die_in_a_trial(path, 64)
    journal = Journal(path, "key")
    assert journal.unfinished() == [(64, "verify")]
    assert journal.killed_sizes() == set()
    die_in_a_trial(path, 64)
    assert journal.killed_sizes() == {64}
    assert Journal(path, "another key").killed_sizes() == set()


def test_a_trial_of_a_live_process_is_left_alone(tmp_path):
    journal = Journal(tmp_path / "trials.journal", "key")
    journal.start(64, "verify")
    assert Journal(tmp_path / "trials.journal", "key").unfinished() == []
    journal.end(64, "fits")
    journal.clear()
    assert not (tmp_path / "trials.journal").exists()


def test_damaged_lines_are_passed_over(tmp_path):
    path = tmp_path / "trials.journal"
    die_in_a_trial(path, 8)
    with path.open("a") as file:
        file.write('{"key": "key", "pid"\n')  # as a kill leaves it
    assert Journal(path, "key").unfinished() == [(8, "verify")]
    path.write_text("nonsense\nmore nonsense\n")
    with pytest.warns(UserWarning, match="2 lines of the trial journal"):
        assert Journal(path, "key").unfinished() == []


def test_a_journal_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file" / "trials.journal", "key")
    with pytest.warns(UserWarning, match="cannot be written"):
        journal.start(1, "trace")
    journal.end(1, "fits")


class Killer(nn.Module):
    """Kills its process above 40 samples, as the kernel does for memory."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(20, 5)

    def forward(self, x):
        if x.shape[0] > 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layer(x)


def killer_setup():
    torch.manual_seed(0)
    data = torch.randn(300, 20), torch.randint(0, 5, (300,))
    return {"model": Killer(), "data": data, "loss": nn.CrossEntropyLoss(), "device": "cpu"}


def test_a_killed_child_costs_its_trial_and_the_probe_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path))
    heard = []
    report = autoaccum.probe(
        **killer_setup(), target_batch=80, isolate=killer_setup, callbacks=[lambda event: heard.append(event.to_dict())]
    )
    assert report.micro_batch <= 60
    assert sum(report.plan.micro_batches) == 80
    killed = [trial.batch for trial in report.trials if trial.outcome == "killed"]
    assert killed.count(80) >= 2
    assert report.out_of_memory_count == len(killed)
    assert {event["trial"]["outcome"] for event in heard} == {"fits", "killed"}
    assert not list(tmp_path.glob("*.journal"))
    assert report.forecast(10) > 0


def failing(send, value):
    send("note", value)
    if value == "ours":
        raise SetupError("as it is")
    if value == "foreign":
        raise ZeroDivisionError("mine")
    if value == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"value": value}


def test_what_a_child_says_comes_back():
    heard = []
    assert run_in_child(failing, ("fine",), lambda *said: heard.append(said)) == {"value": "fine"}
    assert heard == [("note", "fine")]
    with pytest.raises(SetupError, match="as it is"):
        run_in_child(failing, ("ours",))
    with pytest.raises(ProbeError, match="ZeroDivisionError: mine"):
        run_in_child(failing, ("foreign",))
    with pytest.raises(Killed, match="SIGKILL"):
        run_in_child(failing, ("killed",))


def test_the_journal_is_on_disk_before_the_trial_begins(tmp_path):
    path = tmp_path / "trials.journal"
    Journal(path, "key").start(3, "trace")
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["event"] == "start"
