"""Several workers at once: a spawned process each, watched, and started anew where one dies.

Processes and not threads: one crash or kill costs one trial, and the interpreter's lock is nobody's. Ctrl-C reaches
every worker, which marks its trial as interrupted before it goes, as it does where its parent is gone.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

import torch

from autoaccum.errors import AutoaccumError, DeviceError, SetupError, shown
from autoaccum.memory.device import open_device
from autoaccum.probing.child_process import Child, Killed, before_ending_with_the_parent, check_sendable, stop
from autoaccum.searching.extra import hushed
from autoaccum.searching.job import Job
from autoaccum.searching.study import open_study
from autoaccum.searching.worker import Worker

__all__ = ["places", "run_pool"]

DEATHS_IN_A_ROW = 3  # workers that die with nothing finished in between
POLL = 0.5  # seconds between two looks at the study
PATIENCE = 20.0  # seconds that interrupted workers have for marking their trials


def places(workers: int | str) -> list[dict[str, Any]]:
    """What each worker has of this machine: `threads`, and `device` or `memory` (bytes) where they share those out."""
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
    return [{"threads": max(1, threads // workers), **memory}] * workers


def run_pool(job: Job, spots: list[dict[str, Any]], finished: Callable[[], int], heard: Callable[[], None]) -> None:
    """Runs a worker in each of `spots` until the search is done.

    `finished` tells how many trials are, by the study; `heard` is called now and then, to draw what has changed. What
    ends the search in a worker is raised here, and where workers die one after another. After Ctrl-C every worker has
    marked its trial and gone.
    """
    check_sendable(job, "define the setup (and a space that is a function) at the top level of a module, and give the "
                        "storage as a path or URL; or use workers=1")  # fmt: skip
    running: dict[Child, dict[str, Any]] = {}

    def start(spot: dict[str, Any]) -> None:
        running[Child(_work, (replace(job, workers=len(spots), **spot),), on_interrupt=_interrupted)] = spot

    try:
        for spot in spots:
            start(spot)
        deaths, before = 0, finished()
        while running:
            wait([child.process.sentinel for child in running], POLL)
            for child in [child for child in running if child.has_spoken]:
                spot = running.pop(child)
                try:
                    child.answer()
                except Killed as death:
                    now = finished()
                    deaths, before = deaths + 1 if now == before else 1, now
                    _check_death(death, deaths)
                    start(spot)
            heard()
    finally:
        stop(list(running), signal.SIGINT, PATIENCE)


def _check_death(death: Killed, deaths: int) -> None:
    """Whether to go on after a worker has died."""
    if death.code == 1:  # before it began: its words are Python's own
        raise AutoaccumError(
            "a worker ended with the error that it printed: if that is about a search started anew, put what the "
            'script does below `if __name__ == "__main__":`, since every worker reads it again; else mend what it '
            "says, or use workers=1"
        )
    if deaths >= DEATHS_IN_A_ROW:
        often = ", often for want of memory" if str(death) == "SIGKILL" else ""
        raise AutoaccumError(
            f"{deaths} workers died one after another and no trial was finished (ended by {death}{often}): look at "
            "what they printed, or run with workers=1 to see it here"
        )


# --- in the child ----------------------------------------------------------------------------------------------------

_asked_to_leave = threading.Event()


def _work(send: Callable[[str, Any], None], job: Job) -> None:
    """What a worker's process does."""
    before_ending_with_the_parent(_leave)
    torch.set_num_threads(job.threads)
    os.environ["OMP_NUM_THREADS"] = str(job.threads)  # for processes that the user's code starts
    if job.device is not None:
        torch.cuda.set_device(job.device)
    try:
        with hushed():
            Worker(job, open_study(job), heard=_leave_where_asked_to).run()
    except AutoaccumError:
        raise
    except Exception as error:
        raise AutoaccumError(
            f"a worker failed with {type(error).__name__}: {error}; workers=1 shows it here"
        ) from error


def _interrupted(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough: the second must not break the marking
    _asked_to_leave.set()
    raise KeyboardInterrupt


def _leave_where_asked_to() -> None:
    """Once more, where the user's code has swallowed the interruption."""
    if _asked_to_leave.is_set():
        raise KeyboardInterrupt


def _leave() -> None:
    """Has this process's main thread mark its trial and end."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(PATIENCE)
