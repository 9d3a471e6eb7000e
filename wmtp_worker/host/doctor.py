"""Is this machine fit to train? Each check looks for itself and says what to do about what it finds."""

import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from wmtp_worker.errors import WorkerError
from wmtp_worker.host.device import describe, resolve_device
from wmtp_worker.host.limits import cpu_limit, disk_free, memory_limit, shm_size, visible_cpus
from wmtp_worker.host.workdir import prepare
from wmtp_worker.settings import Settings

GIB = 1 << 30
OLDEST_PYTHON = (3, 11)
TORCH_MAJOR = "2"
# nothing of this existed before: an earlier clock is wrong, and breaks TLS, signatures and leases
_EARLIEST = 1_763_769_600
_LATEST = _EARLIEST + 30 * 365 * 86_400


@dataclass(frozen=True)
class Check:
    """What one check found, and what to do about it unless it passed."""

    name: str
    status: Literal["pass", "warn", "fail"]
    found: str
    advice: str = ""


def checks(settings: Settings) -> Iterator[Check]:
    """Every check for the run these settings describe, in order, each made when it is asked for."""
    probes: tuple[Callable[[], Check], ...] = (
        _python,
        _torch,
        lambda: _device(settings.host.device),
        _cpu,
        _memory,
        lambda: _workdir(settings.run.workdir),
        lambda: _disk(settings.run.workdir),
        _shared_memory,
        _packaged_files,
        lambda: _clock(time.time()),
    )
    for probe in probes:
        yield probe()


def _python() -> Check:
    found = platform.python_version()
    if tuple(sys.version_info) < OLDEST_PYTHON:
        return Check("python", "fail", found, "use Python 3.11 or newer")
    return Check("python", "pass", found)


def _torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", "fail", f"cannot be imported: {error}", "reinstall it: bash entrypoint/start.sh does")
    version = str(torch.__version__)
    if version.split(".")[0] != TORCH_MAJOR:
        return Check("torch", "fail", version, f"install torch {TORCH_MAJOR}, or use an image that has it")
    return Check("torch", "pass", version)


def _device(wanted: str) -> Check:
    try:
        device = resolve_device(wanted)
    except WorkerError as error:
        return Check("device", "fail", error.what, error.fix or "")
    except (ImportError, OSError):
        return Check("device", "fail", "unknown without torch", "put torch right first")
    facts = describe(device)
    name = f"{device} {facts.get('device_name', '')}".strip()
    if device.type == "cpu" and wanted == "auto":
        return Check("device", "warn", name, "no GPU here: fine for the smoke preset, slow for anything larger")
    return Check("device", "pass", name)


def _cpu() -> Check:
    limit, visible = cpu_limit(), visible_cpus()
    if limit < 1:
        return Check("cpu", "warn", f"{limit:g} of {visible} cores", "give the container at least one whole core")
    return Check("cpu", "pass", f"{limit:g} of {visible} cores")


def _memory() -> Check:
    limit = memory_limit()
    if limit is None:
        return Check("memory", "warn", "unknown", "make sure there are at least 2 GiB")
    if limit < 2 * GIB:
        return Check("memory", "warn", f"{limit / GIB:.1f} GiB", "even the smoke preset may need 2 GiB")
    return Check("memory", "pass", f"{limit / GIB:.1f} GiB")


def _workdir(workdir: Path) -> Check:
    try:
        prepare(workdir)
    except WorkerError as error:
        return Check("work directory", "fail", error.what, error.fix or "")
    return Check("work directory", "pass", str(workdir))


def _disk(workdir: Path) -> Check:
    free = disk_free(workdir)
    found = f"{free / GIB:.1f} GiB free"
    if free < GIB // 10:
        return Check("disk", "fail", found, "make room, or set WMTP_WORKDIR to a larger disk")
    if free < 5 * GIB:
        return Check("disk", "warn", found, "enough for the smoke preset; large models need far more")
    return Check("disk", "pass", found)


def _shared_memory() -> Check:
    size = shm_size()
    if size is None:
        return Check("/dev/shm", "warn", "not there", "several GPUs need it")
    if size < GIB:
        return Check("/dev/shm", "warn", f"{size / GIB:.2f} GiB", "give docker --shm-size=8g before using several GPUs")
    return Check("/dev/shm", "pass", f"{size / GIB:.1f} GiB")


def _packaged_files() -> Check:
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


def _clock(now: float) -> Check:
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if not _EARLIEST <= now <= _LATEST:
        return Check("clock", "fail", found, "set the clock: certificates and signatures depend on it")
    return Check("clock", "pass", found)
