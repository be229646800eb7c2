"""Devices and budgets: the real CPU, and stand-ins for the backends that this machine may lack."""

import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.errors import DeviceError, SetupError
from autoaccum.memory import accelerators, device
from autoaccum.memory.accelerators import AcceleratorDevice, CudaDevice, MpsDevice
from autoaccum.memory.budget import Budget, asked_bytes
from autoaccum.memory.device import CpuDevice, devices, open_device
from autoaccum.memory.host import HostMemory
from autoaccum.memory.nvml import GpuInfo, GpuProcess

GIB, MIB = 2**30, 2**20
NO_GPU = pytest.mark.skipif(
    torch.cuda.is_available() or device._accelerator() is not None, reason="for machines without an accelerator"
)


@pytest.fixture
def host(monkeypatch):
    """Sets what the host is said to have."""

    def say(available=10 * GIB, total=16 * GIB, kind="machine", reason="10.0 GiB of it"):
        monkeypatch.setattr(device, "host_memory", lambda: HostMemory(total, available, reason, kind))
        return CpuDevice()

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return say


@pytest.mark.parametrize("kind", ["machine", "cgroup"])
def test_on_a_host_a_tenth_of_what_is_available_stays_free(host, kind):
    budget = host(kind=kind).budget()
    assert budget == Budget(9 * GIB, "9.0 GiB: 10.0 GiB of it, 10% of it kept free for the system", False, "host")


@pytest.mark.parametrize("kind", ["data segment", "address space"])
def test_under_an_exact_limit_all_that_is_left_may_be_used(host, kind):
    budget = host(kind=kind).budget()
    assert (budget.bytes, budget.kind, budget.hard) == (10 * GIB, "data segment", False)


def test_what_the_training_holds_on_a_host_is_added(host):
    budget = host(kind="data segment").budget(held=3 * GIB)
    assert budget.bytes == 13 * GIB
    assert budget.reason == "13.0 GiB: 10.0 GiB of it, plus 3.0 GiB that this process holds already"


def test_processes_on_one_host_share_what_is_available(host, monkeypatch):
    cpu = host()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    budget = cpu.budget()
    assert budget.bytes == 4.5 * GIB
    assert "shared by 2 processes" in budget.reason
    assert host(kind="data segment").budget().bytes == 10 * GIB  # a process's own limit is not shared


@pytest.mark.parametrize(
    ("memory", "size"), [("64MiB", 64 * 2**20), (12345, 12345), ("80%", int(0.8 * 16 * GIB)), (" 50 % ", 8 * GIB)]
)
def test_memory_that_is_asked_for_is_taken_as_asked_and_is_hard(host, memory, size):
    budget = host(available=15 * GIB).budget(memory, held=GIB)
    assert (budget.bytes, budget.hard, budget.kind, budget.beyond) == (size, True, "torch", None)
    assert str(memory) in budget.reason


@pytest.mark.parametrize(("memory", "size"), [("12GiB", "12.0 GiB"), ("900GiB", "900.0 GiB"), ("75%", "12.0 GiB")])
def test_a_budget_beyond_what_is_free_on_a_host_is_what_is_free(host, memory, size):
    """A step over it would not raise: it would get the process killed, or bring the machine to a stand."""
    budget, without = host().budget(memory), host().budget()
    assert (budget.bytes, budget.hard, budget.kind) == (without.bytes, False, "host") == (9 * GIB, False, "host")
    assert budget.reason == f'{without.reason}; memory="{memory}" asks for {size}, which is not there to be used'
    assert budget.beyond is not None
    assert budget.beyond > 9 * GIB
    limited = host(kind="data segment", reason="RLIMIT_DATA allows 16.0 GiB").budget(memory)
    assert (limited.bytes, limited.kind) == (10 * GIB, "data segment")
    assert "RLIMIT_DATA allows 16.0 GiB" in limited.reason


@pytest.mark.parametrize(("memory", "size"), [(9 * GIB, 9 * GIB), (9 * GIB + 1, 9 * GIB), ("8GiB", 8 * GIB)])
def test_a_budget_up_to_what_is_free_on_a_host_is_taken_as_asked(host, memory, size):
    assert host().budget(memory).bytes == size


@pytest.mark.parametrize("memory", ["3GiBB", "0%", "100.5%", "-5%", "%", "eight", "", 0, -1, True, 0.8])
def test_memory_that_is_no_size_is_refused(host, memory):
    with pytest.raises(SetupError, match="memory"):
        host().budget(memory)


