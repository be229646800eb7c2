"""Where studies are kept: each kind of storage for real, and what is said where one cannot be used."""

import contextlib
import errno
import itertools
import json
import os
import random
import socket
import sqlite3
import subprocess
import sys
import time
import warnings
from pathlib import Path

import optuna
import pytest
import torch

import autoaccum
from autoaccum.errors import AutoaccumError, SetupError
from autoaccum.probing.journal import Owner
from autoaccum.searching import study as studies
from autoaccum.searching.storage import dashboard_line, open_storage, place_of
from autoaccum.searching.study import OWNER, Ledger, signed, sweep
from tests.search_setups import plain

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def search(tmp_path, storage, n_trials=3, **keywords):
    keywords = {"target_batch": (8, 16), "folder": tmp_path / "run", "study_name": "s", **keywords}
    return autoaccum.search(plain, n_trials=n_trials, storage=storage, **keywords)


@contextlib.contextmanager
def grpc_proxy(storage):
    """A server in this process, as `optuna.storages.run_grpc_proxy_server` starts one; gives its address."""
    server = pytest.importorskip("optuna.storages._grpc.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = server.make_server(storage, "127.0.0.1", port)
    running.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        running.stop(grace=None)


@pytest.mark.parametrize("kind", ["journal", "path", "sqlite", "object"])
def test_a_search_goes_on_in_every_kind_of_storage(tmp_path, kind):
    storage = {
        "journal": None, "path": str(tmp_path / "study.log"), "sqlite": f"sqlite:///{tmp_path}/study.db",
        "object": optuna.storages.InMemoryStorage(),
    }[kind]  # fmt: skip
    search(tmp_path, storage, 2)
    result = search(tmp_path, storage, 4)

    assert [row["number"] for row in result.trials] == [0, 1, 2, 3]
    assert len(result.study.trials) == 4


@pytest.mark.slow
def test_a_search_goes_on_behind_a_grpc_proxy(tmp_path):
    pytest.importorskip("grpc")
    with grpc_proxy(optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/study.db")) as address:
        search(tmp_path, address, 2)
        result = search(tmp_path, address, 3)

    assert len(result.trials) == 3
    assert result.dashboard is None


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("nosuch://host/x", r"cannot be used \(NoSuchModuleError: .*nosuch\).*a path for a journal file"),
        ("{folder}", r"cannot be used \(IsADirectoryError: "),
        ("{folder}/none/study.log", r"cannot be used \(FileNotFoundError: "),
        ("{folder}/some.db", "is not a journal file.*sqlite:///"),
        ("{folder}/text.log", "is not a journal file"),
        ("grpc://localhost", "cannot be used .*grpc://host:port"),
        ("sqlite:///{folder}/none/study.db", "unable to open database file"),
        ("sqlite://", "is a database in memory.*name a file, such as sqlite:///study.db"),
        ("sqlite:///", "is a database in memory"),
        ("sqlite+pysqlite:///:memory:?cache=shared", "is a database in memory"),
        ("postgresql://u:secret@127.0.0.1:9/x", r"postgresql://u:\*\*\*@127.0.0.1:9/x"),
    ],
)
def test_a_storage_that_cannot_be_used_is_named_with_the_remedy(tmp_path, storage, said):
    sqlite3.connect(tmp_path / "some.db").executescript("create table t (x); insert into t values (1);")
    (tmp_path / "text.log").write_text("no journal\n")
    with pytest.raises(SetupError, match=said) as error:
        search(tmp_path, storage.format(folder=tmp_path))

    assert "secret" not in str(error.value)


def test_a_proxy_that_does_not_answer_is_named(tmp_path, monkeypatch):
    pytest.importorskip("grpc")
    monkeypatch.setattr("autoaccum.searching.storage.CONNECT", 0.3)
    with pytest.raises(SetupError, match=r"grpc://127.0.0.1:9' cannot be used.*run_grpc_proxy_server"):
        search(tmp_path, "grpc://127.0.0.1:9")


def test_a_locked_database_is_told_so(tmp_path):
    search(tmp_path, f"sqlite:///{tmp_path}/study.db", 1)
    holder = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    holder.execute("begin exclusive")
    try:
        with pytest.raises(SetupError, match="is locked by another process"):
            search(tmp_path, f"sqlite:///{tmp_path}/study.db?timeout=0.2", 2)
    finally:
        holder.close()


def test_a_journal_whose_last_line_was_cut_off_is_mended(tmp_path):
    search(tmp_path, None, 2)
    with (tmp_path / "run" / "journal.log").open("ab") as file:
        file.write(b'{"op_code":5,"worker')
    with pytest.warns(UserWarning, match="ended in the middle of a line"):
        result = search(tmp_path, None, 3)

    assert len(result.trials) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(search(tmp_path, None, 4).trials) == 4


@pytest.mark.parametrize("line", [b"no json\n", b'{"op_code":5}\n', b"\0\0\0\n"])
def test_a_journal_that_is_damaged_in_its_middle_is_named(tmp_path, line):
    search(tmp_path, None, 2)
    journal = tmp_path / "run" / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:5], line, *lines[5:]]))
    with pytest.raises(SetupError, match="journal.log.* cannot be used .*check that it is whole"):
        search(tmp_path, str(journal), 3)


