"""Several workers at once: a spawned process each, watched, and started anew where one dies.

Choices:
- Processes and not threads: one crash or kill costs one trial, and the interpreter's lock is nobody's.
- Threads are shared out: on a CPU every worker gets its part of them, and of the memory that is free.
- A worker that loses its parent ends itself, so that a search that was killed is gone as a whole.
- Ctrl-C reaches every worker, which marks its trial as interrupted before it goes; those that do not go are ended.
"""

import contextlib
import multiprocessing
import os
import pickle
import pickletools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import connection
from typing import Any

from autoaccum.errors import AutoaccumError, DeviceError, SetupError, shown
from autoaccum.searching.extra import hushed
from autoaccum.searching.job import Job, open_job
from autoaccum.searching.worker import Worker

__all__ = ["Place", "places", "run_pool"]

WORKER = "autoaccum-search-worker"  # what its process is called
GUARD = 'put what the script does below `if __name__ == "__main__":`, since every worker reads it again'
DEATHS_IN_A_ROW = 3  # workers that die with nothing finished in between
POLL = 0.5  # seconds between two looks at the study
PATIENCE = 20.0  # seconds that interrupted workers have for marking their trials


@dataclass(frozen=True)
class Place:
    """Where a worker runs.

    Attributes:
        device: None leaves it to the setup.
        threads: that PyTorch may use in it.
        memory: bytes, where several share a host's memory; None where it is the worker's alone.
    """

    device: str | None
    threads: int
    memory: int | None = None


