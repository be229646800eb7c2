"""The search's figures, on digits with the net of examples/05_search.py.

    python -m tests.benchmarks.search [part ...]

Parts (all without a name):

- quality: 30 trials on two workers against the best of 60 random trials, seeds fixed here, every pair; and the samples
  of each search against what all of its trials would have taken to their end. A seed is also that of every training, so
  it is another landscape each time.
- example: the same over the example's own space, with weight decay and width as well.
- overhead: the time of a search beside the same trainings by hand, one process, no pruning.
- kills: a search whose whole process group is killed ten times at random moments, then finished.

Each part writes its figures into results/search.json as soon as it has them.

The seeds were fixed before anything was run on them, and were run once. Sampler and pruner were chosen on landscapes
fitted to 660 trainings with the seeds 901 to 903, and the example's schedule and its share of held-out images on the
seeds 901 to 906. Seeds 11 to 65 were seen with other settings and are not used any more.
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
from autoaccum.searching.search_result import best_arguments
from autoaccum.searching.storage import open_storage

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results" / "search.json"
SEEDS = (71, 72, 73, 74, 75)
EXAMPLE_SEEDS = (81, 82, 83, 84, 85)
SPACE = {"lr": (3e-4, 1e-1, "log"), "target_batch": [32, 64, 128, 256]}
KILLS, KILLED_TRIALS = 10, 40
ENDED = ("COMPLETE", "PRUNED")


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


def whole_setup(width: int = 16, weight_decay: float = 1e-3) -> dict[str, object]:
    """The example's, with what its own space varies."""
    return example().setup(width, weight_decay)


def searched(folder: Path, setup: Any = setup, **keywords: Any) -> Any:
    return autoaccum.search(
        setup, **{"space": SPACE, "folder": folder, "study_name": "bench", "progress": False, **keywords}
    )


def quality(scratch: Path) -> dict[str, Any]:
    return compared("quality", scratch, SEEDS, SPACE, setup)


def of_the_example(scratch: Path) -> dict[str, Any]:
    return compared("example", scratch, EXAMPLE_SEEDS, example().SPACE, whole_setup)


def compared(part: str, scratch: Path, seeds: tuple[int, ...], space: Any, setup: Any) -> dict[str, Any]:
    """30 trials and 60 random ones, for each seed."""
    pairs = []
    for seed in seeds:
        common = {"workers": 2, "seed": seed, "space": space, "setup": setup}
        started = time.perf_counter()
        found = searched(scratch / f"tpe-{seed}", n_trials=30, **common)
        seconds = time.perf_counter() - started
        # A sampler of its own: by name it would begin with the settings that the search begins with.
        independent = optuna.samplers.RandomSampler(seed=1000 + seed)
        chance = searched(scratch / f"random-{seed}", n_trials=60, pruner="none", sampler=independent, **common)
        samples = sum(row["samples"] for row in found.trials)
        whole = len(found.trials) * max(row["samples"] for row in found.trials)  # as without pruning
        pairs.append({
            "seed": seed, "search_30": found.best_value, "random_60": chance.best_value,
            "no_worse": found.best_value <= chance.best_value,
            "samples": samples, "samples_unpruned": whole, "saved": 1 - samples / whole,
            "seconds": round(seconds, 1), "states": dict(Counter(row["state"] for row in found.trials)),
        })  # fmt: skip
        print(pairs[-1], flush=True)
        write(part, {"pairs": pairs, **spread(pairs)})
    return {"pairs": pairs, **spread(pairs)}