@given(share=st.floats(min_value=1e-6, max_value=100), total=st.integers(2**20, 2**42))
def test_a_share_is_never_more_than_the_device_and_never_nothing(share, total):
    size, _ = asked_bytes(f"{share:.9f}%", total)
    assert 1 <= size <= total


def test_the_real_cpu_has_a_budget_and_nothing_to_count():
    cpu = open_device("cpu")
    assert (cpu.type, cpu.torch_device) == ("cpu", torch.device("cpu"))
    assert "core" in cpu.name
    assert 0 < cpu.budget().bytes < cpu.free() * 1.05
    assert cpu.free() <= cpu.total()
    assert [cpu.peak(), cpu.reserved_peak(), cpu.allocated(), cpu.reserved()] == [None] * 4
    assert cpu.retries() == 0
    with cpu.limit(cpu.budget("1MiB")):
        assert torch.ones(2**20).sum() == 2**20  # nothing stops PyTorch on a CPU
    cpu.reset_peak()
    cpu.synchronize()
    cpu.release()


# --- Which device


def test_a_device_is_opened_by_name_or_object():
    assert open_device(torch.device("cpu")).type == open_device("cpu:0").type == "cpu"


@NO_GPU
def test_without_a_gpu_the_cpu_is_the_best_there_is():
    assert open_device().type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "", "meta", "cuda:-1", "cuda:99", "cuda:256", "cpu:3", "xpu:77"])
def test_a_device_that_is_not_there_is_refused_and_those_there_are_listed(name):
    with pytest.raises(DeviceError, match=r"There (is|are): .*cpu\. `autoaccum devices`"):
        open_device(name)


@NO_GPU
def test_cuda_without_cuda_says_why():
    with pytest.raises(DeviceError, match="built without CUDA" if torch.version.cuda is None else "no GPU can be seen"):
        open_device("cuda")


def test_the_host_is_a_row_of_devices_with_where_its_limit_comes_from(host):
    host(reason="cgroup v2 allows 16.0 GiB")
    row = devices()[-1]
    assert row["device"] == row["type"] == "cpu"
    assert (row["total"], row["free"], row["processes"], row["driver"]) == (16 * GIB, 10 * GIB, [], None)
    assert row["note"] == "cgroup v2 allows 16.0 GiB"


# --- CUDA, through a stand-in for torch.cuda


