"""Checks of the machine and its container: software, cores, memory, disks, clock."""

import os
import platform
import sys
import time
from importlib import resources
from pathlib import Path

from wmtp_worker.doctor.case import Case
from wmtp_worker.doctor.check import Check, Status
from wmtp_worker.errors import DiskFullError, WorkerError
from wmtp_worker.host.device import resolve_device
from wmtp_worker.host.gpu import torch_build
from wmtp_worker.host.limits import (
    cpu_limit,
    disk_free,
    memory_limit,
    process_limit,
    shm_size,
    visible_cpus,
)
from wmtp_worker.host.workdir import prepare

GIB = 1 << 30
OLDEST_PYTHON = (3, 11)
TORCH_MAJOR = "2"
# nothing of this existed before: an earlier clock is wrong, and breaks TLS, signatures and leases
_EARLIEST = 1_763_769_600
_LATEST = _EARLIEST + 30 * 365 * 86_400
# seconds: S3 and Azure refuse what is signed by a clock further off than 15 minutes
_SKEW_WARN, _SKEW_FAIL = 60.0, 900.0
# threads of one process beside a pool for each core: uploads, saves, metrics, CUDA's own
_THREADS = 64
_WRITTEN = 64 << 20  # bytes written to learn the disk's speed


def python() -> Check:
    found = platform.python_version()
    if tuple(sys.version_info) < OLDEST_PYTHON:
        return Check("python", "fail", found, "use Python 3.11 or newer")
    return Check("python", "pass", found)


def torch_version(imported: bool) -> Check:
    """Whether torch is there in a version that we know; `imported`: by importing it, which takes seconds."""
    if imported:
        try:
            import torch
        except (ImportError, OSError) as error:
            return Check("torch", "fail", f"cannot be imported: {error}", "reinstall it: bash entrypoint/start.sh does")
        version = str(torch.__version__)
    elif (build := torch_build()) is None:
        return Check("torch", "fail", "is not installed", "install it: bash entrypoint/start.sh does")
    else:
        version = build[0]
    if version.split(".")[0] != TORCH_MAJOR:
        return Check("torch", "fail", version, f"install torch {TORCH_MAJOR}, or use an image that has it")
    return Check("torch", "pass", version)


def host(case: Case) -> Check:
    """Whose machine it is. Never wrong by itself, but the work directory may lie where the host keeps nothing."""
    found = case.host
    name = f"{found.name} {found.instance or ''}".strip()
    notice = "promises no notice" if found.notice_seconds is None else f"gives {found.notice_seconds:g} s of notice"
    text = f"{name} ({found.why}), {notice}"
    workdir = case.settings.run.workdir.absolute()
    if found.disk is not None and found.disk not in (workdir, *workdir.parents):
        lost = "has a bucket to go on from" if case.settings.cloud.bucket else "is lost then"
        advice = (
            f"set WMTP_WORKDIR to a folder below {found.disk}: anything else goes when it stops, and the run {lost}"
        )
        return Check("host", "warn", text, advice)
    return Check("host", "pass", text)


def device(wanted: str) -> Check:
    try:
        chosen = resolve_device(wanted)
    except WorkerError as error:
        return Check("device", "fail", error.what, error.fix or "")
    except (ImportError, OSError):
        return Check("device", "fail", "unknown without torch", "put torch right first")
    if chosen.type == "cpu" and wanted == "auto":
        return Check("device", "warn", "cpu", "no GPU here: fine for the smoke preset, slow for anything larger")
    return Check("device", "pass", str(chosen))


def cpu() -> Check:
    limit, visible = cpu_limit(), visible_cpus()
    if limit < 1:
        return Check("cpu", "warn", f"{limit:g} of {visible} cores", "give the container at least one whole core")
    return Check("cpu", "pass", f"{limit:g} of {visible} cores")


def memory() -> Check:
    limit = memory_limit()
    if limit is None:
        return Check("memory", "warn", "unknown", "make sure there are at least 2 GiB")
    if limit < 2 * GIB:
        return Check("memory", "warn", f"{limit / GIB:.1f} GiB", "even the smoke preset may need 2 GiB")
    return Check("memory", "pass", f"{limit / GIB:.1f} GiB")


