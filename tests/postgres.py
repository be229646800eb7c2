"""`make test-postgres`: the search against a real PostgreSQL server, which this starts for itself and throws away.

A private cluster in a temporary folder, on a free port of the loopback interface; nothing is installed, and no server
that runs already is touched. Two worker processes search in it, are killed, and finish; then the same behind a gRPC
proxy. What is missing is said, with how to get it.
"""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna

import autoaccum
from autoaccum.errors import SetupError
from tests.search_setups import plain, slow

ROOT = Path(__file__).parents[1]
CHILD = """
import sys
import autoaccum
from tests.search_setups import slow

if __name__ == "__main__":
    autoaccum.search(slow, n_trials=8, workers=2, storage=sys.argv[1], study_name="killed", target_batch=(8, 16),
                     folder=sys.argv[2], pruner="none")
"""


def missing() -> list[str]:
    """What is not here, each with how to get it."""
    lacks = []
    if binaries() is None:
        lacks.append("PostgreSQL's programs initdb and postgres (Debian: apt-get install postgresql)")
    if not any(importlib.util.find_spec(name) for name in ("psycopg", "psycopg2")):
        lacks.append('a driver for Python (pip install "psycopg[binary]")')
    if os.geteuid() == 0 and not any(entry.pw_name == "postgres" for entry in pwd.getpwall()):
        lacks.append("a user postgres, since the server refuses to run as root (Debian: apt-get install postgresql)")
    return lacks


def binaries() -> Path | None:
    """The folder of initdb and postgres: on the path, or where Debian puts them."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    needed = ("initdb", "postgres", "pg_isready")
    return next((folder for folder in folders if all((folder / name).exists() for name in needed)), None)


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """A server of its own; gives the URL of an empty database in it."""
    folder = binaries()
    assert folder is not None
    home = Path(tempfile.mkdtemp(prefix="autoaccum-postgres-"))
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        user = {"user": "postgres", "group": pwd.getpwnam("postgres").pw_gid, "extra_groups": []}
        shutil.chown(home, "postgres")
    port = free_port()
    data, quiet = home / "data", {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": home}
    made = subprocess.run(
        [folder / "initdb", "-D", data, "-U", "searcher", "--auth=trust", "--no-sync"], check=False, **quiet, **user
    )
    if made.returncode:
        raise SystemExit(f"initdb failed: {made.stderr}")
    log = (home / "log").open("w")
    options = ["-p", str(port), "-k", str(home), "-c", "listen_addresses=127.0.0.1"]
    server = subprocess.Popen([folder / "postgres", "-D", data, *options], stdout=log, stderr=log, cwd=home, **user)
    try:
        ready([folder / "pg_isready", "-h", "127.0.0.1", "-p", str(port)], server, home / "log")
        yield f"postgresql://searcher:secret@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
        server.wait(timeout=30)
        log.close()
        shutil.rmtree(home, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ready(ask: list[Any], server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while subprocess.run(ask, stdout=subprocess.DEVNULL, check=False).returncode:
        if server.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the server did not start: {log.read_text()}")
        time.sleep(0.2)


def search(storage: str, folder: Path, n_trials: int, **keywords: Any) -> Any:
    keywords = {"setup": plain, "target_batch": (8, 16), "folder": folder, **keywords}
    return autoaccum.search(n_trials=n_trials, storage=storage, **keywords)


def two_workers_share_the_trials(url: str, folder: Path) -> None:
    result = search(url, folder, 8, workers=2, study_name="shared")
    owners = {trial.user_attrs["autoaccum.owner"]["pid"] for trial in result.study.trials}
    assert len(result.trials) == len(result.study.trials) == 8, result.trials
    assert len(owners) == 2, owners
    assert "secret" not in str(result.dashboard)


def a_killed_search_goes_on(url: str, folder: Path) -> None:
    script = folder / "child.py"
    script.write_text(CHILD)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "SEARCH_SLEEP": "1",
    }
    child = subprocess.Popen([sys.executable, script, url, folder / "run"], start_new_session=True, env=environment)
    study = None
    deadline = time.monotonic() + 120
    while study is None or not any(trial.state.name == "RUNNING" for trial in study.trials[2:]):
        assert child.poll() is None, "the search ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.1)
        with contextlib.suppress(KeyError, Exception):
            study = optuna.load_study(study_name="killed", storage=driver_url(url))
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    result = search(url, folder / "run", 8, setup=slow, study_name="killed", pruner="none")
    states = Counter(row["state"] for row in result.trials)
    assert states["complete"] == 8, states
    assert states["killed"] <= 2, states


def driver_url(url: str) -> str:
    """As Optuna itself takes it, by the driver that is there."""
    name = "psycopg" if importlib.util.find_spec("psycopg") else "psycopg2"
    return url.replace("postgresql://", f"postgresql+{name}://")


def a_study_of_another_direction_is_named(url: str, folder: Path) -> None:
    text = "it was not refused"
    try:
        search(url, folder, 8, study_name="shared", direction="maximize", metric="accuracy")
    except SetupError as error:
        text = str(error)
    assert "'minimize'" in text, text
    assert "'maximize'" in text, text
    assert "secret" not in text, text


def two_workers_search_behind_a_grpc_proxy(url: str, folder: Path) -> None:
    from optuna.storages._grpc.server import make_server

    port = free_port()
    server = make_server(optuna.storages.get_storage(driver_url(url)), "127.0.0.1", port)
    server.start()
    try:
        result = search(f"grpc://127.0.0.1:{port}", folder, 6, workers=2, study_name="proxied")
    finally:
        server.stop(grace=None)
    assert len(result.trials) == 6, result.trials


def main() -> int:
    lacks = missing()
    if lacks:
        print("make test-postgres cannot run here; it installs nothing itself. Missing:")
        print("\n".join(f"- {thing}" for thing in lacks))
        return 2
    checks: list[Callable[[str, Path], None]] = [
        two_workers_share_the_trials,
        a_killed_search_goes_on,
        a_study_of_another_direction_is_named,
        two_workers_search_behind_a_grpc_proxy,
    ]
    failed = 0
    with cluster() as url, tempfile.TemporaryDirectory() as scratch:
        for check in checks:
            started, folder = time.perf_counter(), Path(scratch) / check.__name__
            folder.mkdir()
            try:
                check(url, folder)
            except AssertionError as error:
                failed += 1
                print(f"FAILED {check.__name__}: {error}")
            else:
                print(f"passed {check.__name__} in {time.perf_counter() - started:.1f} s")
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
