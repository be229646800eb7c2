"""Processes that begin as forks of one which has imported PyTorch: its import takes longer than most tests.

They are what spawned ones are in all that a test can see: arguments are pickled, modules of the tests imported anew,
and the environment, the current folder and the search path are those of the moment when one is started.
"""

import multiprocessing
import os
import runpy
import sys
from multiprocessing import forkserver, reduction
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

__all__ = ["WARM", "Command", "run", "serve", "use"]

ROOT = str(Path(__file__).parents[1])


class _Process(ForkServerProcess):
    """Has the environment and the outputs of the process that starts it, and not those of the one it is forked from."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.environment = dict(os.environ)
        self.outputs: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "outputs": [reduction.DupFd(1), reduction.DupFd(2)]}

    def start(self) -> None:
        """Starts the process to fork from where there is none."""
        server = forkserver._forkserver
        if server._forkserver_address is None:
            serve()
        elif server._forkserver_pid is None:  # not ours: a process of pytest-xdist's or one of its forks starts another
            server.ensure_running = lambda: None
        super().start()

    def run(self) -> None:
        """What the process does."""
        for number, output in enumerate(self.outputs, 1):
            _send(number, output.detach())
        os.environ.clear()
        os.environ.update(self.environment)
        super().run()


def serve() -> dict[str, Any]:
    """Starts the process to fork from; what another one needs to `use` it as well."""
    server, before = forkserver._forkserver, dict(os.environ)
    os.environ.update(PYTHONPATH=ROOT, OMP_NUM_THREADS="1")
    server.set_forkserver_preload(["tests.warmed"])
    server.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return {name: getattr(server, name, None) for name in ("_forkserver_address", "_forkserver_authkey")}


def use(served: dict[str, Any]) -> None:
    """Forks from a process that another one has started, and which lives as long as that."""
    vars(forkserver._forkserver).update(served, _forkserver_alive_fd=os.open(os.devnull, os.O_WRONLY))


class _Context(ForkServerContext):
    Process = _Process


WARM = _Context()


class Command:
    """`python *words` in a warm process; as a `subprocess.Popen` in what it is asked for here."""

    def __init__(self, *words: Any, cwd: Any = None, env: dict[str, str] | None = None) -> None:
        self._folder = TemporaryDirectory()
        self.stdout, self.stderr = (Path(self._folder.name, name) for name in ("out", "err"))
        for output in (self.stdout, self.stderr):
            output.touch()
        told = [str(word) for word in words], str(cwd or os.getcwd()), env, str(self.stdout), str(self.stderr)
        self._process = WARM.Process(target=_command, args=told)
        self._process.start()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends it a signal."""
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """(stdout, stderr), once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise TimeoutError(f"it runs after {timeout} s\n{self.stderr.read_text()}")
        return self.stdout.read_text(), self.stderr.read_text()


def run(*words: Any, cwd: Any = None, env: dict[str, str] | None = None, timeout: float = 300) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python *words`, words being `-m module …`, `-c code …` or `script …`."""
    command = Command(*words, cwd=cwd, env=env)
    out, err = command.communicate(timeout)
    assert command.returncode is not None
    return command.returncode, out, err


def _command(words: list[str], cwd: str, env: dict[str, str] | None, out: str, err: str) -> None:
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    for number, path in enumerate((out, err), 1):
        _send(number, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    os.chdir(cwd)
    multiprocessing.get_context = lambda method=None: WARM
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], cwd
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], cwd
        exec(compile(words[1], "code", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def _send(number: int, elsewhere: int) -> None:
    """Has what is written to the file of this number go to another one."""
    os.dup2(elsewhere, number)
    os.close(elsewhere)
