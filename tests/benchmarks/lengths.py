"""Mixed-length text: windows cut by length against micro-batches of one size, on the text of examples/04_text.py.

    python -m tests.benchmarks.lengths

Both train on the same windows of the same samples, with the same loop. The one cuts each window by length. The other
runs micro-batches of one size, the largest at which the longest samples fit, in the order drawn, each padded to its own
longest. They take turns window by window, so that a machine that slows down slows both alike; what is compared is the
time of a window, data included, and real tokens per second, padding not counted. Before that the gradient of a window
is compared in float64, with the whole window at once as the reference.

The figures go to results/lengths.json.
"""

import importlib.util
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import autoaccum
from autoaccum.planning.length_rule import limit_at
from autoaccum.planning.plan import Plan
from tests.benchmarks.measure import median, table, write

EXAMPLE = Path(__file__).parents[2] / "examples" / "04_text.py"


@dataclass(frozen=True)
class Case:
    """A model's width and depth, the longest paragraph in bytes, and a budget."""

    width: int
    blocks: int
    longest: int
    memory: str
    target_batch: int = 64

    @property
    def name(self) -> str:
        return f"width {self.width}, {self.blocks} blocks, up to {self.longest} bytes, {self.memory}"


CASES = [Case(64, 2, 512, "24MiB"), Case(64, 2, 512, "48MiB"), Case(128, 3, 1024, "192MiB")]
WINDOWS = 24


def example(case: Case) -> Any:
    """examples/04_text.py as a module, with this case's sizes."""
    spec = importlib.util.spec_from_file_location("text_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.WIDTH, module.BLOCKS, module.LONGEST = case.width, case.blocks, case.longest
    return module


def arguments(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    text = example(case)
    torch.manual_seed(0)
    train, _ = text.paragraphs()
    data = DataLoader(train, batch_size=16, shuffle=True, collate_fn=text.pad)
    return {"model": text.LanguageModel().to(dtype), "data": data, "target_batch": case.target_batch, "seed": 0}


def of_one_size(plan: Plan, longest: int) -> Plan:
    """The same plan without a look at lengths: as many at once as fit of the longest samples that there are."""
    limit = limit_at(plan.by_length, longest)
    return replace(plan, by_length=()).with_limit(limit, f"{limit} of the longest samples fit at once")


def gradients(case: Case) -> dict[str, Any]:
    """The gradient of one window each way, in float64, against the whole window at once."""
    found: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    plan: Plan | None = None
    for name in ("by length", "one size", "at once"):
        given = arguments(case, torch.float64)
        model: nn.Module = given["model"]
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        if plan is not None:
            given["plan"] = plan if name == "by length" else of_one_size(plan, case.longest)
        if name == "at once":
            given.update(plan=None, micro_batch=case.target_batch)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        loop = autoaccum.prepare(
            **given, optimizer=sgd, lr_rule="none", memory=_doubled(case.memory), max_steps=1, check=False, cache=False
        )
        plan = loop.plan if plan is None else plan
        (record,) = list(loop)
        found[name] = before - torch.cat([p.detach().flatten() for p in model.parameters()])
        sizes[name] = record.micro_batches
    reference = found["at once"]
    errors = {name: float((found[name] - reference).norm() / reference.norm()) for name in found}
    return {"relative_error": errors, "micro_batches": sizes}


def _doubled(memory: str) -> str:
    return f"{2 * int(memory.removesuffix('MiB'))}MiB"


def speed(case: Case) -> dict[str, Any]:
    """Both, window by window in turn."""
    loop = autoaccum.prepare(**arguments(case), memory=case.memory, max_steps=WINDOWS, check=False, cache=False)
    plain = autoaccum.prepare(
        **arguments(case), plan=of_one_size(loop.plan, case.longest), max_steps=WINDOWS, check=False
    )
    loops = {"by length": loop, "one size": plain}
    running = {name: iter(each) for name, each in loops.items()}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    losses: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(WINDOWS):
        for name in list(running) if number % 2 == 0 else list(reversed(running)):
            started = time.perf_counter()
            record = next(running[name])
            seconds[name].append(time.perf_counter() - started)
            losses[name].append(record.loss)
    tokens = [record.tokens or 0 for record in loop.history]
    rates = {
        name: median([count / taken for count, taken in zip(tokens[1:], taken_all[1:])])
        for name, taken_all in seconds.items()
    }
    padded = sum(record.padded_tokens or 0 for record in loop.history)
    return {
        "case": case.name,
        "micro_batch_of_one_size": plain.plan.micro_batch,
        "micro_batches": {name: [record.micro_batches for record in each.history] for name, each in loops.items()},
        "tokens": sum(tokens),
        "padding": 1 - sum(tokens) / padded,
        "tokens_per_second": rates,
        "ratio": rates["by length"] / rates["one size"],
        "ratio_of_totals": sum(seconds["one size"][1:]) / sum(seconds["by length"][1:]),
        "last_losses": {name: values[-1] for name, values in losses.items()},
    }


def main() -> None:
    """All cases; a table on stdout."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["AUTOACCUM_CACHE"] = cache
        results = []
        for case in CASES:
            found = {**speed(case), "gradient": gradients(case)}
            results.append(found)
            print(case.name, f"{found['ratio']:.2f}", file=sys.stderr)
    write("lengths", {"windows": WINDOWS, "cases": results})
    rows = [
        [
            found["case"],
            f"{found['tokens_per_second']['by length']:,.0f}",
            f"{found['tokens_per_second']['one size']:,.0f}",
            f"{found['ratio']:.2f}",
            f"{found['padding']:.1%}",
            found["micro_batch_of_one_size"],
            f"{found['gradient']['relative_error']['by length']:.1e}",
        ]
        for found in results
    ]
    print(
        table(["case", "tokens/s", "one size", "ratio", "padding", "micro-batch of one size", "gradient error"], rows)
    )


if __name__ == "__main__":
    main()
