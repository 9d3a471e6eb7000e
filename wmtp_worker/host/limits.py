"""What this machine, or the container around us, lets us use.

Every reader takes the root of the file system, so that it can be shown any machine's `/proc` and `/sys`.
"""

import os
import shutil
from collections.abc import MutableMapping
from pathlib import Path

ROOT = Path("/")
# cgroup v1 spells "no limit" as a page-rounded 2**63 - 1; nothing real is near it
_NO_LIMIT = 1 << 60
# who makes threads when it is loaded, or first used: OpenMP (torch, MKL, OpenBLAS) and Rust's rayon (tokenizers)
_POOLS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")


def cpu_limit(root: Path = ROOT) -> float:
    """Cores we may use: the smallest of the cgroup quota (v1 or v2) and the CPUs we are allowed to run on."""
    quotas = [quota for quota in (_v2_quota(d) for d in _cgroups(root, "")) if quota]
    quotas += [quota for quota in (_v1_quota(d) for d in _cgroups(root, "cpu")) if quota]
    return min([float(visible_cpus()), *quotas])


def cap_threads(environ: MutableMapping[str, str] = os.environ, root: Path = ROOT) -> None:
    """Set the variables by which libraries size their pools of threads to the cores that the quota gives.

    Before those are loaded: they count the CPUs that are visible, 384 of a rented machine that gives 46. What somebody
    has set stays, and where there is no quota nothing is set.
    """
    cores = cpu_limit(root)
    if cores < visible_cpus():
        for name in _POOLS:
            environ.setdefault(name, str(max(1, int(cores))))


def visible_cpus() -> int:
    """CPUs this process may be scheduled on (its affinity, which follows the cpuset), whatever its quota of them is."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes of memory we may use: the smaller of cgroup limit and machine; None if unknown."""
    # above memory.high nothing is killed, but everything waits for memory to be reclaimed
    found = [_bytes(d / name) for d in _cgroups(root, "") for name in ("memory.max", "memory.high")]
    for folder in _cgroups(root, "memory"):
        found += [_bytes(folder / "memory.limit_in_bytes"), _of_parents(folder)]
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


def process_limit(root: Path = ROOT) -> tuple[int, int] | None:
    """`(limit, used)`: how many processes and threads our cgroup may have, and has; None where there is no limit.

    Of several limits, that which leaves the least.
    """
    folders = [*_cgroups(root, ""), *_cgroups(root, "pids")]
    found = [
        (limit, _number(d / "pids.current") or 0) for d in folders if (limit := _number(d / "pids.max")) is not None
    ]
    return min(found, key=lambda pair: pair[0] - pair[1], default=None)


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


def _of_parents(folder: Path) -> int | None:
    """The limit of v1 that counts parents in, those outside of the container too (a pod's, say)."""
    for line in (_text(folder / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == "hierarchical_memory_limit" and value.isdecimal() and int(value) < _NO_LIMIT:
            return int(value)
    return None


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
