"""Ranks over NCCL, whose tensors live on the GPU: as many ranks as one GPU allows, which is one."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_nccl_available(), reason="needs NCCL"),
]

ALONE = """
import sys
import torch
import torch.distributed as dist
from autoaccum import ranks
from autoaccum.model.precision import SideBuffers
from autoaccum.window.rank_sum import RankSum

torch.cuda.set_device(0)
dist.init_process_group("nccl", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
here = ranks.here(torch.device("cuda", 0))
assert here.tally("a test", [1.5, 2.0]) == [1.5, 2.0]
assert here.gather("a test", 10**15) == [10**15]
assert here.any("a test", True) and not here.any("a test", False)
flags = here.broadcast("a test", torch.tensor([True, False]))
assert flags.tolist() == [True, False] and flags.device.type == "cpu"
dense = torch.randn(3, 4, device="cuda")
before = dense.clone()
here.sum("a test", [dense, dense.T.contiguous().T])
assert torch.equal(dense, before)
embed = torch.nn.Embedding(6, 2, sparse=True).cuda()
embed(torch.tensor([1, 1, 3], device="cuda")).sum().backward()
rows, total = embed.weight.grad.to_dense(), RankSum(here, [embed.weight], SideBuffers([]))
total.ready()
total.level("a test")
total.run()
assert embed.weight.grad.is_sparse and torch.equal(embed.weight.grad.to_dense(), rows)
dist.destroy_process_group()
"""


def test_a_rank_over_nccl_speaks_through_the_gpu(tmp_path):
    command = [sys.executable, "-c", ALONE, str(tmp_path / "rendezvous")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
