"""Several workers at once: a spawned process each, watched, and started anew where one dies.

Processes and not threads: one crash or kill costs one trial, and the interpreter's lock is nobody's. Ctrl-C reaches
every worker, which marks its trial as interrupted before it goes.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

import torch

from autoaccum.errors import AutoaccumError, DeviceError, SetupError, shown
from autoaccum.memory.device import open_device
from autoaccum.probing.child_process import Child, Killed, check_sendable, stop
from autoaccum.ranks import here
from autoaccum.searching.extra import hushed, optuna
from autoaccum.searching.job import Job
from autoaccum.searching.study import Ledger, open_study
from autoaccum.searching.worker import Worker

__all__ = ["places", "run_pool"]

DEATHS_IN_A_ROW = 3  # workers that die with nothing finished in between
POLL = 0.5  # seconds between two looks at the study
PATIENCE = 20.0  # seconds that interrupted workers have for marking their trials


def places(workers: int | str) -> list[dict[str, Any]]:
    """What each worker has of this machine: `threads`, and `device` or `memory` (bytes) where they share those out."""
    threads = torch.get_num_threads()
    if workers != 1 and here().size > 1:
        raise SetupError(
            f"workers={shown(workers)} under torchrun: every worker would need a group of its own; leave workers out, "
            "and start the command several times with the same storage and study_name"
        )
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


def run_pool(job: Job, spots: list[dict[str, Any]], study: Any, heard: Callable[[], None]) -> None:
    """Runs a worker in each of `spots` until the search is done; `heard` is called now and then, to draw the study.

    What ends the search in a worker is raised here, and where workers die one after another. After Ctrl-C every worker
    has marked its trial and gone.
    """
    remedy = (
        "define the setup (and a space that is a function) at the top level of a module, and give the storage as a "
        "path or URL; or use workers=1"
    )
    if isinstance(job.storage, optuna.storages.InMemoryStorage):
        raise SetupError(f"the storage is in this process's memory, which none of its workers can reach: {remedy}")
    check_sendable(job, remedy)
    running: dict[Child, dict[str, Any]] = {}

    def start(spot: dict[str, Any]) -> None:
        running[Child(_work, (replace(job, workers=len(spots), **spot),), on_interrupt=_interrupted)] = spot

    try:
        for spot in spots:
            start(spot)
        deaths, before = 0, len(Ledger(study).of("finished"))
        while running:
            wait([child.process.sentinel for child in running], POLL)
            for child in [child for child in running if child.has_spoken]:
                spot = running.pop(child)
                try:
                    child.answer()
                except Killed as death:
                    now = len(Ledger(study).of("finished"))
                    deaths, before = deaths + 1 if now == before else 1, now
                    if deaths >= DEATHS_IN_A_ROW:
                        raise AutoaccumError(
                            f"{deaths} workers died one after another and no trial was finished (ended by {death}, "
                            "where that is SIGKILL often for want of memory): look at what they printed, or use "
                            "workers=1 to see it here. What a script does must stand below "
                            '`if __name__ == "__main__":`, since every worker reads it again'
                        ) from None
                    start(spot)
            heard()
    finally:
        stop(list(running), signal.SIGINT, PATIENCE)


def _work(send: Callable[[str, Any], None], job: Job) -> None:
    """What a worker's process does."""
    torch.set_num_threads(job.threads)
    os.environ["OMP_NUM_THREADS"] = str(job.threads)  # for processes that the user's code starts
    if job.device is not None:
        torch.cuda.set_device(job.device)
    try:
        with hushed():
            Worker(job, open_study(job), heard=lambda: None).run()
    except AutoaccumError:
        raise
    except Exception as error:
        raise AutoaccumError(
            f"a worker failed with {type(error).__name__}: {error}; workers=1 shows it here"
        ) from error


def _interrupted(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough: the second must not break the marking
    raise KeyboardInterrupt
