"""Several workers at once: a spawned process each, watched, and started anew where one dies.

Choices:
- Processes and not threads: one crash or kill costs one trial, and the interpreter's lock is nobody's.
- Threads are shared out: on a CPU every worker gets its part of them, and of the memory that is free.
- Every worker holds one end of a pipe, and leaves when the other one is closed: by the parent's end, or where it stops.
- Ctrl-C reaches every worker, which marks its trial as interrupted before it goes; those that do not go are killed.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import connection
from typing import Any

import torch

from autoaccum.errors import AutoaccumError, DeviceError, SetupError, shown
from autoaccum.memory.device import open_device
from autoaccum.searching.extra import hushed
from autoaccum.searching.job import Job
from autoaccum.searching.worker import Worker

__all__ = ["check_not_in_a_worker", "places", "run_pool"]

WORKER = "autoaccum-search-worker"  # what its process is called
GUARD = 'put what the script does below `if __name__ == "__main__":`, since every worker reads it again'
DEATHS_IN_A_ROW = 3  # workers that die with nothing finished in between
POLL = 0.5  # seconds between two looks at the study
PATIENCE = 20.0  # seconds that interrupted workers have for marking their trials


def places(workers: int | str) -> list[dict[str, Any]]:
    """What each worker has of this machine: `threads`, and `device` or `memory` (bytes) where they share those out.

    Raises:
        SetupError: not a number above 0 or "gpus".
        DeviceError: "gpus" where there are none.
    """
    threads = torch.get_num_threads()
    if workers == "gpus":
        count = torch.cuda.device_count()
        if not count:
            raise DeviceError('workers="gpus": there is no CUDA device; give a number of CPU workers, such as 2')
        return [{"threads": max(1, threads // count), "device": f"cuda:{index}"} for index in range(count)]
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise SetupError(f'workers={shown(workers)}: give a number of processes above 0, or "gpus" for one a GPU')
    shared = workers > 1 and not torch.cuda.is_available()
    memory = {"memory": open_device("cpu").budget(None).bytes // workers} if shared else {}
    return [{"threads": max(1, threads // workers), **memory} for _ in range(workers)]


def check_not_in_a_worker() -> None:
    """Refuses, with a SetupError, a search that a worker's own reading of the script starts."""
    if multiprocessing.current_process().name == WORKER:
        raise SetupError(f"a worker of a search has started the search anew: {GUARD}")


def run_pool(job: Job, spots: list[dict[str, Any]], finished: Callable[[], int], heard: Callable[[], None]) -> None:
    """Runs a worker in each of `spots` until the search is done.

    `finished` tells how many trials are, by the study; `heard` is called now and then, to draw what has changed.

    Raises:
        KeyboardInterrupt: after every worker has marked its trial and gone.
        SetupError: the setup cannot be sent to another process.
        AutoaccumError: what ends the search in a worker; or workers that die one after another.
    """
    _check_pickles(job)
    context = multiprocessing.get_context("spawn")
    leave, stay = context.Pipe(duplex=False)
    running: dict[Any, tuple[dict[str, Any], Any]] = {}

    def start(spot: dict[str, Any]) -> None:
        words, there = context.Pipe(duplex=False)
        own = {"workers": len(spots), **{name: value for name, value in spot.items() if name != "threads"}}
        arguments = (replace(job, **own), spot["threads"], leave, there)
        process = context.Process(name=WORKER, target=_work, args=arguments)
        with _interrupts_ignored():  # the child inherits that, until it has a handler of its own
            process.start()
        there.close()
        running[process] = spot, words

    try:
        for spot in spots:
            start(spot)
        deaths, before = 0, finished()
        while running:
            connection.wait([process.sentinel for process in running], POLL)
            for process in [process for process in running if not process.is_alive()]:
                spot, words = running.pop(process)
                _raise_word(words)
                if process.exitcode:
                    now = finished()
                    deaths, before = deaths + 1 if now == before else 1, now
                    _check_death(process.exitcode, deaths)
                    start(spot)
            heard()
    finally:
        stay.close()
        _await(list(running))


def _raise_word(words: Any) -> None:
    """Raises the error that a worker left as its last word, if there is one."""
    with contextlib.suppress(EOFError), words:
        kind, text = words.recv()
        raise kind.__new__(kind, text)


def _check_death(code: int, deaths: int) -> None:
    """Whether to go on after a worker has died."""
    if code == 1:
        raise AutoaccumError(
            f"a worker ended with the error that it printed: if that is about a search started anew, {GUARD}; else "
            "mend what it says, or use workers=1"
        )
    if deaths < DEATHS_IN_A_ROW:
        return
    cause = f"exit code {code}"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        cause = f"ended by {name}" + (", often for want of memory" if name == "SIGKILL" else "")
    raise AutoaccumError(
        f"{deaths} workers died one after another and no trial was finished ({cause}): look at what they printed, or "
        "run with workers=1 to see it here"
    )


def _await(processes: list[Any]) -> None:
    """Waits until workers that were asked to leave have marked their trials, and kills those that do not go."""
    with _interrupts_ignored():
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _check_pickles(job: Job) -> None:
    """Refuses what cannot be sent to other processes, or that they would not find."""
    why = None
    try:
        sent = pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        why = str(error)
    else:
        main = sys.modules["__main__"]
        file = getattr(main, "__file__", None)
        found = getattr(main, "__spec__", None) is not None or os.path.isfile(file or "")
        if not found and (file is not None or b"__main__" in sent):  # with <stdin> for a file no child can even start
            why = f"this program is {file or 'typed in'}, which they cannot read"
    if why is not None:
        raise SetupError(
            f"the search cannot be sent to other processes ({why}): define the setup (and a space that is a function) "
            "at the top level of a module, and give the storage as a path or URL; or use workers=1"
        )


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C is not heard; the handler is put back. Only the main thread has one."""
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


def _work(job: Job, threads: int, leave: Any, words: Any) -> None:
    """What a worker's process does."""
    signal.signal(signal.SIGINT, _interrupted)
    threading.Thread(target=_follow, args=(leave,), daemon=True).start()
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for processes that the user's code starts
    if job.device is not None:
        torch.cuda.set_device(job.device)
    try:
        with hushed():
            Worker(job, job.open(), heard=_leave_where_asked_to).run()
    except KeyboardInterrupt:
        os._exit(130)
    except AutoaccumError as error:
        words.send((type(error), str(error)))


def _interrupted(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough: the second must not break the marking
    _asked_to_leave.set()
    raise KeyboardInterrupt


def _leave_where_asked_to() -> None:
    """Once more, where the user's code has swallowed the interruption."""
    if _asked_to_leave.is_set():
        raise KeyboardInterrupt


def _follow(leave: Any) -> None:
    """Ends this process when it is to leave, the trial marked, or without where that takes too long."""
    connection.wait([leave])
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(PATIENCE)
    os._exit(1)