def places(workers: int | str) -> list[Place]:
    """A place for each worker.

    Raises:
        SetupError: not a number above 0 or "gpus".
        DeviceError: "gpus" where there are none.
    """
    import torch

    threads = torch.get_num_threads()
    if workers == "gpus":
        count = torch.cuda.device_count()
        if not count:
            raise DeviceError('workers="gpus": there is no CUDA device; give a number of CPU workers, such as 2')
        return [Place(f"cuda:{index}", max(1, threads // count)) for index in range(count)]
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise SetupError(f'workers={shown(workers)}: give a number of processes above 0, or "gpus" for one a GPU')
    if workers == 1:
        return [Place(None, threads)]
    memory = None
    if not torch.cuda.is_available():
        from autoaccum.memory.device import open_device

        memory = open_device("cpu").budget(None).bytes // workers
    return [Place(None, max(1, threads // workers), memory) for _ in range(workers)]


def run_pool(job: Job, spots: list[Place], finished: Callable[[], int], heard: Callable[[], None]) -> None:
    """Runs the workers until the search is done.

    Args:
        job: for all of them.
        spots: one a worker.
        finished: how many trials are, by the study.
        heard: called now and then, to draw what has changed.

    Raises:
        KeyboardInterrupt: after every worker has marked its trial and gone.
        SetupError: the setup cannot be sent to another process.
        AutoaccumError: what ends the search in a worker; or workers that die one after another.
    """
    _check_pickles(job)
    pool = _Pool(job, len(spots))
    try:
        for spot in spots:
            pool.start(spot)
        deaths, before = 0, finished()
        while pool.processes:
            for code in pool.ended(POLL):
                now = finished()
                deaths = deaths + 1 if now == before else 1
                before = now
                if deaths >= DEATHS_IN_A_ROW:
                    raise AutoaccumError(
                        f"{deaths} workers died one after another and no trial was finished ({_cause(code)}): look at "
                        "what they printed, or run with workers=1 to see it here"
                    )
                pool.restart()
            heard()
    except BaseException:
        pool.stop()
        raise


def _cause(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return f"ended by {name}" + (", often for want of memory" if name == "SIGKILL" else "")
    return f"exit code {code}"


def _check_pickles(job: Job) -> None:
    remedy = (
        "define the setup (and a space that is a function) at the top level of a module, and give the storage as a "
        "path or URL; or use workers=1"
    )
    try:
        sent = pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise SetupError(f"the search cannot be sent to other processes ({error}): {remedy}") from error
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if getattr(main, "__spec__", None) is not None or (file is not None and os.path.isfile(file)):
        return
    in_main = any(argument == "__main__" for _, argument, _ in pickletools.genops(sent))
    if in_main or file is not None:  # with a file that is none, such as <stdin>, no child can even start
        raise SetupError(
            f"the search cannot be sent to other processes (this program is {file or 'typed in'}, which they cannot "
            f"read): {remedy}"
        )


def check_not_in_a_worker() -> None:
    """That no worker searches, as where its main module starts a search when it is read.

    Raises:
        SetupError: this is one.
    """
    if multiprocessing.current_process().name.startswith(WORKER):
        raise SetupError(f"a worker of a search started the search anew: {GUARD}")


class _Pool:
    """The processes, each with the pipe in which it may leave an error."""

    def __init__(self, job: Job, count: int) -> None:
        self._job, self._count, self._context = job, count, multiprocessing.get_context("spawn")
        self.processes: dict[Any, tuple[Place, Any]] = {}
        self._vacant: list[Place] = []

    def start(self, spot: Place) -> None:
        given = {"device": spot.device, "memory": spot.memory}
        defaults = {**self._job.defaults, **{name: value for name, value in given.items() if value is not None}}
        here, there = self._context.Pipe(duplex=False)
        job = replace(self._job, defaults=defaults, sharing=self._count)
        process = self._context.Process(name=WORKER, target=_work, args=(job, spot, there), daemon=False)
        with _interrupts_ignored():  # the child inherits that, until it has a handler of its own
            process.start()
        there.close()
        self.processes[process] = (spot, here)

    def ended(self, timeout: float) -> list[int]:
        """Waits a while; the exit codes of workers that died. Raises what a worker left as its last word."""
        connection.wait([process.sentinel for process in self.processes], timeout)
        codes = []
        for process in [process for process in self.processes if not process.is_alive()]:
            spot, pipe = self.processes.pop(process)
            process.join()
            begun, error = _words(pipe)
            if error is not None:
                raise error
            if process.exitcode == 1 and not begun:
                raise AutoaccumError(
                    f"a worker ended before it began, with the error that it printed: if that is about a search "
                    f"started anew, {GUARD}; else mend what it says, or use workers=1"
                )
            if process.exitcode != 0:
                codes.append(process.exitcode or 1)
                self._vacant.append(spot)
        return codes

    def restart(self) -> None:
        self.start(self._vacant.pop())

    def stop(self) -> None:
        """Interrupts all, waits until they have marked their trials, and ends those that do not go."""
        with _interrupts_ignored():
            deadline = time.monotonic() + PATIENCE
            while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
                for process in self.processes:
                    if process.is_alive() and process.pid is not None:
                        with contextlib.suppress(ProcessLookupError):
                            # Again and again: one that is still starting ignores it, and would begin a trial after all.
                            os.kill(process.pid, signal.SIGINT)
                time.sleep(0.1)
            for process in self.processes:
                if process.is_alive():
                    process.kill()
                    process.join()


def _words(pipe: Any) -> tuple[bool, BaseException | None]:
    """Whether a worker said that it began, and the error that it left."""
    begun, error = False, None
    try:
        while error is None and pipe.poll():
            error = pipe.recv()
            begun = True
    except (EOFError, OSError):
        pass
    finally:
        pipe.close()
    return begun, error


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C waits; the handler is put back. Only the main thread has one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# --- in the child ----------------------------------------------------------------------------------------------------

_asked_to_leave = threading.Event()


def _work(job: Job, spot: Place, pipe: Any) -> None:
    """What a worker's process does."""
    import torch

    signal.signal(signal.SIGINT, _interrupted)
    pipe.send(None)  # it has begun
    threading.Thread(target=_follow_the_parent, daemon=True).start()
    torch.set_num_threads(spot.threads)
    os.environ["OMP_NUM_THREADS"] = str(spot.threads)  # for processes that the user's code starts
    if spot.device is not None:
        torch.cuda.set_device(spot.device)
    try:
        with hushed():
            Worker(job, open_job(job), heard=_leave_where_asked_to).run()
    except KeyboardInterrupt:
        os._exit(130)
    except AutoaccumError as error:
        pipe.send(_sendable(error))


def _interrupted(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough: the second must not break the marking
    _asked_to_leave.set()
    raise KeyboardInterrupt


def _leave_where_asked_to() -> None:
    """Once more, where the user's code has swallowed the interruption."""
    if _asked_to_leave.is_set():
        raise KeyboardInterrupt


def _follow_the_parent() -> None:
    """Ends this process with its parent, the trial marked, or without where that takes too long."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(PATIENCE)
    os._exit(1)


def _sendable(error: AutoaccumError) -> AutoaccumError:
    """The error as it can be pickled: with its traceback's text, where it has none of its own."""
    cause = error.__cause__
    made = type(error)(*error.args) if len(error.args) == 1 else AutoaccumError(str(error))
    made.__cause__ = cause if cause is None or isinstance(cause, Exception) else None
    try:
        pickle.loads(pickle.dumps(made))
    except Exception:  # a cause from the user's code may be anything: its text is enough
        made.__cause__ = None
    return made
