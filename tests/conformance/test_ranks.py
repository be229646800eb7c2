"""Two processes over gloo, started by torchrun as a user's script would be: one window over both."""

import importlib.util
import itertools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conformance.heads import SINGLE
from tests.conformance.problems import difference
from tests.conformance.two_ranks import PROBLEMS

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch is built without torch.distributed"),
    pytest.mark.timeout(600),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both ranks found for a trainer's problem; torchrun is started once for all that may run together."""
    started = {}

    def both(trainer, name):
        pair = f"{trainer.name}:{name}"
        pairs = next(pairs for pairs in together() if pair in pairs)
        if pairs not in started:
            folder = tmp_path_factory.mktemp("ranks")
            started[pairs] = (folder, start(folder, pairs))
        folder, ended = started[pairs]
        files = [folder / f"{pair}-{rank}.pt" for rank in range(2)]
        if not all(file.exists() for file in files):
            raise (TimeoutError if ended.startswith("nothing came") else RuntimeError)(ended or "no result")
        return [torch.load(file, weights_only=False) for file in files]

    return both


def together():
    """Pairs TRAINER:PROBLEM that one start trains in turn; what ends a peer in an error is started apart."""
    llama = ("llama",) if importlib.util.find_spec("transformers") else ()
    each = ("tokens", *llama, "schedule", "branch, looked for", "branch, last window", "branch")
    ours = [f"autoaccum:{name}" for name in (*each, "unequal")] + [f"Accumulator:{name}" for name in each]
    yield tuple(ours)
    for attached in ("transformers + attach", "lightning + attach"):
        yield tuple(f"{attached}:{name}" for name in each)
    for peer in ("transformers", "accelerate", "lightning", "ignite"):
        recipe = ("accelerate, recipe:tokens",) if peer == "accelerate" else ()
        yield (*recipe, *(f"{peer}:{name}" for name in each[:-1]))
        yield (f"{peer}:branch",)


def start(folder, pairs, timeout=120):
    """Runs torchrun; how it ended: "" where all went well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.conformance.two_ranks", str(folder), *pairs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun and both ranks, a session of their own
            process.wait()
            return f"nothing came for {timeout} seconds"
    if code == 0:
        return ""
    said = (folder / "output.txt").read_text(errors="replace").splitlines()
    errors = [line.split("]:")[-1].strip() for line in said if "Error" in line and "elastic" not in line]
    return errors[0] if errors else f"exit code {code}"


def compare(figures, label, found, problem, windows, within=1e-10):
    """The worse of the two ranks: each steps its own copy of the model."""
    expected = [problem.whole(samples) for samples in windows]
    for each in found:
        each["gradients"] += [[None] * len(expected[0])] * (len(expected) - len(each["gradients"]))
    worst = max(
        (difference(got, want) for each in found for got, want in zip(each["gradients"], expected)),
        key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0],
    )
    figures.error(label, *worst, within=within)


@pytest.mark.case(12, "two ranks, unequal tokens on the ranks")
@pytest.mark.parametrize("name", ["tokens", "llama"])
def test_tokens_weigh_alike_on_whichever_rank_they_are(trainer, figures, results, name):
    """At stake: the mean of the ranks' means, where one rank has three times the labels of the other; and the factor of
    the world size that a sum over ranks must not carry."""
    if name == "llama":
        pytest.importorskip("transformers")
    label = {"tokens": "causal language model", "llama": "LlamaForCausalLM (float32 inside)"}[name]
    problem = PROBLEMS[name]()
    if trainer.name == "accelerate, recipe" and problem.summed is None:
        figures.not_offered(label, "the guide's recipe is for losses over labels")
        return
    found = figures.attempt(label, lambda: results(trainer, name))
    if found is not None:
        compare(figures, label, found, problem, problem.windows(2), SINGLE if name == "llama" else 1e-10)


@pytest.mark.case(13, "two ranks, a branch used in one micro-batch only")
@pytest.mark.parametrize("name", ["branch", "branch, last window", "branch, looked for"])
def test_a_branch_that_one_micro_batch_uses(trainer, figures, results, name):
    """At stake: DistributedDataParallel waits for gradients in the last micro-batch's backward. A parameter that has
    none there keeps what its own rank has, or the training ends in an error, or two ranks drift apart in silence."""
    label = {
        "branch": "two windows",
        "branch, last window": "a single window",
        "branch, looked for": "two windows, find_unused_parameters=True",
    }[name]
    if trainer.name == "accelerate, recipe":
        figures.not_offered(label, "measured without the recipe")
        return
    problem = PROBLEMS[name]()
    found = figures.attempt(label, lambda: results(trainer, name))
    if found is not None:
        compare(figures, label, found, problem, problem.windows(2))


@pytest.mark.case(14, "two ranks, different micro-batches and k on the ranks")
def test_ranks_may_cut_their_share_differently(trainer, figures, results):
    """At stake: a slow or small GPU beside a large one; whoever synchronises in a backward pass waits for the other."""
    label = "limits of 5 and 2"
    if not trainer.ours:
        figures.not_offered(label, "every rank has the same micro-batch and k")
        return
    if trainer.name == "Accumulator":
        pytest.skip("measured through fit, whose ranks tell each other their limits")
    found = results(trainer, "unequal")
    assert [each["sizes"] for each in found] == [[3, 3], [2]]
    problem = PROBLEMS["unequal"]()
    compare(figures, label, found, problem, problem.windows())


@pytest.mark.case(18, "schedule: one step an update")
def test_the_schedule_moves_once_an_update_on_two_ranks(trainer, figures, results):
    """At stake: a schedule that moves once for each rank is over in half the time."""
    if trainer.name == "accelerate, recipe":
        figures.not_offered("two ranks", "measured without the recipe")
        return
    found = figures.attempt("two ranks", lambda: results(trainer, "schedule"))
    if found is None:
        return
    rates = found[0]["rates"]
    moves = [math.log2(before / after) for before, after in itertools.pairwise(rates)]
    each = sum(moves) / len(moves) if moves else 0.0
    figures.verdict("two ranks", len(rates) == 4 and each == 1, f"{each:g} an update")
