"""NVML: a stand-in library where there is no GPU, with the real library's errors; and the real one where it is."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pynvml
import pytest

from autoaccum.memory import nvml
from autoaccum.memory.nvml import GpuProcess, gpu_info

UUID = "ffc79498-8ff3-c2dc-3b0d-fafd804516ae"


class FakeNvml:
    """Answers as the real module does for the handles it knows; `refuse` are the functions that raise NoPermission."""

    def __init__(self, handles=(f"GPU-{UUID}",), compute=(), graphics=(), refuse=()):
        self.handles, self.compute, self.graphics, self.refuse = handles, compute, graphics, refuse
        self.open = 0

    def __getattr__(self, name):
        return getattr(pynvml, name)  # the errors, so that they are caught as the real ones are

    def _check(self, name):
        if name in self.refuse:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)

    def nvmlInit(self):
        self._check("nvmlInit")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.handles:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle):
        self._check("nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(total=24 * 2**30, free=10 * 2**30, used=14 * 2**30)

    def nvmlDeviceGetName(self, handle):
        return b"NVIDIA A10"  # bytes in older releases, str in newer ones

    def nvmlSystemGetDriverVersion(self):
        return "580.65.06"

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.compute]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle):
        self._check("nvmlDeviceGetGraphicsRunningProcesses")
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.graphics]


@pytest.mark.parametrize("uuid", [UUID, f"GPU-{UUID}"])
def test_a_gpu_is_found_by_its_uuid_as_pytorch_or_the_driver_writes_it(uuid):
    fake = FakeNvml()
    info, why = gpu_info(uuid, fake)
    assert why == ""
    assert info.driver == "580.65.06"
    assert (info.total, info.free) == (24 * 2**30, 10 * 2**30)
    assert fake.open == 0


def test_a_slice_of_a_gpu_is_found_as_one():
    info, _ = gpu_info(UUID, FakeNvml(handles=(f"MIG-{UUID}",)))
    assert info is not None


def test_processes_are_listed_once_the_largest_first_with_their_names(monkeypatch):
    monkeypatch.setattr(nvml, "pids_are_ours", lambda: True)
    me, gone = os.getpid(), 2**22 + 1  # beyond any process number
    fake = FakeNvml(compute=[(gone, 100), (me, 300)], graphics=[(me, 200), (7, None)])
    info, _ = gpu_info(UUID, fake)
    assert [(p.pid, p.bytes) for p in info.processes] == [(me, 300), (gone, 100), (7, None)]
    assert info.processes[0].name
    assert info.processes[1].name is None


def test_a_size_known_from_one_list_is_not_lost_to_the_other():
    info, _ = gpu_info(UUID, FakeNvml(compute=[(7, None)], graphics=[(7, 50)]))
    assert [(p.pid, p.bytes) for p in info.processes] == [(7, 50)]


def test_in_a_container_the_drivers_process_numbers_get_no_names(monkeypatch):
    monkeypatch.setattr(nvml, "pids_are_ours", lambda: False)
    info, _ = gpu_info(UUID, FakeNvml(compute=[(os.getpid(), 300)]))
    assert info.processes == (GpuProcess(os.getpid(), None, 300),)


def test_one_list_that_is_refused_leaves_the_other():
    fake = FakeNvml(compute=[(7, 50)], refuse=("nvmlDeviceGetGraphicsRunningProcesses",))
    assert [p.pid for p in gpu_info(UUID, fake)[0].processes] == [7]


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        (FakeNvml(refuse=("nvmlInit",)), "NVML does not start (Insufficient Permissions)"),
        (FakeNvml(handles=()), f"NVML does not answer for GPU {UUID} (Not Found)"),
        (FakeNvml(refuse=("nvmlDeviceGetMemoryInfo",)), "(Insufficient Permissions)"),
    ],
)
def test_a_refusal_is_answered_with_its_reason_and_the_library_is_closed(fake, words):
    info, why = gpu_info(UUID, fake)
    assert info is None
    assert words in why
    assert fake.open == 0


def test_the_real_library_answers_or_says_why_not():
    info, why = gpu_info(UUID)  # nobody's UUID
    assert info is None
    assert why.startswith("NVML does not ")


def test_without_the_package_the_reason_says_so():
    code = "import sys; sys.modules['pynvml'] = None\nfrom autoaccum.memory.nvml import gpu_info; print(gpu_info('x'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "nvidia-ml-py cannot be imported" in run.stdout