@pytest.mark.slow
def test_a_journal_with_any_value_in_any_place_is_used_or_is_one_clear_line(tmp_path):
    search(tmp_path, None, 2)
    journal = tmp_path / "run" / "journal.log"
    lines, chosen, refused = journal.read_bytes().splitlines(), random.Random(0), 0
    for place in range(2, len(lines), 3):
        entry = json.loads(lines[place])
        names = [(name, None) for name in entry if name != "worker_id"]
        names += [(name, inner) for name, each in entry.items() if isinstance(each, dict) for inner in each]
        name, inner = chosen.choice(names)
        value = chosen.choice([None, 3, "x", [], {}, -1, 1e308])
        entry[name] = value if inner is None else {**entry[name], inner: value}
        journal.write_bytes(b"\n".join([*lines[:place], json.dumps(entry).encode(), *lines[place + 1 :], b""]))
        said = ""
        try:
            search(tmp_path, None, 2)
        except AutoaccumError as error:
            said = str(error)
        refused += bool(said)
        assert "\n" not in said, entry
        assert len(said) < 700
    assert refused


@pytest.mark.parametrize("writes", [3, 9, 20])
def test_a_full_disk_is_named_and_the_search_goes_on_when_there_is_room_again(tmp_path, monkeypatch, writes):
    count, real = itertools.count(), os.fsync

    def full(file):
        if next(count) >= writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SetupError, match=r"journal.log' cannot be written .*No space left on device.*free some"):
            search(tmp_path, None, 3)
    found = search(tmp_path, None, 3).trials

    assert sum(row["state"] != "killed" for row in found) == 3


def test_a_search_in_sqlite_shows_no_warnings_of_optunas(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", optuna.exceptions.ExperimentalWarning)
        assert len(search(tmp_path, f"sqlite:///{tmp_path}/study.db", 2).trials) == 2


def test_a_study_of_someone_else_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(storage=url, study_name="s").optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(SetupError, match=r"not from autoaccum\.search"):
        search(tmp_path, url)


def test_passwords_are_never_shown(tmp_path):
    assert place_of("postgresql://me:hunter2@host/db") == "postgresql://me:***@host/db"
    assert place_of("sqlite:///a.db") == "sqlite:///a.db"


def test_the_dashboards_command_names_the_storage(tmp_path):
    assert dashboard_line(tmp_path / "journal.log") == f"optuna-dashboard {tmp_path / 'journal.log'}"
    assert dashboard_line("sqlite:///a.db") == "optuna-dashboard sqlite:///a.db"
    assert dashboard_line("my studies/a;b.log") == "optuna-dashboard 'my studies/a;b.log'"


# --- whose a trial is ------------------------------------------------------------------------------------------------


def owner():
    """As a trial of this process is signed."""
    return {**Owner.here()._asdict(), "since": time.time()}


def dead_process():
    """What a process that has ended would have signed with."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return {**owner(), "pid": int(done.stdout), "started": 12345.0}


def asked(study):
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    return trial


def running_trial(study, who):
    trial = asked(study)
    if who is not None:
        trial.set_user_attr(OWNER, who)
    return trial.number


@pytest.fixture(params=["journal", "sqlite"])
def study(request, tmp_path):
    storage = open_storage(tmp_path / "journal.log" if request.param == "journal" else f"sqlite:///{tmp_path}/s.db")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trials are asked for outside of optimize, where heartbeats do not run
        yield optuna.create_study(storage=storage, study_name="s")


def test_running_trials_of_dead_processes_are_failed_and_queued_once(study):
    dead, trial = running_trial(study, dead_process()), asked(study)
    alive, elsewhere = trial.number, running_trial(study, {**dead_process(), "host": "another machine"})

    with signed(trial):
        assert sweep(study) == [dead]
        assert sweep(study) == []
    states = [trial.state.name for trial in study.trials]
    assert [states[n] for n in (dead, alive, elsewhere)] == ["FAIL", "RUNNING", "RUNNING"]
    assert states[3:] == ["WAITING"]
    again = study.ask()
    assert again.suggest_float("x", 0, 1) == study.trials[dead].params["x"]
    assert [trial.number for trial in Ledger(study).of("killed")] == [dead]


def test_another_machines_trial_counts_as_dead_after_a_long_silence(study):
    silent = running_trial(study, {**owner(), "host": "another machine", "since": 1000.0})

    assert sweep(study) == [silent]


def test_a_trial_that_nobody_claimed_is_failed_after_a_while(study, monkeypatch):
    number = running_trial(study, None)
    assert sweep(study) == []
    monkeypatch.setattr(studies, "UNCLAIMED", -1.0)

    assert sweep(study) == [number]


def test_a_process_id_that_is_used_again_is_another_process(study):
    numbers = [running_trial(study, {**owner(), **more}) for more in ({"started": 12345.0}, {"pid": 2**22 + 1})]

    with signed(asked(study)):
        assert sweep(study) == numbers


def test_what_this_process_left_behind_is_not_waited_for(study):
    """As where the disk was full when a trial was to be ended."""
    with signed(trial := asked(study)):
        assert sweep(study) == []
    assert sweep(study) == [trial.number]


OPENER = """
import sys, time
import optuna
from autoaccum.searching.storage import open_storage
print("ready", flush=True)
sys.stdin.readline()
open_storage(sys.argv[1])
"""


@pytest.mark.slow
def test_processes_that_make_the_same_database_at_once_all_open_it(tmp_path):
    """Each finds no tables and makes them: all but one are refused by the database itself."""
    command = [sys.executable, "-c", OPENER, f"sqlite:///{tmp_path}/study.db"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said[-1000:]
