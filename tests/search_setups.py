"""Setups for the tests of the search, at a module's top level so that worker processes find them. Small enough that a
trial takes tenths of a second: no probe (`micro_batch`) and no gradient check unless a test is about them."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

import autoaccum


def accuracy(outputs, targets):
    return autoaccum.Mean((outputs.argmax(1) == targets).sum(), len(targets))


def arguments(*, width=4, epochs=9, **more):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(120, 5, generator=generator)
    y = (x @ torch.randn(5, 3, generator=generator)).argmax(1)
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))
    return {
        "model": model, "data": (x[:90], y[:90]), "val_data": (x[90:], y[90:]), "loss": nn.CrossEntropyLoss(),
        "metrics": {"accuracy": accuracy}, "lr": 1e-2, "epochs": epochs, "device": "cpu", "micro_batch": 64,
        "check": False, **more,
    }  # fmt: skip


def plain():
    return arguments()


def short():
    return arguments(epochs=1)


def wide(width=4, weight_decay=0.0):
    return arguments(width=width, optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=weight_decay))


def probed(width=4):
    return arguments(width=width, epochs=1, micro_batch=None)


def raises_sometimes(width=4):
    if width == 3:
        raise RuntimeError(f"no width of {width}")
    return arguments(width=width, epochs=1)


def raises_always(width=4):
    raise RuntimeError(f"never {width}")


def no_val_data():
    return {**arguments(epochs=1), "val_data": None, "metrics": None}


def in_a_worker():
    """Whether this is a worker's process: the test's own must not come to harm."""
    return multiprocessing.parent_process() is not None


def counted():
    """Writes a line for each call, where the environment says: by whom, and with how many threads.

    The first worker that finds the marker takes it along and is killed outright, as for want of memory.
    """
    folder = Path(os.environ["SEARCH_CALLS"])
    with (folder / "calls").open("a") as file:
        file.write(f"{os.getpid()} {torch.get_num_threads()}\n")
    if in_a_worker() and (folder / "marker").exists():
        (folder / "marker").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return arguments(epochs=2)


def killed_always():
    if in_a_worker():
        os.kill(os.getpid(), signal.SIGKILL)
    return arguments(epochs=1)


def fails_in_a_worker():
    if in_a_worker():
        raise RuntimeError("only in a worker")
    return arguments(epochs=1)


def slow():
    """Slow enough to be caught at it, where the environment says so."""
    time.sleep(float(os.environ.get("SEARCH_SLEEP", "0")))
    return arguments(epochs=1)
