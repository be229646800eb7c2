"""What fits how on several ranks: on real gloo ranks, by budgets between what each way takes; and the command line."""

import json
import os
import signal
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from autoaccum.cli.main import cli
from autoaccum.cli.ways import what_fits
from autoaccum.errors import AutoaccumError, SetupError
from tests.ranks_started import started
from tests.shards_work import grouped
from tests.warm import Command

fsdp = pytest.importorskip("torch.distributed.fsdp")
needs_fsdp = pytest.mark.skipif(
    not hasattr(getattr(fsdp, "FSDPModule", None), "reset_iter_state"), reason="this torch's FSDP cannot be replayed"
)

ROOT = str(Path(__file__).parents[1])
WIDTH = 16


class Block(nn.Module):
    """Keeps far more in the forward pass than it takes, so that checkpointing saves memory."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(torch.relu(self.up(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def build(**more):
    torch.manual_seed(0)
    data = torch.randn(64, 12, WIDTH), torch.arange(64) % 5
    return {"model": Net(), "data": data, "loss": nn.CrossEntropyLoss(), "device": "cpu", "optimizer": "adamw",
            "target_batch": 12, **more}  # fmt: skip


def answered(shard="auto", **more):
    """(way taken, rows, report's figures), or what was raised."""
    try:
        report, rows = what_fits(lambda: build(**more), shard)
    except (AutoaccumError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    taken = next(row["way"] for row in rows if row["taken"])
    peaks = {trial.batch: trial.peak_bytes for trial in report.trials if trial.kind == "verify"}
    return {"way": taken, "rows": rows, "ladder": report.ladder, "size": report.micro_batch, "limit": report.limit,
            "plan": [report.plan.ladder, list(report.plan.limits)], "notes": " ".join(report.notes),
            "right": peaks[report.micro_batch] == report.forecast(report.micro_batch)}  # fmt: skip


def work(rank, folder):
    with grouped(rank, 2, folder):
        found = {"much": answered()}
        whole, shards, least = (max(row["peak_bytes"]) for row in found["much"]["rows"])
        found["peaks"] = [whole, shards, least]
        found["less"] = answered(memory=(whole + shards) // 2)
        found["least"] = answered(memory=(shards + least) // 2)
        found["nothing"] = answered(memory=least - 1)
        found["no blocks"] = answered("full", model=nn.Sequential(nn.Flatten(), nn.Linear(12 * WIDTH, 5)))
        found["few"] = answered("full", target_batch=1)
        model = Net()
        found["optimizer"] = answered("full", model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        found["user"] = answered("full", loss=lambda outputs, targets: outputs.sum() if rank else 1 // 0)
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ways")
    started(work, 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@needs_fsdp
@pytest.mark.parametrize(
    ("budget", "way", "ladder"),
    [("much", "replicated", None), ("less", "sharded", None), ("least", "sharded with checkpointing", "checkpointing")],
)
def test_the_first_way_that_fits_is_run_and_all_are_forecast(found, budget, way, ladder):
    for each in found:
        answer = each[budget]
        assert answer["way"] == way
        assert [answer["ladder"], answer["plan"][0]] == [ladder, ladder]
        assert answer["right"]
        assert [row["way"] for row in answer["rows"]] == ["replicated", "sharded", "sharded with checkpointing"]
        assert all(len(row["peak_bytes"]) == 2 and min(row["peak_bytes"]) > 0 for row in answer["rows"])
        fits = [row["fits"] for row in answer["rows"]]
        assert fits == sorted(fits)  # what comes later takes less here
        assert answer["plan"][1] == next(row for row in answer["rows"] if row["taken"])["limits"] or answer["size"] < 12


@needs_fsdp
def test_each_way_takes_less_than_the_one_before_and_the_blocks_are_named(found):
    whole, shards, least = found[0]["peaks"]
    assert whole > shards > least
    assert "each of 2 repeated blocks (blocks.0 to blocks.1)" in found[0]["less"]["notes"]


@needs_fsdp
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("nothing", "NothingFitsError: replicated: not even one sample fits"),
        ("no blocks", "SetupError: no repeated blocks were found"),
        ("few", "SetupError: target_batch=1 is less than the 2 ranks"),
        ("optimizer", "SetupError: TARGET's optimizer holds the parameters of the model as it was"),
        ("user", "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_answered_is_refused_on_all_ranks(found, case, said):
    assert all(each[case].startswith((said, "AutoaccumError: rank")) for each in found), found[0][case]
    assert any(each[case].startswith(said) for each in found)


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["--nproc", "0"], {}, "0 is not in the range"),
        (["--shard", "full"], {}, "about several ranks: give --nproc N"),
        (["--shard", "half"], {}, "'half' is not one of"),
        (["--nproc", "2", "--isolate"], {}, "leave --isolate and --no-isolate out"),
        (["--nproc", "2"], {"WORLD_SIZE": "4"}, "torchrun has started the ranks already"),
    ],
)
def test_options_that_say_different_things_of_the_ranks_are_usage_errors(words, environment, said):
    result = CliRunner().invoke(cli, ["probe", "target.py:build", *words], env=environment)
    assert result.exit_code == 2
    assert said in result.output


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(SetupError, match="4 ranks on a machine with 1 GPUs"):
        what_fits(lambda: build(device="cuda"), "none")


TARGET = """
import os, signal, time
from tests.test_cli_ways import build

def dies():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)

def waits():
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


def command(folder, *words):
    (folder / "target.py").write_text(textwrap.dedent(TARGET))
    return Command("-m", "autoaccum", "probe", *words, cwd=folder, env={**os.environ, "PYTHONPATH": ROOT})


@needs_fsdp
@pytest.mark.slow
def test_the_command_line_starts_the_ranks_and_prints_one_object(tmp_path):
    run = command(tmp_path, "target.py:build", "--nproc", "2", "--shard", "full", "--json", "--no-progress",
                  "--save-plan", "plan.json")  # fmt: skip
    out, err = run.communicate()
    assert run.returncode == 0, err
    values = json.loads(out)
    assert values["world_size"] == 2
    assert [row["way"] for row in values["ways"]] == ["sharded"]
    assert values["ways"][0]["taken"]
    assert json.loads((tmp_path / "plan.json").read_text())["target_batch"] == 12


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(tmp_path):
    run = command(tmp_path, "target.py:dies", "--nproc", "2", "--shard", "none")
    _, err = run.communicate()
    assert run.returncode == 1
    assert "Error: the process of rank 1 was killed by SIGKILL" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_ranks(tmp_path, number, code):
    run = command(tmp_path, "target.py:waits", "--nproc", "2", "--shard", "none")
    while len(ranks := run.stderr.read_text().split()) < 2:
        time.sleep(0.05)
    os.kill(run.pid, number)
    _, err = run.communicate(timeout=20)  # the launcher waits 30 s for ranks that do not end, and then kills them
    assert run.returncode == code, err
    assert "Traceback" not in err
    assert not any(psutil.pid_exists(int(rank)) for rank in ranks)
