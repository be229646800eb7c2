"""The search's figures, on digits with the net of examples/05_search.py.

    python -m tests.benchmarks.search [part ...]

Parts (all without a name):

- quality: 30 trials on two workers against the best of 60 random trials, five seeds fixed here, every pair; and the
  samples of each search against the same search without pruning.
- overhead: the time of a search beside the same trainings by hand, one process, no pruning.
- kills: a search whose whole process group is killed ten times at random moments, then finished.

Each part writes its figures into results/search.json as soon as it has them.
"""

import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import torch

import autoaccum
from autoaccum.errors import SetupError
from autoaccum.searching.best import Best
from autoaccum.searching.storage import open_storage

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results" / "search.json"
SEEDS = (11, 12, 13, 14, 15)
SPACE = {"lr": (3e-4, 1e-1, "log"), "target_batch": [32, 64, 128, 256]}
KILLS, KILLED_TRIALS = 10, 60


def example() -> Any:
    """examples/05_search.py as a module, by a name that worker processes find too."""
    name = "search_example"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "05_search.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def setup() -> dict[str, object]:
    """The example's, as it is."""
    return example().setup()


def searched(folder: Path, **keywords: Any) -> Any:
    return autoaccum.search(
        setup, **{"space": SPACE, "folder": folder, "study_name": "bench", "progress": False, **keywords}
    )


def quality(scratch: Path) -> dict[str, Any]:
    pairs = []
    for seed in SEEDS:
        started = time.perf_counter()
        found = searched(scratch / f"tpe-{seed}", n_trials=30, workers=2, seed=seed)
        seconds = time.perf_counter() - started
        whole = searched(scratch / f"whole-{seed}", n_trials=30, workers=2, seed=seed, pruner="none")
        chance = searched(
            scratch / f"random-{seed}", n_trials=60, workers=2, seed=seed, pruner="none", sampler="random"
        )
        samples = [sum(row["samples"] for row in result.trials) for result in (found, whole)]
        pairs.append({
            "seed": seed, "search_30": found.best_value, "search_30_unpruned": whole.best_value,
            "random_60": chance.best_value, "no_worse": found.best_value <= chance.best_value,
            "samples": samples[0], "samples_unpruned": samples[1], "saved": 1 - samples[0] / samples[1],
            "seconds": round(seconds, 1), "states": dict(Counter(row["state"] for row in found.trials)),
        })  # fmt: skip
        print(pairs[-1], flush=True)
        write("quality", {"pairs": pairs, **spread(pairs)})
    return {"pairs": pairs, **spread(pairs)}


def spread(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and most of each figure over the seeds."""
    figures: dict[str, Any] = {"no_worse": f"{sum(pair['no_worse'] for pair in pairs)} of {len(pairs)}"}
    for name in ("search_30", "search_30_unpruned", "random_60", "saved"):
        values = [pair[name] for pair in pairs]
        figures[name] = {"mean": statistics.mean(values), "least": min(values), "most": max(values)}
    return figures


def overhead(scratch: Path) -> dict[str, Any]:
    """Searches and bare trainings of the same parameters in turn, three times; the median of the ratios.

    What the search pays once (the probe, the gradient check, opening the study) is in it.
    """
    torch.set_num_threads(1)
    rounds = []
    for index in range(3):
        started = time.perf_counter()
        result = searched(scratch / f"overhead-{index}", n_trials=12, workers=1, seed=11, pruner="none")
        mine = time.perf_counter() - started
        plans = [(row["params"], row["target_batch"]) for row in result.trials]
        bare = 0.0
        for params, target in plans:
            plan = autoaccum.plan(target, target, optimizer="adamw", lr_batch=64, samples=1437, batch_norm_layers=2)
            best = Best(str(scratch / "plan.json"), params, {"seed": 11, "lr": params["lr"]}, 11, 1)
            plan.save(scratch / "plan.json")
            started = time.perf_counter()
            arguments = best.arguments(setup)
            autoaccum.fit(**{**arguments, "check": False, "progress": False})
            bare += time.perf_counter() - started
        rounds.append({"search": round(mine, 2), "bare": round(bare, 2), "overhead": mine / bare - 1})
        print(rounds[-1], flush=True)
    return {"rounds": rounds, "median": statistics.median(each["overhead"] for each in rounds), "trials": 12}


CHILD = """
import sys
sys.path.insert(0, {root!r})
from tests.benchmarks import search
from pathlib import Path
if __name__ == "__main__":
    search.searched(Path({folder!r}), n_trials={trials}, workers=2, seed=11, storage={storage!r})
"""


def kills(scratch: Path) -> dict[str, Any]:
    """Kills the search's process group ten times, each at a random moment, then finishes it."""
    figures = {}
    for name, storage in (("journal", None), ("sqlite", f"sqlite:///{scratch}/kills.db")):
        folder = scratch / f"kills-{name}"
        script = scratch / f"kills_{name}.py"
        script.write_text(CHILD.format(root=str(ROOT), folder=str(folder), storage=storage, trials=KILLED_TRIALS))
        dice, killed = random.Random(name), 0
        while killed < KILLS:
            before = trials_in(storage, folder)
            process = subprocess.Popen(
                [sys.executable, str(script)], start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            while process.poll() is None and trials_in(storage, folder) == before:
                time.sleep(0.2)
            time.sleep(dice.uniform(0.0, 6.0))  # from its first trial on
            if process.poll() is not None:
                break  # it came to its end
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        result = searched(folder, n_trials=KILLED_TRIALS, workers=2, seed=11, storage=storage)
        figures[name] = {"kills": killed, **counted(result)}
        print(name, figures[name], flush=True)
        write("kills", figures)
    return figures


def trials_in(storage: str | None, folder: Path) -> int:
    """How many trials the study has; 0 while there is none."""
    place = storage or str(folder / "journal.log")
    if not Path(place.removeprefix("sqlite:///")).exists():
        return 0
    with contextlib.suppress(KeyError, SetupError):
        return len(optuna.load_study(study_name="bench", storage=open_storage(place, folder)).trials)
    return 0


def counted(result: Any) -> dict[str, Any]:
    """How many trials there are of each kind, and whether any setting was trained twice to its end."""
    states = Counter(row["state"] for row in result.trials)
    finished = [row for row in result.trials if row["state"] not in ("killed", "running")]
    settings = Counter(json.dumps(row["params"], sort_keys=True) for row in finished)
    return {
        "asked": KILLED_TRIALS, "finished": len(finished), "states": dict(states),
        "finished_twice": sum(times - 1 for times in settings.values()),
        "repeats": sum(row["repeats"] is not None for row in result.trials),
    }  # fmt: skip


def write(part: str, figures: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "torch": torch.__version__}
    kept[part] = {"machine": machine, **figures}
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")


def main(parts: list[str]) -> None:
    known = {"overhead": overhead, "kills": kills, "quality": quality}
    scratch = Path(tempfile.mkdtemp(prefix="autoaccum-search-"))
    try:
        for part in parts or known:
            write(part, known[part](scratch))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
