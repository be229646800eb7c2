"""How much host memory a process may still take, and which limit says so.

A process can be bounded by the machine, by the control groups it lives in (versions 1 and 2, each with all the
ancestors that can be seen from here), and by its own resource limits. The least of them binds, and is named.

Choices:
- In a control group, pages of files that were read once and not since (`inactive_file`) are not counted as used: the
  kernel gives them back first. Active file pages are counted, for they are somebody's working set.
- `memory.high` bounds too: a group above it is throttled until it hardly runs.
- Swap is not counted as memory: a training that swaps is as good as stopped.
- A limit on the data segment or the address space leaves what the process has not yet mapped; it is exact, and going
  past it raises an error. Going past the others gets a process killed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from autoaccum.units import format_bytes

try:
    import resource
except ImportError:  # Windows has no resource limits of this kind
    resource = None  # type: ignore[assignment]

__all__ = ["HostMemory", "host_memory"]

# Version 1 writes "no limit" as the largest number of whole pages below 2**63.
_UNLIMITED = 2**60


@dataclass(frozen=True)
class HostMemory:
    """Host memory under the limit that binds.

    Attributes:
        total: bytes that limit allows in all (the least total, where another limit is smaller but less used).
        available: bytes this process may still take, at least 0.
        reason, kind: which limit binds and its figures; "machine", "cgroup", "data segment" or "address space".
    """

    total: int
    available: int
    reason: str
    kind: str


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The least of what the machine, the control groups and the resource limits leave to this process.

    `root` is where /proc and /sys are looked for; the machine's own figures always come from psutil.
    """
    memory = psutil.virtual_memory()
    reason = f"{format_bytes(memory.available)} of this machine's {format_bytes(memory.total)} is available"
    machine = HostMemory(memory.total, memory.available, reason, "machine")
    limits = [machine, *_cgroups(root), *_resource_limits(root)]
    least = min(limits, key=lambda limit: limit.available)
    total = min(limit.total for limit in limits)
    return HostMemory(total, max(0, least.available), least.reason, least.kind)


def _resource_limits(root: Path) -> Iterator[HostMemory]:
    """The room under RLIMIT_DATA and RLIMIT_AS; only Linux counts what a process has mapped against them."""
    used = dict(line.split(":", 1) for line in _read(root / "proc/self/status").splitlines() if ":" in line)
    if resource is None or not used:
        return
    for name, field, kind in (("RLIMIT_DATA", "VmData", "data segment"), ("RLIMIT_AS", "VmSize", "address space")):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit == resource.RLIM_INFINITY or field not in used:
            continue
        taken = int(used[field].split()[0]) * 1024
        reason = f"{name} allows {format_bytes(limit)} of {kind}, and {format_bytes(taken)} of it is in use"
        yield HostMemory(limit, limit - taken, reason, kind)


def _cgroups(root: Path) -> Iterator[HostMemory]:
    """Every control group that holds this process and limits memory, from its own up to the mount point."""
    mounts = list(_memory_mounts(root))
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        version = 1 if "memory" in controllers.split(",") else 2 if not controllers else None
        for mounted_version, mounted_root, mount in mounts:
            if version == mounted_version:
                for folder in _ancestors(root / mount.lstrip("/"), mounted_root, path):
                    yield from _group(version, folder, root)


def _memory_mounts(root: Path) -> Iterator[tuple[int, str, str]]:
    """(version, root of the hierarchy that is mounted, mount point) of each mount that may limit memory."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), after.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            yield (2 if kind == "cgroup2" else 1), fields[3], fields[4].replace("\\040", " ")


def _ancestors(mount: Path, mounted_root: str, path: str) -> Iterator[Path]:
    """The folders of the group `path` and of its ancestors, as far as the mount shows them.

    In a container the mount may show only a part of the hierarchy: `mounted_root` is where that part begins. A path
    outside it (of another namespace, "/../x") leaves only the mount point itself to look at.
    """
    inside = path.removeprefix(mounted_root) if f"{path}/".startswith(f"{mounted_root}/") else path
    parts = [part for part in inside.split("/") if part]
    if ".." in parts or not mount.joinpath(*parts).is_dir():
        parts = []
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def _group(version: int, folder: Path, root: Path) -> Iterator[HostMemory]:
    limits = ("memory.limit_in_bytes",) if version == 1 else ("memory.max", "memory.high")
    usage = _number(folder / ("memory.usage_in_bytes" if version == 1 else "memory.current"))
    statistics = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines())
    reclaimable = int(statistics.get("total_inactive_file" if version == 1 else "inactive_file", 0))
    for name in limits:
        limit = _number(folder / name)
        if limit is None or usage is None or limit >= _UNLIMITED:
            continue
        used = max(0, usage - reclaimable)
        place = f"/{folder.relative_to(root)}/{name}"
        reason = f"cgroup v{version} allows {format_bytes(limit)} ({place}), and {format_bytes(used)} of it is in use"
        yield HostMemory(limit, limit - used, reason, "cgroup")


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None  # version 2 writes "max" for no limit


def _read(path: Path) -> str:
    """The file's text, or nothing where there is none or it may not be read: then it does not bound us."""
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