class FakeCuda:
    """torch.cuda of one process on one GPU: what the allocator does with a fraction, and the figures it reports."""

    def __init__(self, total=24 * GIB, free=20 * GIB, reserved=2 * GIB, current=0, count=1):
        self.size, self.left, self.held, self.current, self.count = total, free, reserved, current, count
        self.fraction, self.calls, self.error = 1.0, [], None

    def is_available(self):
        return self.count > 0

    def device_count(self):
        return self.count

    def current_device(self):
        return self.current

    def get_device_name(self, device):
        return "NVIDIA A10"

    def get_device_properties(self, device):
        return SimpleNamespace(total_memory=self.size, uuid="ffc79498-8ff3-c2dc-3b0d-fafd804516ae")

    def mem_get_info(self, device):
        if self.error:
            raise RuntimeError(self.error)
        return self.left, self.size

    def memory_stats(self, device):
        kinds = {"current": self.held, "peak": self.held + GIB}
        stats = {f"reserved_bytes.all.{kind}": value for kind, value in kinds.items()}
        return {**stats, "allocated_bytes.all.current": 1, "allocated_bytes.all.peak": 2, "num_alloc_retries": 3}

    def get_per_process_memory_fraction(self, device):
        return self.fraction

    def set_per_process_memory_fraction(self, fraction, device):
        assert isinstance(fraction, float)
        assert 0 <= fraction <= 1
        self.fraction = fraction
        self.calls.append(int(fraction * self.size))

    def reset_peak_memory_stats(self, device):
        self.calls.append("reset")

    def empty_cache(self):
        self.calls.append("empty")

    def synchronize(self, device):
        self.calls.append("synchronize")


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device over the stand-in; `others` is what NVML says: processes, or the reason for none."""

    def make(others=(), spills=False, **figures):
        api = FakeCuda(**figures)
        info = GpuInfo(24 * GIB, 19 * GIB, "580.65", tuple(others))
        answer = (None, others) if isinstance(others, str) else (info, "")
        monkeypatch.setattr(accelerators, "gpu_info", lambda uuid: answer)
        monkeypatch.setattr(accelerators, "pids_are_ours", lambda: True)
        monkeypatch.setattr(CudaDevice, "spills", spills)
        return CudaDevice(torch.device("cuda", 0), api), api

    return make


def test_a_gpus_budget_is_what_is_free_and_what_the_process_holds(gpu):
    cuda, _ = gpu()
    said = "20.0 GiB free on NVIDIA A10, plus 2.0 GiB that this process holds already; no other process uses it"
    assert cuda.budget() == Budget(22 * GIB, f"22.0 GiB: {said}", False, "torch")


def test_other_processes_on_a_gpu_are_named(gpu):
    mine = GpuProcess(os.getpid(), "python", GIB)
    cuda, _ = gpu([mine, GpuProcess(41, "jupyter", 3 * GIB), GpuProcess(42, None, None)])
    assert cuda.budget().reason.endswith("; 2 other processes on it (41 jupyter: 3.0 GiB, 42: unknown size)")


def test_without_nvml_cudas_own_figures_serve_and_the_reason_says_so(gpu):
    cuda, _ = gpu("NVML does not start (Driver Not Loaded)")
    assert cuda.budget().bytes == 22 * GIB
    assert cuda.budget().reason.endswith("; figures from CUDA alone: NVML does not start (Driver Not Loaded)")


def test_a_memory_fraction_that_the_user_set_bounds_the_budget(gpu):
    cuda, api = gpu()
    api.fraction = 0.5
    budget = cuda.budget()
    assert budget.bytes == 12 * GIB
    assert "this process's memory fraction allows 12.0 GiB" in budget.reason


def test_a_gpu_that_is_asked_for_more_than_it_has_gives_all_it_has(gpu):
    cuda, _ = gpu()
    assert cuda.budget("80GiB").bytes == 24 * GIB
    assert "taken as all that cuda:0 has; only 22.0 GiB is free now" in cuda.budget("80GiB").reason
    assert cuda.budget("50%") == Budget(12 * GIB, '12.0 GiB, as memory="50%" asks of 24.0 GiB', True, "torch")


def test_where_the_driver_spills_into_host_memory_every_budget_is_hard(gpu):
    cuda, _ = gpu(spills=True)
    assert cuda.budget().hard
    assert "spills into host memory" in cuda.budget().reason


def test_a_hard_budget_caps_the_allocator_and_the_cap_from_before_comes_back(gpu):
    cuda, api = gpu()
    with pytest.raises(MemoryError), cuda.limit(cuda.budget("8GiB")):
        raise MemoryError
    assert api.calls == ["empty", 8 * GIB, 24 * GIB]
    api.fraction = 0.25
    with cuda.limit(cuda.budget("8GiB")):
        assert api.fraction == 0.25
    assert api.fraction == 0.25


def test_a_budget_that_is_not_hard_leaves_the_allocator_alone(gpu):
    cuda, api = gpu()
    with cuda.limit(cuda.budget()):
        assert api.calls == []


def test_an_older_pytorch_that_cannot_tell_its_fraction_gets_all_back(gpu, monkeypatch):
    cuda, api = gpu()
    monkeypatch.delattr(FakeCuda, "get_per_process_memory_fraction")
    with cuda.limit(cuda.budget("8GiB")):
        pass
    assert api.fraction == 1.0


@given(total=st.integers(2**28, 2**42), share=st.floats(0, 1))
def test_the_cap_is_the_budget_to_the_byte(total, share):
    size = int(total * share)
    assert int(accelerators.fraction(size, total) * total) == size


def test_the_cap_never_costs_a_segment_on_a_real_cards_total():
    total = 25_438_126_080  # an A10 as CUDA reports it
    plain = [size for size in range(0, total, 2 * MIB) if int(size / total * total) != size]
    assert plain  # why the half byte is there
    assert all(int(accelerators.fraction(size, total) * total) == size for size in plain)


def test_a_gpus_counters_are_the_allocators(gpu):
    cuda, api = gpu()
    assert (cuda.allocated(), cuda.peak(), cuda.retries()) == (1, 2, 3)
    assert (cuda.reserved(), cuda.reserved_peak()) == (2 * GIB, 3 * GIB)
    cuda.reset_peak()
    cuda.synchronize()
    cuda.release()
    assert api.calls == ["reset", "synchronize", "empty"]


def test_a_gpu_that_does_not_answer_is_a_device_error_that_names_who_fills_it(gpu):
    cuda, api = gpu([GpuProcess(41, "jupyter", 23 * GIB)])
    api.error = "CUDA error: out of memory"
    with pytest.raises(DeviceError, match=r"cuda:0 \(NVIDIA A10\) does not answer: CUDA error: .*41 jupyter: 23.0 GiB"):
        cuda.budget()


def test_a_row_of_devices_names_the_holders_and_the_driver(gpu):
    cuda, api = gpu([GpuProcess(41, "jupyter", GIB)])
    api.error = "a context was made"  # only to look: half a gigabyte on every GPU
    assert cuda.describe() == {
        "device": "cuda:0",
        "type": "cuda",
        "name": "NVIDIA A10",
        "total": 24 * GIB,
        "free": 19 * GIB,
        "processes": [{"pid": 41, "name": "jupyter", "bytes": GIB}],
        "driver": "580.65",
        "note": "",
    }
    cuda, _ = gpu("NVML does not start")
    row = cuda.describe()
    assert (row["free"], row["note"]) == (20 * GIB, "without NVML: NVML does not start")


@pytest.fixture
def machine(monkeypatch):
    """Makes this process believe in a machine with so many GPUs."""

    def with_gpus(**figures):
        api = FakeCuda(**figures)
        monkeypatch.setattr(torch, "cuda", api)
        monkeypatch.setattr(device, "_accelerator", lambda: None)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        return api

    return with_gpus


def test_cuda_without_an_index_is_the_current_gpu_or_the_local_ranks(machine, monkeypatch):
    api = machine(count=2)
    assert [str(open_device(name).torch_device) for name in (None, "cuda")] == ["cuda:0", "cuda:0"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [str(open_device(name).torch_device) for name in (None, "cuda")] == ["cuda:1", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "7")  # another host's numbering, or one GPU shown to each process
    assert str(open_device().torch_device) == "cuda:0"
    api.current = 1
    assert str(open_device().torch_device) == "cuda:1"


@pytest.mark.parametrize("name", ["cuda:2", "cuda:256"])
def test_a_gpu_that_is_not_there_is_refused_also_where_torchs_index_wraps_round(machine, name):
    machine(count=2)
    with pytest.raises(DeviceError, match=rf"'{name}' is not there\. There are: cuda:0, cuda:1, cpu"):
        open_device(name)


def test_a_gpu_that_does_not_answer_is_still_a_row_of_devices(machine, monkeypatch):
    machine().error = "CUDA error: all CUDA-capable devices are busy or unavailable"
    monkeypatch.setattr(accelerators, "gpu_info", lambda uuid: (None, "no driver"))
    row = devices()[0]
    assert (row["device"], row["total"], row["free"]) == ("cuda:0", None, None)
    assert "devices are busy or unavailable" in row["note"]


# --- Other accelerators


class FakeXpu(FakeCuda):
    """torch.xpu has torch.cuda's names."""


