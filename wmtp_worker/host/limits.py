"""What this machine, or the container around us, lets us use.

Every reader takes the root of the file system, so that it can be shown any machine's `/proc` and `/sys`.
"""

import os
import shutil
from pathlib import Path

ROOT = Path("/")
# cgroup v1 spells "no limit" as a page-rounded 2**63 - 1; nothing real is near it
_NO_LIMIT = 1 << 60


def cpu_limit(root: Path = ROOT) -> float:
    """Cores we may use: the smallest of the cgroup quota (v1 or v2) and the CPUs we are allowed to run on."""
    quotas = [quota for quota in (_v2_quota(d) for d in _cgroups(root, "")) if quota]
    quotas += [quota for quota in (_v1_quota(d) for d in _cgroups(root, "cpu")) if quota]
    return min([float(visible_cpus()), *quotas])


def visible_cpus() -> int:
    """CPUs this process may be scheduled on, whatever its quota of their time is."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes of memory we may use: the smaller of cgroup limit and machine; None if unknown."""
    found = [_bytes(d / "memory.max") for d in _cgroups(root, "")]
    found += [_bytes(d / "memory.limit_in_bytes") for d in _cgroups(root, "memory")]
    found.append(_total_memory(root))
    return min((value for value in found if value is not None), default=None)


def memory_available(root: Path = ROOT) -> int | None:
    """Bytes of memory still free to this process, as far as the machine and its own limit say; None if unknown.

    What other processes in the same container use counts only against the machine.
    """
    free = _meminfo(root, "MemAvailable")
    limit, own = memory_limit(root), _resident(root)
    if limit is None or own is None:
        return free
    return max(0, limit - own if free is None else min(free, limit - own))


def disk_free(path: Path) -> int:
    """Bytes an ordinary user may still write at `path`, or at its nearest parent that exists."""
    while not os.path.exists(path) and path != path.parent:  # Path.exists would raise for a long name
        path = path.parent
    return shutil.disk_usage(path).free


def shm_size(root: Path = ROOT) -> int | None:
    """Size of /dev/shm in bytes, None where there is none."""
    shm = root / "dev/shm"
    return shutil.disk_usage(shm).total if shm.is_dir() else None


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Folders that may hold our limits, from our own group up to the mount; controller "" means cgroup v2."""
    mount = root / "sys/fs/cgroup" / controller
    if controller and not mount.is_dir():
        mount = root / "sys/fs/cgroup" / {"cpu": "cpu,cpuacct"}.get(controller, controller)
    folders = [mount]
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            folder = mount / path.strip("/")
            # a limit on any parent counts; inside a container the path may not exist under the mount
            folders += [f for f in (folder, *folder.parents) if f != mount and mount in f.parents]
    return [folder for folder in folders if folder.is_dir()]


def _v2_quota(folder: Path) -> float | None:
    words = (_text(folder / "cpu.max") or "max").split()
    if words[0] == "max":
        return None
    return int(words[0]) / int(words[1])


def _v1_quota(folder: Path) -> float | None:
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    if not quota or not period or quota < 0:
        return None
    return quota / period


def _bytes(file: Path) -> int | None:
    value = _number(file)
    return None if value is None or value >= _NO_LIMIT else value


def _total_memory(root: Path) -> int | None:
    return _meminfo(root, "MemTotal")


def _meminfo(root: Path, name: str) -> int | None:
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _resident(root: Path) -> int | None:
    words = (_text(root / "proc/self/statm") or "").split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") if len(words) > 1 else None


def _number(file: Path) -> int | None:
    text = _text(file)
    try:
        return int(text) if text else None
    except ValueError:  # "max"
        return None


def _text(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None
