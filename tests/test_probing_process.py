"""A probe under a limit that the process has, not PyTorch: RLIMIT_DATA, in processes of their own."""

import ctypes
import json
import sys

import pytest

from autoaccum.memory.watch import small_stacks
from tests.forks import Forks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts all that a process has mapped")

LIBC = ctypes.CDLL(None)
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
# (out-of-memory errors, the limit's proof): what little more than a size that ran may fit is not run.
NOT_SUFFERED = ((0, "forecast"), (0, None))
SETUP = """
    import json, resource, torch
    from torch import nn
    import autoaccum.api
    from autoaccum.memory.watch import ProcessGrowth, _status

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4096), nn.GELU(), nn.Linear(4096, 256), nn.ReLU(), nn.Linear(256, 10))
    x, y = torch.randn(8192, 64), torch.randint(0, 10, (8192,))
    optimizer, loss = torch.optim.AdamW(model.parameters()), nn.CrossEntropyLoss()

    def window(size):
        for _ in range(2):
            loss(model(x[:size]), y[:size]).backward()
        optimizer.step()
        optimizer.zero_grad()

    used = _status()["VmData"]
    resource.setrlimit(resource.RLIMIT_DATA, (used + 180 * 2**20, resource.RLIM_INFINITY))
"""


@pytest.fixture(scope="module")
def told():
    """Forks of a process whose environment says how malloc shall do."""
    with Forks(SETUP, **MALLOC) as forks:
        yield forks


def child(forks, *lines, threads=1):
    """What the code prints in a fork of its own, or None where it runs out of memory."""
    done = forks.run(f"torch.set_num_threads({threads})", *lines)
    if done.returncode and ("not enough memory" in done.stderr or "allocate memory" in done.stderr):
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def default_stack():
    attributes, size = ctypes.create_string_buffer(256), ctypes.c_size_t()
    LIBC.pthread_getattr_default_np(attributes)
    LIBC.pthread_attr_getstacksize(attributes, ctypes.byref(size))
    return size.value


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "part"), [(1, 0.89), (2, 0.8)])
def test_what_is_found_trains_on_and_is_most_of_what_a_bisection_could_find(told, threads, part):
    """Lost of 180 MiB: 8 that the probe needed; with two threads 13 kept for the unknown and up to 10 more."""
    found = child(
        told,
        "report = autoaccum.probe(model, (x, y), loss=loss, optimizer=optimizer, device='cpu', cache=False)",
        "[window(report.micro_batch) for _ in range(3)]",
        "reason, notes = report.budget_reason, report.notes",
        "print(json.dumps([report.micro_batch, report.out_of_memory_count, report.limit_proof, reason, notes]))",
        threads=threads,
    )
    assert found is not None, "the size found must train in the process that found it"
    size, out_of_memory, proof, reason, notes = found
    assert (out_of_memory, proof) in NOT_SUFFERED
    assert "more than PyTorch counts" in reason
    assert not any("MALLOC" in note for note in notes), "the environment has decided"
    trains = "window({0}); window({0}); print('true')"
    assert child(told, trains.format(size), threads=threads)
    assert child(told, trains.format(int(size / part)), threads=threads) is None


@pytest.mark.slow
def test_where_malloc_would_keep_what_is_freed_it_is_told_not_to_and_the_report_says_so(told):
    with Forks(SETUP) as untold:
        found = child(
            untold,
            "report = autoaccum.probe(model, (x, y), loss=loss, optimizer=optimizer, device='cpu', cache=False)",
            "[window(report.micro_batch) for _ in range(3)]",
            "print(json.dumps([report.micro_batch, report.out_of_memory_count, report.notes]))",
        )
    assert found is not None, "the size found must train in the process that found it"
    size, out_of_memory, notes = found
    assert out_of_memory == 0
    assert any("MALLOC_MMAP_THRESHOLD_=65536" in note for note in notes)
    assert child(told, f"window({size}); window({size}); print('true')")


def test_what_the_first_forward_starts_counts(told):
    """Threads and their stacks, for instance: mapped between the reading of the limit and the first trial."""
    found = child(
        told,
        "import mmap",
        "class Starting(nn.BatchNorm1d):",
        "    started = None",
        "    def forward(self, x):",
        "        self.started = self.started or mmap.mmap(-1, 24 * 2**20, mmap.MAP_PRIVATE)",
        "        return super().forward(x)",
        "model.append(Starting(10))",
        "report = autoaccum.probe(model, (x, y), loss=loss, optimizer=optimizer, device='cpu', cache=False)",
        "print(json.dumps([report.out_of_memory_count, report.limit_proof]))",
    )
    assert tuple(found) in NOT_SUFFERED


def test_a_peak_too_short_to_be_looked_at_is_measured_to_the_page(told):
    grown = child(
        told,
        "import mmap",
        "growth = ProcessGrowth('data segment')",
        "kept = mmap.mmap(-1, 8 * 2**20, mmap.MAP_PRIVATE)",
        "with growth:",
        "    for _ in range(3):",
        "        mmap.mmap(-1, 100 * 2**20, mmap.MAP_PRIVATE).close()",
        "print(json.dumps([growth.bytes, growth.now()]))",
    )
    most, after = grown
    assert 108 * 2**20 <= most < 110 * 2**20
    assert 8 * 2**20 <= after < 10 * 2**20


@pytest.mark.slow
def test_freed_blocks_are_kept_only_where_there_is_room_for_their_holes():
    with Forks(SETUP) as untold:
        grown = child(
            untold,
            "from autoaccum.memory.device import Budget, open_device",
            "device, budget = open_device('cpu'), Budget(2 * 2**30, '', False, 'data segment')",
            "def stays(peak):",
            "    if peak != 'as it is': device.expect(budget, peak)",
            "    before = _status()['VmData']",
            "    blocks = [torch.empty(8 * 2**20, dtype=torch.uint8) for _ in range(8)]",
            "    blocks.clear()",
            "    return _status()['VmData'] - before",
            "given_back, kept = stays(None), stays(2**30)",
            "there = _status()['VmData']",
            "device.expect(budget, 2**20)",
            "lost, too_much = there - _status()['VmData'], stays(2**30 + 1)",
            "device.expect(budget, 2**30)",
            "device.release()",
            "print(json.dumps([given_back, kept, lost, too_much, stays('as it is')]))",
        )
    given_back, kept, lost, too_much, released = grown
    assert lost < 2**20, "what is kept already stays for the next"
    assert kept > 7 * 8 * 2**20  # all eight blocks: the first may begin in room that the heap had
    assert max(given_back, too_much, released) < 2**20


def test_the_profilers_thread_takes_a_small_stack(told):
    grown = child(
        told,
        "from types import SimpleNamespace",
        "from autoaccum.memory.trace import record",
        "before = _status()['VmData']",
        "with record(SimpleNamespace(torch_device=torch.device('cpu'))): pass",
        "print(_status()['VmData'] - before)",
    )
    assert grown < 4 * 2**20, "the usual stack alone is 8 MiB"


@pytest.mark.skipif(not hasattr(LIBC, "pthread_getattr_default_np"), reason="glibc has a default size of stacks")
def test_the_usual_stack_is_back_afterwards():
    usual = default_stack()
    with small_stacks():
        assert default_stack() < usual
    assert default_stack() == usual
