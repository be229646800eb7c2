"""`make gpu`: what needs a GPU, as one script for ten minutes of one; the cheap truth first.

Each part is a process of its own with a budget of seconds. Rows go, as they come, as JSON lines to the folder that
AUTOACCUM_GPU_RESULTS names (tests/gpu/results unless set): what ran is kept, whatever ends the rest.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

RESULTS = Path(os.environ.get("AUTOACCUM_GPU_RESULTS") or Path(__file__).parent / "results")
TEST = ("-m", "pytest", "-q", "--tb=short")

# (name, seconds, what python is given). Parts of tests.gpu.models print JSON lines, which are the rows.
PARTS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("device and allocator", 100,
     (*TEST, "tests/gpu/test_device.py", "tests/gpu/test_savers.py", "tests/gpu/test_waits.py",
      "tests/gpu/test_ahead.py", "tests/gpu/test_allocator.py")),
    ("models under 24 GiB", 200, ("-m", "tests.gpu.models", "probe")),
    ("algorithms", 60, ("-m", "tests.gpu.models", "algorithms")),
    ("whole card", 40, ("-m", "tests.gpu.models", "whole")),
    ("finders", 40, ("-m", "tests.gpu.models", "finders")),
    ("loop", 30, ("-m", "tests.gpu.models", "loop")),
    ("allocator settings", 30, ("-m", "tests.gpu.models", "settings")),
    ("ladder, BatchNorm, NCCL", 60, (*TEST, "tests/gpu/test_ladder.py", "tests/gpu/test_batch_norm.py",
                                     "tests/gpu/test_nccl.py", "tests/gpu/test_own_loop.py")),
    ("snapshots", 20, ("-m", "tests.gpu.models", "snapshots")),
)  # fmt: skip


def main(names: Sequence[str]) -> int:
    if not torch.cuda.is_available():
        print("skipped: no CUDA device can be seen, and everything here needs one")
        return 0
    RESULTS.mkdir(parents=True, exist_ok=True)
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "python": sys.version.split()[0]}
    path = RESULTS / f"gpu-{facts['device'].replace(' ', '-')}-torch-{torch.__version__.split('+')[0]}.jsonl"
    path.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    failed = False
    for name, seconds, arguments in PARTS:
        if not names or name.split()[0] in names:
            failed |= not run(name, seconds, arguments, path)
    print(path)
    return int(failed)


def run(name: str, seconds: int, arguments: Sequence[str], path: Path) -> bool:
    """One part, its rows added to the file as they come; whether it ended well and in time."""
    print(f"\n{name}: at most {seconds} s", flush=True)
    began = time.monotonic()
    with path.open("a", encoding="utf-8") as rows:
        work = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
        watch = threading.Timer(seconds, work.kill)
        watch.start()
        assert work.stdout is not None
        for line in work.stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                rows.write(json.dumps({"part": name, **json.loads(line)}) + "\n")
                rows.flush()
        code, took = work.wait(), time.monotonic() - began
        watch.cancel()
        rows.write(json.dumps({"part": name, "seconds": round(took, 1), "exit": code}) + "\n")
    if code:
        print(f"{name}: {'out of time' if code < 0 else f'failed with {code}'} after {took:.0f} s", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
