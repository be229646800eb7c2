"""Host memory: control groups as files in a folder, and a real limit on a real process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.memory.host import host_memory

MIB = 2**20
V1_UNLIMITED = 9223372036854771712


def machine(root: Path, *, cgroup: str, mounts: list[str], files: dict[str, object]) -> Path:
    """A root folder with what the kernel would show there."""
    process = root / "proc/self"
    process.mkdir(parents=True, exist_ok=True)
    (process / "cgroup").write_text(cgroup)
    (process / "mountinfo").write_text("".join(f"{mount}\n" for mount in mounts))
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


def version2(root: Path, **files: object) -> Path:
    named = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    return machine(root, cgroup="0::/user/job\n", mounts=[V2_MOUNT], files=named)


def test_without_limits_the_machines_available_memory_binds(tmp_path):
    memory = host_memory(tmp_path)
    assert memory.kind == "machine"
    assert memory.total == psutil.virtual_memory().total
    assert 0 < memory.available <= memory.total
    assert "this machine's" in memory.reason


def test_version_2_leaves_what_is_unused_and_counts_stale_file_pages_as_free(tmp_path):
    memory = host_memory(
        version2(
            tmp_path,
            **{
                "user/job/memory.max": 100 * MIB,
                "user/job/memory.current": 60 * MIB,
                "user/job/memory.stat": f"anon 1\nactive_file {5 * MIB}\ninactive_file {20 * MIB}",
            },
        )
    )
    assert (memory.kind, memory.total, memory.available) == ("cgroup", 100 * MIB, 60 * MIB)
    assert memory.reason == (
        "cgroup v2 allows 100.0 MiB (/sys/fs/cgroup/user/job/memory.max), and 40.0 MiB of it is in use"
    )


def test_an_ancestors_limit_binds_where_its_other_children_have_filled_it(tmp_path):
    files = {
        "user/job/memory.max": 100 * MIB,
        "user/job/memory.current": 10 * MIB,
        "user/memory.max": 200 * MIB,
        "user/memory.current": 190 * MIB,
    }
    memory = host_memory(version2(tmp_path, **files))
    assert (memory.total, memory.available) == (100 * MIB, 10 * MIB)
    assert "/sys/fs/cgroup/user/memory.max" in memory.reason


def test_the_throttling_limit_of_version_2_binds_too(tmp_path):
    files = {"user/job/memory.max": "max", "user/job/memory.high": 50 * MIB, "user/job/memory.current": 10 * MIB}
    memory = host_memory(version2(tmp_path, **files))
    assert memory.available == 40 * MIB
    assert "memory.high" in memory.reason


def test_no_limit_in_either_version_leaves_the_machine(tmp_path):
    version2(tmp_path / "2", **{"user/job/memory.max": "max", "user/job/memory.current": 10 * MIB})
    v1 = {
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": V1_UNLIMITED,
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": 10 * MIB,
    }
    machine(tmp_path / "1", cgroup="4:memory:/job\n0::/\n", mounts=[V1_MOUNT], files=v1)
    assert host_memory(tmp_path / "2").kind == "machine"
    assert host_memory(tmp_path / "1").kind == "machine"


def test_version_1_is_read_under_its_own_names(tmp_path):
    files = {
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": 100 * MIB,
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": 60 * MIB,
        "sys/fs/cgroup/memory/job/memory.stat": f"inactive_file 0\ntotal_inactive_file {30 * MIB}",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_UNLIMITED,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 900 * MIB,
    }
    lines = "5:devices:/job\n4:memory:/job\n1:name=systemd:/\n0::/\n"
    memory = host_memory(machine(tmp_path, cgroup=lines, mounts=[V2_MOUNT, V1_MOUNT], files=files))
    assert (memory.kind, memory.available) == ("cgroup", 70 * MIB)
    assert "cgroup v1" in memory.reason


def test_in_a_container_the_mount_shows_only_the_own_part_of_the_hierarchy(tmp_path):
    mount = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory"
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 100 * MIB,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 10 * MIB,
        "sys/fs/cgroup/memory/step/memory.limit_in_bytes": 50 * MIB,
        "sys/fs/cgroup/memory/step/memory.usage_in_bytes": 5 * MIB,
    }
    machine(tmp_path, cgroup="4:memory:/docker/abc/step\n", mounts=[mount], files=files)
    assert host_memory(tmp_path).available == 45 * MIB
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/docker/abc\n")
    assert host_memory(tmp_path).available == 90 * MIB


@pytest.mark.parametrize("path", ["/../elsewhere", "/kubepods/pod1/not-mounted-here"])
def test_a_path_outside_the_mount_leaves_the_mount_point_to_look_at(tmp_path, path):
    files = {"sys/fs/cgroup/memory.max": 100 * MIB, "sys/fs/cgroup/memory.current": 30 * MIB}
    machine(tmp_path, cgroup=f"0::{path}\n", mounts=[V2_MOUNT], files=files)
    assert host_memory(tmp_path).available == 70 * MIB


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path):
    files = {"user/job/memory.max": 100 * MIB, "user/job/memory.current": 130 * MIB}
    assert host_memory(version2(tmp_path, **files)).available == 0


@given(
    limits=st.lists(st.tuples(st.integers(MIB, 2**34), st.integers(0, 2**34)), min_size=1, max_size=5),
)
def test_available_is_the_least_room_of_all_ancestors(tmp_path_factory, limits):
    root = tmp_path_factory.mktemp("groups")
    path = "/".join(f"g{depth}" for depth in range(len(limits)))
    files = {}
    for depth, (limit, used) in enumerate(limits):
        folder = "/".join(f"g{level}" for level in range(depth + 1))
        files[f"sys/fs/cgroup/{folder}/memory.max"] = limit
        files[f"sys/fs/cgroup/{folder}/memory.current"] = used
    memory = host_memory(machine(root, cgroup=f"0::/{path}\n", mounts=[V2_MOUNT], files=files))
    least = max(0, min(limit - used for limit, used in limits))
    assert memory.available <= least
    if memory.kind == "cgroup":
        assert memory.available == least
    assert memory.total <= min(limit for limit, _ in limits)


LIMITED = """
import json, resource, sys
from autoaccum.memory.host import host_memory
import torch

name, field = sys.argv[1:]
used = next(line for line in open("/proc/self/status") if line.startswith(field))
limit = int(used.split()[1]) * 1024 + 256 * 2**20
resource.setrlimit(getattr(resource, name), (limit, resource.RLIM_INFINITY))
memory = host_memory()

def fits(size):
    try:
        torch.empty(size, dtype=torch.uint8)
        return True
    except RuntimeError:
        return False

print(json.dumps([limit, memory.__dict__, fits(memory.available - 2**20), fits(memory.available + 2**20)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts mappings against these limits")
@pytest.mark.parametrize(
    ("name", "field", "kind"), [("RLIMIT_DATA", "VmData", "data segment"), ("RLIMIT_AS", "VmSize", "address space")]
)
def test_a_resource_limit_leaves_exactly_what_can_still_be_allocated(name, field, kind):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", LIMITED, name, field]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    limit, memory, less_fits, more_fits = json.loads(run.stdout)
    assert memory["kind"] == kind
    assert memory["total"] == limit
    assert 0 < memory["available"] <= 256 * MIB
    assert memory["reason"].startswith(f"{name} allows ")
    assert (less_fits, more_fits) == (True, False)
