"""What each of three ranks does for test_ranks_lost.py: two of them train together, then one is killed."""

import os
import signal
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist

import autoaccum
from autoaccum.errors import AutoaccumError
from tests.ranks_work import Case, Net, data, plain_sgd, state

__all__ = ["GROUP", "settings", "work"]

GROUP = (1, 2)


def settings(**more: Any) -> dict[str, Any]:
    return {
        "loss": Case().loss, "target_batch": 8, "micro_batch": 3, "optimizer": plain_sgd, "lr": 0.1, "device": "cpu",
        "shuffle": False, "progress": False, "lr_rule": "none", **more,
    }  # fmt: skip


def work(rank: int, folder: str) -> None:
    """One of three ranks; writes what it found to a file, but for the one that is killed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    group, found = dist.new_group(list(GROUP)), {}
    if rank in GROUP:
        result = autoaccum.fit(Net(), data()[:2], group=group, val_data=data(13)[:2], **settings())
        found["sub-group"] = (state(result.model), result.plan.world_size, result.evaluations)
    else:
        try:
            autoaccum.fit(Net(), data()[:2], group=group, **settings())
        except AutoaccumError as error:
            found["not of it"] = str(error)
    loop = autoaccum.prepare(
        Net(), data()[:2], checkpoint=f"{folder}/run", checkpoint_every=1, epochs=9, **settings(check=False)
    )
    try:
        for record in loop:
            if record.step == 3 and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
    except AutoaccumError as error:
        found["lost"], found["kind"] = str(error), type(error).__name__
    torch.save(found, f"{folder}/{rank}.pt")
    time.sleep(0.1)
    os._exit(0)  # a group with a dead rank is not to be taken down in an orderly way
