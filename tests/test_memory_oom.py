"""The table of errors: a real message for every row, and the real errors of a process that runs out of memory."""

import errno
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.errors import AutoaccumError, DeviceError
from autoaccum.memory.oom import RULES, Verdict, out_of_memory, poisons

SURELY, PERHAPS, GRID, NO = Verdict.SURELY, Verdict.PERHAPS, Verdict.GRID, Verdict.NO

# As PyTorch, the libraries below it, and users' reports have them.
MESSAGES = [
    (SURELY, "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which ..."),
    (SURELY, "HIP out of memory. Tried to allocate 20.00 MiB (GPU 0; 15.98 GiB total capacity; ...)"),
    (SURELY, "XPU out of memory. Tried to allocate 4.66 GiB. GPU 0 has a total capacity of 5.65 GiB ..."),
    (
        SURELY,
        "MPS backend out of memory (MPS allocated: 17.22 GB, other allocations: 384.00 KB, max allowed: 18.13 GB)",
    ),
    (SURELY, "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"),
    (SURELY, "CUDA driver error: out of memory"),
    (SURELY, "CUDA_ERROR_OUT_OF_MEMORY"),
    (SURELY, "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    (SURELY, "Caught OutOfMemoryError in pin memory thread for device 0.\nCUDA out of memory."),
    (SURELY, "cudaErrorMemoryAllocation: the API call failed"),
    (SURELY, "hipErrorOutOfMemory"),
    (SURELY, "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    (SURELY, "level_zero backend failed with error: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)"),
    (SURELY, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (SURELY, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    (SURELY, "cuFFT error: CUFFT_ALLOC_FAILED"),
    (SURELY, "MIOpen Error: miopenStatusAllocFailed"),
    (
        SURELY,
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 1073741824 bytes. Error code 12 (Cannot allocate memory)",
    ),
    (
        SURELY,
        "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: "
        "you tried to allocate 1073741824 bytes.",
    ),
    (SURELY, "std::bad_alloc"),
    (SURELY, "bad allocation"),
    (SURELY, "unable to mmap 4096 bytes from file </torch_1_2_3>: Cannot allocate memory (12)"),
    (GRID, "CUDA error: invalid configuration argument\nCUDA kernel errors might be asynchronously reported"),
    (GRID, "input tensor must fit into 32-bit index math"),
    (GRID, "Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, but got false."),
    (GRID, "Storage size calculation overflowed with sizes=[4611686018427387904, 8]"),
    (GRID, "Invalid buffer size: 19.45 GB"),
    (
        GRID,
        "Output size of the matrix multiplication is larger than currently supported by the MPS backend: "
        "72250,72250, needs to be less than 2**32 elements",
    ),
    (GRID, "MPSGraph does not support tensor dims larger than INT_MAX"),
    (
        PERHAPS,
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    ),
    (PERHAPS, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    (PERHAPS, "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    (PERHAPS, "GET was unable to find an engine to execute this computation"),
    (PERHAPS, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    (PERHAPS, "could not create a primitive"),
    (PERHAPS, "could not create a memory object"),
    (PERHAPS, "could not execute a primitive"),
    (PERHAPS, "Native API failed. Native API returns: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
    (NO, "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`"),
    (NO, "CUDA error: an illegal memory access was encountered"),
    (NO, "CUDA error: misaligned address"),
    (NO, "CUDA error: unspecified launch failure"),
    (NO, "CUDA error: the launch timed out and was terminated"),
    (NO, "CUDA error: uncorrectable ECC error encountered"),
    (NO, "Native API failed. Native API returns: 20 (UR_RESULT_ERROR_DEVICE_LOST)"),
]

# Nothing in the table: they must not be taken for memory.
UNRELATED = [
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit.",
    "element 0 of tensors does not require grad and does not have a grad_fn",
    "CUDA error: no kernel image is available for execution on the device",
    "CUDA error: too many resources requested for launch",
]


@pytest.mark.parametrize(("verdict", "message"), MESSAGES, ids=[message[:50] for _, message in MESSAGES])
def test_the_table_judges_each_message(verdict, message):
    assert out_of_memory(RuntimeError(message)) is verdict


def test_every_row_of_the_table_has_a_message_that_only_it_decides():
    decided = {RULES.index(next(rule for rule in RULES if _matches(rule, message))) for _, message in MESSAGES}
    assert decided == set(range(len(RULES)))


def _matches(rule, message: str) -> bool:
    return re.search(rule.pattern, message, re.IGNORECASE | re.DOTALL) is not None


@pytest.mark.parametrize("message", UNRELATED)
def test_other_runtime_errors_are_not_memory(message):
    assert out_of_memory(RuntimeError(message)) is NO


@pytest.mark.parametrize(
    ("verdict", "error"),
    [
        (SURELY, torch.cuda.OutOfMemoryError("injected")),
        (SURELY, MemoryError()),
        (PERHAPS, OSError(errno.ENOMEM, "Cannot allocate memory")),
        (NO, OSError("libx.so: cannot allocate memory in static TLS block")),
        (NO, OSError(errno.ENOSPC, "No space left on device")),
        (NO, ValueError("out of memory is not a valid mode")),
        (NO, KeyError("CUDA out of memory")),
    ],
    ids=repr,
)
def test_types_count_where_messages_say_nothing(verdict, error):
    assert out_of_memory(error) is verdict


def _raised(outer: BaseException, inner: BaseException, *, how: str) -> BaseException:
    try:
        try:
            raise inner
        except BaseException:
            if how == "from":
                raise outer from inner
            if how == "from None":
                raise outer from None
            raise outer  # noqa: B904 - the context alone is what is tried
    except BaseException as error:
        return error


def test_an_error_raised_from_an_out_of_memory_error_is_one():
    inner = torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert out_of_memory(_raised(ValueError("the layer failed"), inner, how="from")) is SURELY
    assert out_of_memory(_raised(ValueError("the layer failed"), inner, how="context")) is SURELY
    assert out_of_memory(_raised(ValueError("the layer failed"), inner, how="from None")) is NO


def test_the_outermost_error_that_says_anything_decides():
    error = _raised(RuntimeError("could not create a primitive"), MemoryError(), how="context")
    assert out_of_memory(error) is PERHAPS


def test_an_interrupt_or_our_own_error_is_never_memory_whatever_it_was_raised_from():
    inner = MemoryError()
    assert out_of_memory(_raised(KeyboardInterrupt(), inner, how="context")) is NO
    assert out_of_memory(_raised(AutoaccumError("nothing fits"), inner, how="from")) is NO


def test_a_poisoned_context_is_known_and_never_memory():
    poison = RuntimeError("CUDA error: device-side assert triggered")
    assert poisons(poison)
    assert poisons(_raised(torch.cuda.OutOfMemoryError("later"), poison, how="context"))
    assert out_of_memory(_raised(torch.cuda.OutOfMemoryError("later"), poison, how="context")) is NO
    assert not poisons(torch.cuda.OutOfMemoryError("CUDA out of memory"))


def test_a_chain_that_loops_ends():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert out_of_memory(first) is NO


# Each attempt in a fork of its own: the libraries below PyTorch may also crash where they find no memory at all.
STARVED = """
import os, resource
import torch
import torch.nn.functional as F
from autoaccum.memory.oom import out_of_memory

FREE = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

def starve(spare):
    used = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (int(used.split()[1]) * 1024 + spare, FREE[1]))

def convolve(i):
    channels, size = 8 + (i * 7) % 120, 8 + (i * 5) % 40
    x = torch.randn(2, channels, size, size, requires_grad=True)
    w = torch.randn(channels + i % 5 + 1, channels, 3, 3, requires_grad=True)
    F.relu(F.conv2d(x, w, padding=1)).sum().backward()

def attempt(spare, f):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    error = None
    starve(spare)
    try:
        f()
    except Exception as raised:
        error = raised
    resource.setrlimit(resource.RLIMIT_DATA, FREE)
    if error is not None:
        kind = "MemoryError" if isinstance(error, MemoryError) else str(error).replace("\\n", " ")
        os.write(1, f"{out_of_memory(error).name}: {kind}\\n".encode())
    os._exit(0)

torch.set_num_threads(1)
convolve(1)
attempt(2**26, lambda: torch.empty(2**28))
attempt(2**26, lambda: bytearray(2**28))
for i in range(60):
    attempt(i * 37 % 3000 * 1024, lambda: convolve(i))
"""


@pytest.fixture(scope="module")
def starved() -> list[str]:
    """What a process without memory raises, and how each error is judged: "VERDICT: message", one a line."""
    pytest.importorskip("resource", reason="resource limits are POSIX's")
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux counts all that a process has mapped against RLIMIT_DATA")
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    environment = {**os.environ, **allocator, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STARVED]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.slow
def test_pytorchs_real_allocation_error_is_out_of_memory(starved):
    assert starved[0].startswith("SURELY: ")
    assert "DefaultCPUAllocator: can't allocate memory" in starved[0]


@pytest.mark.slow
def test_pythons_real_memory_error_is_out_of_memory(starved):
    assert starved[1] == "SURELY: MemoryError"


@pytest.mark.slow
def test_onednns_real_error_is_perhaps_out_of_memory(starved):
    primitive = [line for line in starved if "could not create a" in line]
    if not primitive:
        pytest.skip("this build's convolutions did not fail inside oneDNN")
    assert all(line.startswith("PERHAPS: ") for line in primitive)


@pytest.mark.slow
def test_whatever_a_starved_process_raises_is_seen_to_be_about_memory(starved):
    assert len(starved) > 10
    assert [line for line in starved if not line.startswith(("SURELY: ", "PERHAPS: "))] == []


class Poisoned(nn.Module):
    """Fails as a model does whose device was left unusable, once so many samples run at once."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.layer, self.at = nn.Linear(3, 1), at

    def forward(self, x):
        if len(x) >= self.at:
            raise RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronous")
        return self.layer(x)


def test_a_training_on_a_device_that_became_unusable_says_so_and_where_to_go_on(tmp_path):
    rows = torch.randn(16, 3), torch.randn(16, 1)
    with pytest.raises(DeviceError, match=r"no longer be used .*device-side assert triggered.*nothing was saved yet"):
        autoaccum.fit(Poisoned(4), rows, loss=nn.MSELoss(), target_batch=8, micro_batch=4, check=False,
                      checkpoint=tmp_path, device="cpu", progress=False)  # fmt: skip


def test_a_probe_that_leaves_the_device_unusable_points_to_a_child_process():
    rows = torch.randn(64, 3), torch.randn(64, 1)
    with pytest.raises(DeviceError, match="With isolate=True a child process is lost instead of this one"):
        autoaccum.probe(Poisoned(2), rows, loss=nn.MSELoss(), device="cpu", cache=False)
