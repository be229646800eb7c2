"""torchrun starts its ranks again after one was killed: the training goes on, and ends as if nothing had been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import autoaccum
from tests.ranks_lost import settings
from tests.ranks_work import Net, data, state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed"),
]

ROOT = Path(__file__).parents[1]
SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import autoaccum
from tests.ranks_lost import settings
from tests.ranks_work import Net, data, state

resume = {"auto": "auto", "False": False}[sys.argv[2]]
loop = autoaccum.prepare(Net(), data()[:2], checkpoint=sys.argv[1] + "/run", checkpoint_every=1, resume=resume,
                         epochs=2, seed=3, **settings(check=False))
started = loop.step
for record in loop:
    if record.step == 6 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
torch.save([started, loop.step, state(loop.model)], f"{sys.argv[1]}/{os.environ['RANK']}.pt")
"""


@pytest.mark.parametrize("resume", ["auto", "False"])
def test_a_restart_goes_on_where_the_last_checkpoint_was(tmp_path, resume):
    """Also with resume=False, which begins anew: the restart is of the training that began so."""
    (tmp_path / "script.py").write_text(SCRIPT)
    if resume == "False":  # something earlier, which the first start sets aside
        autoaccum.fit(Net(5), data()[:2], checkpoint=tmp_path / "run", max_steps=2, **settings(check=False))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, tmp_path / "script.py", tmp_path, resume],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-12000:]
    alone = autoaccum.fit(Net(), data()[:2], epochs=2, seed=3, **settings(check=False))
    for rank in range(2):
        started, step, ended = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert 4 <= started < step == 10
        for name, value in state(alone.model).items():
            torch.testing.assert_close(ended[name], value, rtol=1e-10, atol=1e-12)
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert [line["resumed_at"] > 0 for line in lines if line["event"] == "start"] == [False, True]
