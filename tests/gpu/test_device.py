"""The CUDA device on a real GPU: its budget, its hard limit, its counters, and who NVML says is there."""

import os
import subprocess
import sys

import pytest
import torch

from autoaccum.memory.budget import Budget
from autoaccum.memory.device import devices, open_device
from autoaccum.memory.nvml import gpu_info, pids_are_ours
from autoaccum.memory.oom import Verdict, out_of_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIB = 2**20


def block(mib: int) -> torch.Tensor:
    return torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")


@pytest.fixture
def gpu():
    device = open_device("cuda")
    block(1)  # the context exists from here on
    device.release()
    return device


def test_the_budget_is_what_cuda_says_is_free_and_what_this_process_holds(gpu):
    kept = block(64)
    free, total = torch.cuda.mem_get_info(gpu.torch_device)
    budget = gpu.budget()
    assert gpu.total() == pytest.approx(total, rel=0.01)
    assert budget.bytes == pytest.approx(free + torch.cuda.memory_reserved(), abs=64 * MIB)  # others come and go
    assert gpu.name in budget.reason
    del kept


def test_a_hard_limit_makes_an_overrun_a_real_error_and_is_put_back(gpu):
    before = gpu._fraction()
    budget = gpu.budget(gpu.reserved() + 256 * MIB)
    with gpu.limit(budget):
        inside = block(200)
        del inside
        with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
            block(400)
        assert out_of_memory(caught.value) is Verdict.SURELY
    assert gpu._fraction() == pytest.approx(before)
    outside = block(400)
    assert outside.numel() == 400 * MIB


def test_a_hard_limit_allows_its_last_byte(gpu):
    size = 64 * MIB  # a multiple of the allocator's segment, so that one byte less would refuse it
    with gpu.limit(Budget(gpu.reserved() + size, "", True, "torch")):
        assert block(64).numel() == size


def test_a_retry_of_the_allocator_is_counted(gpu):
    with gpu.limit(Budget(gpu.reserved() + 256 * MIB, "", True, "torch")):
        before = gpu.retries()
        cached = block(160)
        del cached
        kept = block(200)  # fits only once the cache is given back
        assert gpu.retries() == before + 1
        del kept


def test_peaks_are_counted_from_the_reset_on(gpu):
    start = gpu.allocated()
    large = block(256)
    del large
    gpu.release()
    gpu.reset_peak()
    small = block(64)
    del small
    assert gpu.allocated() == start
    assert gpu.peak() == start + 64 * MIB
    assert gpu.peak() <= gpu.reserved_peak() < start + 256 * MIB


def test_release_gives_back_the_cache_and_the_workspaces_of_cublas(gpu):
    gpu.release()
    start = gpu.allocated()
    factors = torch.ones(64, 64, device="cuda")
    product = factors @ factors
    del factors, product
    gpu.synchronize()
    gpu.release()
    assert gpu.allocated() == start


def test_nvml_finds_this_gpu_by_its_uuid_and_this_process_on_it(gpu):
    info, why = gpu_info(str(torch.cuda.get_device_properties(gpu.torch_device).uuid))
    if info is None:
        pytest.skip(f"NVML: {why}")
    assert info.total == pytest.approx(gpu.total(), rel=0.05)
    if pids_are_ours():
        assert os.getpid() in [process.pid for process in info.processes]
    row = devices()[gpu.torch_device.index]
    assert (row["device"], row["driver"]) == (str(gpu.torch_device), info.driver)


POISON = """
import torch
from autoaccum.memory.oom import Verdict, out_of_memory, poisons

def attempt():
    try:
        torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")].cpu()
    except RuntimeError as error:
        return error

for _ in range(2):
    error = attempt()
    assert poisons(error), error
    assert out_of_memory(error) is Verdict.NO
"""


def test_a_device_side_assert_is_seen_to_poison_the_context():
    run = subprocess.run([sys.executable, "-c", POISON], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
