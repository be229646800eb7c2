"""What a person does: the examples and the command line, in processes of their own, on real data."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import warm

ROOT = Path(__file__).parent.parent
EXAMPLE = "examples/01_first_fit.py:setup"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path))


def run(*arguments, seconds=560):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=seconds, check=False
    )


def command(*arguments):
    return SimpleNamespace(**dict(zip(("returncode", "stdout", "stderr"), warm.run("-m", "autoaccum", *arguments))))


@pytest.mark.slow
def test_the_first_example_trains_with_a_batch_that_does_not_fit():
    done = run("examples/01_first_fit.py")
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"held-out accuracy ([\d.]+)%", done.stdout).group(1))
    assert accuracy >= 97.0
    assert int(re.search(r"in (\d+) micro-batches", done.stdout).group(1)) >= 4
    assert "the fewest that fit" in done.stderr


@pytest.mark.slow
def test_the_two_loops_of_the_second_example_agree():
    done = run("examples/02_own_loop.py")
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"parameters is (\S+)", done.stdout).group(1)) < 1e-10


@pytest.mark.slow
def test_the_third_example_kills_a_training_and_ends_where_the_other_did():
    done = run("examples/03_resume.py")
    assert done.returncode == 0, done.stderr
    assert "64 windows in the end, as many as without the kill: 64" in done.stdout
    assert "bit for bit" in done.stdout


@pytest.mark.slow
def test_the_fourth_example_cuts_windows_of_text_by_length():
    done = run("examples/04_text.py")
    assert done.returncode == 0, done.stderr
    padded, plain = map(float, re.search(r"padding: ([\d.]+)% .* would have been ([\d.]+)%", done.stdout).groups())
    assert padded < 15
    assert plain > 40
    low, high = map(int, re.search(r"micro-batches: (\d+) to (\d+) a window", done.stdout).groups())
    assert low < high
    last, first = map(float, re.search(r"loss ([\d.]+) a byte, ([\d.]+) after one epoch", done.stdout).groups())
    assert last < first
    assert "micro-batches by length" in done.stderr


@pytest.mark.slow
def test_the_tenth_example_trains_a_sharded_model_on_two_ranks_of_unequal_memory():
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(getattr(fsdp, "FSDPModule", None), "reset_iter_state"):
        pytest.skip("this torch's FSDP cannot begin anew after an error")
    done = run("examples/10_sharded.py")
    assert done.returncode == 0, done.stderr
    shares = [int(count) for count in re.findall(r"of each window it trains (\d+) as", done.stdout)]
    assert len(shares) == 2
    assert sum(shares) == 256
    assert shares[0] != shares[1]
    assert float(re.search(r"held-out accuracy ([\d.]+)%", done.stdout).group(1)) > 85.0


def test_probe_prints_one_json_object_and_its_saved_plan_trains_without_a_probe(tmp_path):
    plan = tmp_path / "plan.json"
    done = command("probe", EXAMPLE, "--target-batch", "256", "--memory", "12MiB", "--json", "--save-plan", str(plan))
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert sum(values["micro_batches"]) == 256
    assert values["schema"] == 1
    assert max(values["micro_batches"]) == values["micro_batch"] <= values["limit"]
    assert "verify" in done.stderr

    done = command("fit", EXAMPLE, "--plan", str(plan), "--max-steps", "3", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["probe"] is None
    assert [record["samples"] for record in values["history"]] == [256, 256, 256]


@pytest.mark.slow
def test_verify_says_that_the_gradient_is_right():
    done = command("verify", EXAMPLE, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("probe", EXAMPLE, "--target-batch", "256", "--memory", "100KiB"), 3, "not even"),
        (("probe", "examples/no_such_file.py:setup"), 2, "no_such_file"),
        (("probe", EXAMPLE, "--memory", "12MiB", "--for", "RTX 4091"), 2, "RTX 4091"),
        (("plan", "--limit", "100"), 2, "target-batch"),
    ],
)
def test_exit_codes_and_one_clear_line(arguments, code, message):
    done = command(*arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_help_starts_without_torch():
    code = "import sys; sys.argv = ['autoaccum', '--help']\nfrom autoaccum.__main__ import main\ntry:\n    main()\n"
    code += "except SystemExit:\n    pass\nprint('torch' in sys.modules, file=sys.stderr)"
    assert run("-c", code).stderr.strip().endswith("False")