def spread(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and most of each figure over the seeds."""
    figures: dict[str, Any] = {"no_worse": f"{sum(pair['no_worse'] for pair in pairs)} of {len(pairs)}"}
    for name in ("search_30", "random_60", "saved"):
        values = [pair[name] for pair in pairs]
        figures[name] = {"mean": statistics.mean(values), "least": min(values), "most": max(values)}
    return figures


def overhead(scratch: Path) -> dict[str, Any]:
    """Searches and bare trainings of the same parameters in turn, three times; the median of the ratios.

    What the search pays once (the probe, the gradient check, opening the study) is in it. What PyTorch imports at a
    process's first training is paid before, since both need it.
    """
    torch.set_num_threads(1)
    bare_trainings(scratch, [({"lr": 3e-3}, 64)])
    rounds = []
    for index in range(3):
        started = time.perf_counter()
        result = searched(scratch / f"overhead-{index}", n_trials=30, workers=1, seed=11, pruner="none")
        mine = time.perf_counter() - started
        bare = bare_trainings(scratch, [(row["params"], row["target_batch"]) for row in result.trials])
        rounds.append({"search": round(mine, 2), "bare": round(bare, 2), "overhead": mine / bare - 1})
        print(rounds[-1], flush=True)
    return {"rounds": rounds, "median": statistics.median(each["overhead"] for each in rounds), "trials": 30}


def bare_trainings(scratch: Path, trials: list[tuple[dict[str, Any], int]]) -> float:
    """Seconds that `fit` takes for these parameters and targets, with neither probe nor check."""
    samples, seconds = len(example().digits()[0][0]), 0.0
    for params, target in trials:
        plan = autoaccum.plan(target, target, optimizer="adamw", lr_batch=64, samples=samples, batch_norm_layers=2)
        kept = {
            "plan": plan.to_dict(),
            "params": params,
            "fit": {"seed": 11, "lr": params["lr"]},
            "seed": 11,
            "threads": 1,
        }
        (scratch / "best.json").write_text(json.dumps(kept))
        started = time.perf_counter()
        autoaccum.fit(**{**best_arguments(scratch / "best.json", setup), "check": False, "progress": False})
        seconds += time.perf_counter() - started
    return seconds


CHILD = """
import sys
sys.path.insert(0, {root!r})
from tests.benchmarks import search
from pathlib import Path
if __name__ == "__main__":
    search.searched(Path({folder!r}), n_trials={trials}, workers=2, seed=11, storage={storage!r})
"""


def kills(scratch: Path) -> dict[str, Any]:
    """Kills the search's process group ten times, each at a random moment of its work, then finishes it.

    Each comes after none to three more trials have finished, and up to two seconds. It counts where it met a trial that
    was running. What was finished by then has to be there, unchanged, at the end.
    """
    figures: dict[str, Any] = {}
    for name, storage in (("journal", None), ("sqlite", f"sqlite:///{scratch}/kills.db")):
        folder = scratch / f"kills-{name}"
        script = scratch / f"kills_{name}.py"
        script.write_text(CHILD.format(root=str(ROOT), folder=str(folder), storage=storage, trials=KILLED_TRIALS))
        dice = random.Random(name)
        hit: list[int] = []  # trials that were running, by kill
        seen: dict[int, Any] = {}
        while len(hit) < KILLS:
            wanted, pause = ended_in(trials_in(storage, folder)) + dice.randrange(4), dice.uniform(0.0, 2.0)
            before = len(trials_in(storage, folder))
            process = subprocess.Popen(
                [sys.executable, str(script)], start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            while process.poll() is None:
                trials = trials_in(storage, folder)
                if len(trials) > before and ended_in(trials) >= wanted:
                    break
                time.sleep(0.2)
            time.sleep(pause)
            if process.poll() is not None:
                break  # it came to its end
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            trials = trials_in(storage, folder)
            running = sum(trial.state.name == "RUNNING" for trial in trials)
            hit += [running] if running else []
            seen |= {trial.number: trial.value for trial in trials if trial.state.name in ENDED}
        result = searched(folder, n_trials=KILLED_TRIALS, workers=2, seed=11, storage=storage)
        figures[name] = {"kills": len(hit), "trials_running_at_each": hit, **counted(result, seen)}
        print(name, figures[name], flush=True)
        write("kills", figures)
    return figures


def ended_in(trials: list[Any]) -> int:
    """How many of them came to an end of their own."""
    return sum(trial.state.name in ENDED for trial in trials)


def trials_in(storage: str | None, folder: Path) -> list[Any]:
    """The study's trials; none while there is no study."""
    place = storage or str(folder / "journal.log")
    if not Path(place.removeprefix("sqlite:///")).exists():
        return []
    with contextlib.suppress(KeyError, SetupError):
        return list(optuna.load_study(study_name="bench", storage=open_storage(place)).trials)
    return []


def counted(result: Any, seen: dict[int, Any]) -> dict[str, Any]:
    """How many trials there are of each kind, what of `seen` is no more, and what was trained twice to its end."""
    states = Counter(row["state"] for row in result.trials)
    finished = [row for row in result.trials if row["state"] not in ("killed", "running")]
    settings = Counter(json.dumps(row["params"], sort_keys=True) for row in finished)
    kept = {trial.number: trial.value for trial in result.study.get_trials(deepcopy=False)}
    return {
        "asked": KILLED_TRIALS, "finished": len(finished), "states": dict(states),
        "finished_twice": sum(times - 1 for times in settings.values()),
        "finished_before_a_kill": len(seen), "of_these_lost": sum(kept.get(n) != value for n, value in seen.items()),
        "repeats": sum(row["repeats"] is not None for row in result.trials),
    }  # fmt: skip


def write(part: str, figures: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "torch": torch.__version__}
    kept[part] = {"machine": machine, **figures}
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")


def main(parts: list[str]) -> None:
    known = {"overhead": overhead, "kills": kills, "quality": quality, "example": of_the_example}
    scratch = Path(tempfile.mkdtemp(prefix="autoaccum-search-"))
    try:
        for part in parts or known:
            write(part, known[part](scratch))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
