"""A hard kill costs one trial and teaches the next run."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.errors import NothingFitsError, ProbeError, SetupError
from autoaccum.probing import journal
from autoaccum.probing.child_process import Killed, run_in_child
from autoaccum.probing.journal import Journal, Owner, journal_path

pytestmark = pytest.mark.usefixtures("spawns_warm")

HERE = Owner.here()._asdict()
GONE = {**HERE, "pid": 2**30, "started": 1.0}


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
    assert journal.unfinished() == [(64, "verify", None)]
    assert journal.least_killed() > 10**6
    die_in_a_trial(path, 64)
    assert journal.least_killed() == 64
    assert Journal(path, "another key").least_killed() > 10**6


def test_a_trial_of_a_live_process_is_left_alone(tmp_path):
    journal = Journal(tmp_path / "trials.journal", "key")
    journal.start(64, "verify")
    assert Journal(tmp_path / "trials.journal", "key").unfinished() == []
    journal.end(64, "fits")
    journal.close(answered=True)
    assert not (tmp_path / "trials.journal").exists()


def test_what_is_killed_once_at_two_sizes_is_killed_twice_at_the_larger(tmp_path):
    path = tmp_path / "trials.journal"
    die_in_a_trial(path, 64)
    die_in_a_trial(path, 32)
    assert Journal(path, "key").least_killed() == 64


def test_kills_of_chosen_lengths_count_for_longer_ones_alone(tmp_path):
    path = tmp_path / "trials.journal"
    gone = {**GONE, "key": "key", "event": "start", "size": 4, "kind": "verify", "length": 100}
    path.write_text("".join(json.dumps({**gone, "started": started}) + "\n" for started in (1.0, 2.0)))
    journal = Journal(path, "key")
    killed = [journal.least_killed(length) == 4 for length in (None, 99, 100, 101)]
    assert killed == [False, False, True, True]


def test_a_trial_that_an_error_or_the_user_stopped_is_no_kill(tmp_path):
    path = tmp_path / "trials.journal"
    for error in (RuntimeError, KeyboardInterrupt):
        journal = Journal(path, "key")
        with pytest.raises(error), journal.probing(closes=True):
            journal.start(64, "verify")
            raise error
        assert not path.exists(), "there is nothing in it to learn from"
    die_in_a_trial(path, 64)
    with pytest.raises(RuntimeError), journal.probing(closes=True):
        journal.start(64, "verify")
        raise RuntimeError
    assert journal.begun() is None
    assert journal.unfinished() == [(64, "verify", None)]


@pytest.mark.parametrize("error", [None, NothingFitsError])
def test_an_answer_takes_the_file_away_unless_the_parent_will(tmp_path, error):
    path = tmp_path / "trials.journal"
    for closes in (False, True):
        journal = Journal(path, "key")
        with nullcontext() if error is None else pytest.raises(error), journal.probing(closes=closes):
            journal.start(64, "verify")
            journal.end(64, "fits")
            if error is not None:
                raise error
        assert path.exists() is not closes


def test_the_largest_that_lived_is_of_samples_whose_length_was_not_chosen(tmp_path):
    journal = Journal(tmp_path / "trials.journal", "key")
    for size, length, outcome in ((4, None, "fits"), (8, 20, "fits"), (16, None, "out of memory"), (32, None, "fits")):
        journal.start(size, "verify", length)
        journal.end(size, outcome, length)
    assert (journal.lived(33), journal.lived(32), journal.lived(4)) == (32, 4, 0)


def test_trials_in_another_machine_or_container_are_in_a_file_of_their_own(tmp_path, monkeypatch):
    """Nothing is known of their processes from here, neither that they live nor that they were killed."""
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path))
    here = journal_path("key")
    assert here == journal_path("key")
    elsewhere = Owner.here()._replace(namespace="pid:[1]")[2:]
    monkeypatch.setattr(journal, "_surroundings", lambda pid: elsewhere)
    there = journal_path("key")
    assert here != there
    assert here.parent == there.parent == tmp_path


def test_the_journal_is_not_written_through_a_link_and_is_its_owners_alone(tmp_path):
    theirs, link = tmp_path / "theirs", tmp_path / "link.journal"
    theirs.write_text("")
    link.symlink_to(theirs)
    with pytest.warns(UserWarning, match="symbolic link"):
        Journal(link, "key").start(3, "trace")
    assert theirs.read_text() == ""
    Journal(tmp_path / "new" / "trials.journal", "key").start(3, "trace")
    assert (tmp_path / "new" / "trials.journal").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


SOUND = {**GONE, "key": "key", "event": "start", "size": 8, "kind": "verify"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"pid": "x"}, {"pid": [1]}, {"pid": -5}, {"pid": 2**70}, {"pid": True}, {"started": None}, {"started": "now"},
        {"started": float("nan")}, {"started": 10**400}, {"size": "a"}, {"size": 0}, {"size": 1.5}, {"kind": 3},
        {"host": 3}, {"boot": None}, {"namespace": []}, {"length": "long"}, {"length": -1}, {"event": "other"},
        {"event": []},
    ],
)  # fmt: skip
def test_lines_that_are_json_and_still_wrong_are_passed_over_with_a_warning(tmp_path, wrong):
    path = tmp_path / "trials.journal"
    path.write_text(json.dumps({**SOUND, **wrong}) + "\n" + json.dumps(SOUND) + "\n")
    with pytest.warns(UserWarning, match=f"1 line of the trial journal {re.escape(str(path))} cannot be used"):
        assert Journal(path, "key").unfinished() == [(8, "verify", None)]
    with pytest.warns(UserWarning, match=r"1 line of"):
        Journal(path, "key").close(answered=True)


def test_damaged_lines_are_passed_over(tmp_path):
    path = tmp_path / "trials.journal"
    die_in_a_trial(path, 8)
    with path.open("a") as file:
        file.write('{"key": "key", "pid"\n')  # as a kill leaves it
    assert Journal(path, "key").unfinished() == [(8, "verify", None)]
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_killed_child_teaches_the_next_one_also_where_no_answer_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path))
    report = autoaccum.probe(**killer_setup(), target_batch=80, max_batch=80, isolate=killer_setup, cache=False)
    assert report.micro_batch == 40
    assert [trial.batch for trial in report.trials if trial.outcome == "killed"] == [80, 80]
    assert not list(tmp_path.iterdir())


class Stays(nn.Linear):
    """Notes when it is moved."""

    moved = ()

    def to(self, *args, **kwargs):
        self.moved = (*self.moved, args)
        return super().to(*args, **kwargs)


def staying_setup():
    return {**killer_setup(), "model": Stays(20, 5)}


@pytest.mark.slow
def test_the_model_is_not_moved_to_the_device_before_the_child_has_answered():
    given = staying_setup()
    moved = []
    asked = {"target_batch": 8, "cache": False, "isolate": staying_setup}
    asked["callbacks"] = [lambda _: moved.append(given["model"].moved)]
    autoaccum.probe(**given, **asked)
    assert given["model"].moved == ()
    loop = autoaccum.prepare(**given, **asked)
    assert set(moved) == {()}
    assert given["model"].moved == ((torch.device("cpu"),),)
    assert loop.probe.timeline["parts"], "what the child told of a window is still there to be drawn"


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
    with pytest.raises(ProbeError, match="^the probe's child process failed: ZeroDivisionError: mine$") as raised:
        run_in_child(failing, ("foreign",))
    assert "in failing" in str(raised.value.__cause__), "the child's traceback"
    with pytest.raises(Killed, match="SIGKILL"):
        run_in_child(failing, ("killed",))


def leaving_a_child(send, how):
    child = os.fork()
    if child == 0:  # has both of its parent's pipes, as a Manager's server has
        time.sleep(250)
        os._exit(0)
    send("note", child)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return how


def test_a_child_is_missed_although_its_own_children_hold_its_pipe():
    left = []
    try:
        with pytest.raises(Killed, match="SIGKILL"):
            run_in_child(leaving_a_child, ("killed",), lambda name, child: left.append(child))
        assert run_in_child(leaving_a_child, ("lives",), lambda name, child: left.append(child)) == "lives"
    finally:
        for child in left:
            os.kill(child, signal.SIGKILL)  # which fails where it was waited for until its end
    assert len(left) == 2


def test_the_journal_is_on_disk_before_the_trial_begins(tmp_path):
    path = tmp_path / "trials.journal"
    Journal(path, "key").start(3, "trace")
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["event"] == "start"
