"""A trial that is itself a group of ranks: rank 0 searches, the others train along, and all agree on the end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.versions import TORCH

ROOT = Path(__file__).parents[1]
RANK = """
import json, os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from optuna.samplers import RandomSampler
import autoaccum
from tests.ranks_work import threads_of_gloo
from tests.search_setups import arguments

def setup(width=4):
    if width == 5:
        raise RuntimeError("no width of 5")
    return arguments(width=width, epochs=9, micro_batch=8)

result = autoaccum.search(setup, n_trials=6, space={"lr": (1e-3, 1e-1, "log"), "width": [4, 5], "target_batch": [16]},
                          folder=sys.argv[1] + "/run", study_name="ranks", sampler=RandomSampler(seed=0))
values = {"rank": int(os.environ["RANK"]), "best": result.best_value, "sizes": result.best_plan.micro_batches,
          "world": result.best_plan.world_size, "states": [row["state"] for row in result.trials],
          "threads": threads_of_gloo()}
time.sleep(0.02)  # torch 2.4 waits for ever for a thread that still holds a tensor
torch.distributed.destroy_process_group()
values["left"] = threads_of_gloo()
Path(sys.argv[1], f"{values['rank']}.json").write_text(json.dumps(values))
"""


@pytest.mark.slow
def test_two_ranks_search_as_one_worker(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", tmp_path / "rank.py",
         tmp_path],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    # Each rank writes a file of its own: on the one pipe that both inherit, their lines run into each other.
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))

    assert (first["rank"], second["rank"]) == (0, 1)
    assert {**first, "rank": 1} == second
    assert first["world"] == 2
    assert first["sizes"] == [8]
    assert len(first["states"]) == 6
    assert set(first["states"]) >= {"complete", "error"}
    # Were the group kept alive, a thread of it that lets go of a tensor at the very end would abort the process.
    assert first["threads"] or TORCH < (2, 5)  # where they have no names
    assert first["left"] == []
