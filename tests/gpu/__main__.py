"""`make gpu`: everything that needs a GPU. Prints a table, writes JSON under tests/gpu/results/; skips and says why.

The probe runs under real caps on PyTorch's allocator (`set_per_process_memory_fraction`), and beside it stands the
limit found by running every size there: bisection with two windows a size.
"""

import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

import autoaccum
from autoaccum.memory.device import open_device
from autoaccum.memory.oom import Verdict, out_of_memory
from tests.architectures import ARCHITECTURES, Architecture

RESULTS = Path(__file__).parent / "results"
CAPS_MIB = (256, 1024)
CEILING = 4096


def windows_fit(architecture: Architecture, size: int, cap: int, windows: int = 2) -> bool:
    """Whether windows of two micro-batches run at `size` under the cap."""
    device = open_device("cuda")
    torch.manual_seed(0)
    try:
        with device.limit(device.budget(cap)):
            model = architecture.make().to("cuda")
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            batch = to_cuda(architecture.samples(size))
            for _ in range(windows):
                for _ in range(2):
                    architecture.step(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            torch.cuda.synchronize()
    except Exception as error:
        if out_of_memory(error) is Verdict.NO:
            raise
        fits = False
    else:
        fits = True
    model = optimizer = batch = None
    device.release()
    return fits


def to_cuda(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: value.to("cuda") for key, value in batch.items()}
    return tuple(value.to("cuda") for value in batch)


def true_limit(architecture: Architecture, cap: int) -> int:
    low, high = 0, 1
    while high <= CEILING and windows_fit(architecture, high, cap):
        low, high = high, high * 2
    high = min(high, CEILING + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if windows_fit(architecture, middle, cap) else (low, middle)
    return low


def probed(architecture: Architecture, cap: int) -> autoaccum.ProbeReport:
    torch.manual_seed(0)
    return autoaccum.probe(
        architecture.make(), architecture.samples(CEILING), loss=architecture.loss, memory=cap, device="cuda",
        precision="fp32", cache=False, max_batch=CEILING,
    )  # fmt: skip


def measure(architecture: Architecture, cap: int) -> dict[str, Any]:
    started = time.perf_counter()
    report = probed(architecture, cap)
    seconds = time.perf_counter() - started
    open_device("cuda").release()
    true = true_limit(architecture, cap)
    verified = [trial for trial in report.trials if trial.peak_bytes is not None and trial.batch == report.micro_batch]
    measured = verified[-1].peak_bytes or 1
    forecast = report.forecast(report.micro_batch) if report.forecaster is not None else None
    return {
        "model": architecture.name,
        "cap_mib": cap // 2**20,
        "found": report.micro_batch,
        "true": true,
        "ratio": report.micro_batch / true if true else None,
        "trials": [trial.to_dict() for trial in report.trials],
        "ooms": report.out_of_memory_count,
        "residual": report.residual,
        "forecast_error": None if forecast is None else forecast / measured - 1,
        "survives_ten_windows": windows_fit(architecture, report.micro_batch, cap, windows=10),
        "seconds": seconds,
        "notes": list(report.notes),
    }


def main() -> int:
    if not torch.cuda.is_available():
        print("skipped: no CUDA device can be seen, and everything here needs one")
        return 0
    RESULTS.mkdir(exist_ok=True)
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "python": sys.version.split()[0]}
    name = f"{facts['device'].replace(' ', '-')}-torch-{torch.__version__.split('+')[0]}"
    path = RESULTS / f"probe-{name}.json"
    rows: list[dict[str, Any]] = []
    print(
        f"{'model':24}{'cap':>10}{'found':>8}{'true':>8}{'ratio':>8}{'OOMs':>6}{'forecast error':>16}{'survives':>10}"
    )
    for architecture in ARCHITECTURES:
        for cap in CAPS_MIB if architecture.installed else ():
            rows.append(attempted(architecture, cap))
            print(line(rows[-1]), flush=True)
            # After every row, so that nothing is lost where the time runs out.
            path.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(path, flush=True)
    # The tests' own figures (record_property) are in the file as well.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/gpu",
        "-q",
        "--tb=short",
        f"--junitxml={RESULTS}/tests-{name}.xml",
    ]
    return max(subprocess.run(command, check=False).returncode, int(any("error" in row for row in rows)))


def attempted(architecture: Architecture, cap: int) -> dict[str, Any]:
    """The row of one model under one cap in MiB; where it raises, the error is the row."""
    try:
        return measure(architecture, cap * 2**20)
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        return {"model": architecture.name, "cap_mib": cap, "error": f"{type(error).__name__}: {error}", "at": text}
    finally:
        open_device("cuda").release()


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['model']:24}{row['cap_mib']:>6} MiB  {' '.join(row['error'].split())[:200]}"
    error = "-" if row["forecast_error"] is None else f"{row['forecast_error']:.2%}"
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
    return (
        f"{row['model']:24}{row['cap_mib']:>6} MiB{row['found']:>8}{row['true']:>8}{ratio:>8}{row['ooms']:>6}"
        f"{error:>16}{row['survives_ten_windows']!s:>10}"
    )


if __name__ == "__main__":
    sys.exit(main())