def test_an_xpu_is_asked_through_its_own_module():
    xpu = AcceleratorDevice(torch.device("xpu", 0), FakeXpu())
    assert (xpu.type, xpu.total(), xpu.free()) == ("xpu", 24 * GIB, 20 * GIB)
    assert xpu.budget().bytes == 22 * GIB - 256 * MIB
    assert xpu.budget().reason.endswith(", less 256.0 MiB of headroom")
    with xpu.limit(xpu.budget("4GiB")):
        assert int(xpu._api.fraction * 24 * GIB) == 4 * GIB
    assert xpu._api.fraction == 1.0
    assert xpu.describe()["note"] == ""


def test_what_a_backends_module_lacks_is_asked_of_torch_accelerator(monkeypatch):
    api = FakeCuda()
    named = SimpleNamespace(
        get_memory_info=api.mem_get_info, memory_stats=api.memory_stats, empty_cache=api.empty_cache
    )
    monkeypatch.setattr(torch, "accelerator", named, raising=False)
    other = AcceleratorDevice(torch.device("privateuseone", 0), SimpleNamespace())
    assert other.budget().bytes == 22 * GIB - 256 * MIB
    assert other.name == "privateuseone:0"
    with other.limit(other.budget("4GiB")):  # no fraction to set: nothing happens
        assert api.calls == []
    other.reset_peak()
    other.release()
    assert api.calls == ["empty"]


def test_a_backend_that_cannot_tell_its_memory_is_a_device_error(monkeypatch):
    monkeypatch.delattr(torch, "accelerator", raising=False)
    with pytest.raises(DeviceError, match="cannot tell how much memory xpu:0 has: install a newer PyTorch"):
        AcceleratorDevice(torch.device("xpu", 0), SimpleNamespace(get_device_name=str))
    with pytest.raises(DeviceError, match="cannot tell how much memory mps has"):
        MpsDevice(SimpleNamespace())