def processes() -> Check | None:
    """Room for processes and threads; nothing to say where there is no limit."""
    if (found := process_limit()) is None:
        return None
    limit, used = found
    text = f"{used} of {limit} processes and threads"
    if limit - used < (needed := 2 * int(cpu_limit()) + _THREADS):
        return Check(
            "processes",
            "warn",
            text,
            f"about {needed} are needed for each GPU: docker run --pids-limit -1, or a larger one",
        )
    return Check("processes", "pass", text)


def workdir(folder: Path) -> Check:
    try:
        prepare(folder)
    except WorkerError as error:
        return Check("work directory", "fail", error.what, error.fix or "")
    return Check("work directory", "pass", str(folder))


def disk(folder: Path, full: Status = "fail") -> Check:
    """The room that is left; `full`: what it means that there is next to none."""
    free = disk_free(folder)
    found = f"{free / GIB:.1f} GiB free"
    if free < GIB // 10:
        return Check("disk", full, found, "make room, or set WMTP_WORKDIR to a larger disk")
    if free < 5 * GIB:
        return Check("disk", "warn", found, "enough for the smoke preset; large models need far more")
    return Check("disk", "pass", found)


def disk_speed(case: Case) -> Check | None:
    """How fast the work directory's disk takes what is synced to it; for later checks."""
    folder = case.settings.run.workdir
    if not folder.is_dir() or disk_free(folder) < 2 * _WRITTEN:
        return None
    file = folder / f".speed-{os.getpid()}.tmp"
    block = os.urandom(1 << 20)  # nothing that a file system could compress
    began = time.monotonic()
    try:
        with file.open("wb", buffering=0) as target:
            for _ in range(_WRITTEN >> 20):
                target.write(block)
            os.fsync(target.fileno())
        case.write_rate = _WRITTEN / max(1e-6, time.monotonic() - began)
    except OSError as error:
        raise DiskFullError(f"{file.parent}: {error.strerror}", fix="make room, or set WMTP_WORKDIR") from error
    finally:
        file.unlink(missing_ok=True)
    found = f"writes {case.write_rate / 1e6:.0f} MB/s"
    if case.write_rate < 50e6:
        return Check("disk speed", "warn", found, "saves take long: a network disk? set WMTP_WORKDIR to a local one")
    return Check("disk speed", "pass", found)


def shared_memory() -> Check:
    size = shm_size()
    if size is None:
        return Check("/dev/shm", "warn", "not there", "several GPUs need it")
    if size < GIB:
        return Check("/dev/shm", "warn", f"{size / GIB:.2f} GiB", "give docker --shm-size=8g before using several GPUs")
    return Check("/dev/shm", "pass", f"{size / GIB:.1f} GiB")


def packaged_files() -> Check:
    from wmtp_worker.settings.files import configs

    package = Path(str(resources.files("wmtp_worker")))
    wanted = [
        configs() / "defaults.yaml",
        package / "data/tokenizer/tokenizer.json",
        package / "data/sample/train.jsonl",
        package / "data/sample/validation.jsonl",
    ]
    missing = [str(path) for path in wanted if not path.is_file()]
    if missing:
        return Check("packaged files", "fail", f"missing: {', '.join(missing)}", "install the package again")
    return Check("packaged files", "pass", "settings, tokenizer and sample data are there")


def clock(case: Case) -> Check:
    """Against a clock that an earlier check saw, else only against what is possible at all."""
    now = time.time()
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    advice = "set the clock (timedatectl set-ntp true on the machine itself): certificates and signatures depend on it"
    if not _EARLIEST <= now <= _LATEST:
        return Check("clock", "fail", found, advice)
    if case.skew is None:
        return Check("clock", "pass", found)
    return judge_skew(*case.skew, found, advice)


def judge_skew(seconds: float, whose: str, found: str, advice: str) -> Check:
    """`seconds`: by how much our clock is ahead of another one, which is right to a second or two."""
    text = f"{found}, {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} that of {whose}"
    if abs(seconds) >= _SKEW_FAIL:
        return Check("clock", "fail", text, advice)
    if abs(seconds) >= _SKEW_WARN:
        return Check("clock", "warn", text, advice)
    return Check("clock", "pass", text if abs(seconds) > 2 else f"{found}, as that of {whose}")
