"""`make torture`: kills, out-of-memory errors, interrupts, a soak; a table on stdout, and the figures as JSON.

python -m tests.torture [--kills 200] [--shard-kills 100] [--ooms 500] [--interrupts 500] [--sharded 500]
    [--soak 20000] [--cost 15] [--seed 0] [--json FILE]

0 leaves a part out. Ends with 1 where something was not survived.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # forked children train on the CPU

import torch

from tests.torture import cost, interrupts, kills, ooms, shard_kills, sharded, soak

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=200, help="trainings that are killed at random moments")
    parser.add_argument("--shard-kills", type=int, default=100, help="sharded trainings of which ranks are killed")
    parser.add_argument("--ooms", type=int, default=500, help="injected out-of-memory errors")
    parser.add_argument("--interrupts", type=int, default=500, help="SIGINTs in a probe, a check and a training")
    parser.add_argument("--sharded", type=int, default=500, help="errors in the passes of a model sharded on two ranks")
    parser.add_argument("--soak", type=int, default=20000, help="windows whose memory is watched")
    parser.add_argument("--cost", type=int, default=15, help="checkpoints whose cost is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures; a new file in results/ if not given")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    failures: list[str] = []
    if options.kills:  # first: a fork wants a young process
        killed = kills.run(options.kills, options.seed)
        found["kills"], failures = killed.to_dict(), failures + killed.failures
        _show("kills", found["kills"])
    if options.shard_kills:
        killed = shard_kills.run(options.shard_kills, options.seed)
        found["kills of sharded trainings"], failures = killed.to_dict(), failures + killed.failures
        _show("kills of sharded trainings", found["kills of sharded trainings"])
    if options.ooms:
        injected = ooms.run(options.ooms, options.seed)
        found["out of memory"], failures = injected.to_dict(), failures + injected.failures
        _show("out of memory", found["out of memory"])
    if options.interrupts:
        broken_off = interrupts.run(options.interrupts, options.seed)
        found["interrupts"], failures = broken_off.to_dict(), failures + broken_off.failures
        _show("interrupts", found["interrupts"])
    if options.sharded:
        found["sharded"] = sharded.run(options.sharded, options.seed)
        failures += found["sharded"]["failures"]
        _show("sharded", found["sharded"])
    if options.cost:
        found["checkpoints"] = cost.run(options.cost)
        _show("checkpoints", found["checkpoints"])
    if options.soak:
        found["soak"] = soak.run(options.soak).to_dict()
        _show("soak", found["soak"])
    _write(found, options.json)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def _show(title: str, figures: dict[str, Any]) -> None:
    print(title)
    for name, value in figures.items():
        if name != "failures":
            print(f"  {name:36} {value:.3g}" if isinstance(value, float) else f"  {name:36} {value}", flush=True)


def _write(found: dict[str, Any], path: Path | None) -> None:
    if path is None:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{time.strftime('%Y-%m-%d-%H%M%S')}.json"
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version(),
               "torch": torch.__version__, "threads": torch.get_num_threads()}  # fmt: skip
    path.write_text(json.dumps({"machine": machine, **found}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