def test_apples_gpu_counts_what_metal_recommends_and_the_host_has(monkeypatch):
    monkeypatch.setattr(accelerators, "host_memory", lambda: HostMemory(16 * GIB, 6 * GIB, "", "machine"))
    calls = []
    api = SimpleNamespace(
        recommended_max_memory=lambda: 11 * GIB,
        driver_allocated_memory=lambda: GIB,
        current_allocated_memory=lambda: 5,
        empty_cache=lambda: calls.append("empty"),
        synchronize=lambda: calls.append("synchronize"),
    )
    mps = MpsDevice(api)
    assert (mps.total(), mps.free(), mps.allocated()) == (11 * GIB, 6 * GIB, 5)
    assert mps.budget().bytes == 7 * GIB
    assert mps.budget().reason.endswith("of 11.0 GiB that Metal recommends to use")
    assert mps.budget("50%").bytes == int(5.5 * GIB)
    assert mps.peak() is None
    mps.release()
    mps.synchronize()
    assert calls == ["empty", "synchronize"]


@pytest.mark.parametrize(
    "memory", [10**400, "9" * 400 + "GiB", "9" * 5000, 2**63, "1e9%", "999999999%"], ids=list("abcdef")
)
def test_a_budget_beyond_all_machines_is_refused_in_a_short_line(memory):
    with pytest.raises(SetupError) as caught:
        open_device("cpu").budget(memory)
    assert len(str(caught.value)) < 300


def test_a_device_with_an_index_beyond_all_numbers_is_none():
    with pytest.raises(DeviceError, match="is not a device that PyTorch knows"):
        open_device(10**400)


# --- what a driver, a slice and older torch tell otherwise


def test_the_free_memory_of_a_slice_is_cudas(gpu):
    cuda, _ = gpu(total=10 * GIB, free=9 * GIB)  # NVML tells of all 24 GiB
    row = cuda.describe()
    assert (row["free"], row["note"]) == (9 * GIB, "free memory by CUDA: NVML tells that of the whole GPU")


@pytest.mark.parametrize("base", ["properties", "driver"])
def test_a_hard_limit_is_a_fraction_of_what_the_allocator_takes_it_of(gpu, base, monkeypatch):
    driver = 24 * GIB - 331 * MIB - 4096
    monkeypatch.setattr(FakeCuda, "mem_get_info", lambda self, device: (20 * GIB, driver))
    cuda, api = gpu(total=24 * GIB)
    whole = 24 * GIB if base == "properties" else driver

    def told(device):
        return 1.0 if api.fraction == 1 else int(api.fraction * whole) / whole

    monkeypatch.setattr(api, "get_per_process_memory_fraction", told)
    with cuda.limit(Budget(10 * GIB, "", True, "torch")):
        assert int(api.fraction * whole) == 10 * GIB
    assert api.fraction == 1.0


def test_a_users_own_fraction_survives_where_torch_cannot_tell_it(gpu, monkeypatch):
    cuda, api = gpu()
    monkeypatch.delattr(FakeCuda, "get_per_process_memory_fraction")
    monkeypatch.setattr(accelerators.torch, "accelerator", None, raising=False)

    def ask(size, device):
        allowed = " 12.00 GiB allowed;" if api.fraction < 1 else ""
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 1048576.00 GiB.{allowed} Of the allocated")

    api.caching_allocator_alloc = ask
    for own in (0.5, 1.0):
        api.fraction = own
        with cuda.limit(Budget(6 * GIB, "", True, "torch")):
            assert api.fraction == pytest.approx(0.25)
        assert api.fraction == own


def test_what_lies_beside_the_allocator_is_this_processs_by_nvml_else_the_devices(gpu):
    cuda, _ = gpu([GpuProcess(os.getpid(), "python", 3 * GIB), GpuProcess(41, "jupyter", GIB)])
    assert cuda.beside() == GIB  # of 3 GiB the allocator holds 2
    assert gpu()[0].beside() == 2 * GIB  # 4 GiB of the device are taken


def test_bytes_in_tensors_are_those_asked_for_where_the_backend_counts_them(gpu, monkeypatch):
    cuda, _ = gpu()
    assert (cuda.allocated(), cuda.peak()) == (1, 2)
    found = {"requested_bytes.all.current": 7, "requested_bytes.all.peak": 8}
    monkeypatch.setattr(FakeCuda, "memory_stats", lambda self, device: found)
    cuda, _ = gpu()
    assert (cuda.allocated(), cuda.peak()) == (7, 8)
