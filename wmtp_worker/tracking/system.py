"""Use of the machine while a run trains, in the names that MLflow's own page of system metrics knows."""

import contextlib
import functools
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from wmtp_worker.host.gpu import NoDriver, nvml

log = logging.getLogger(__name__)

Measure = Callable[[], dict[str, float]]

_MEGA = 1e6


class SystemSampler:
    """Appends a line to `system.jsonl` every so many seconds, in a thread of its own.

    Its steps are seconds since the run first began: they grow on every machine. A line that cannot be written, and a
    measure that cannot be had, are left out.
    """

    def __init__(self, path: Path, created: float, every: float, also: Measure = dict) -> None:
        """`created` is Unix time; with 0 seconds nothing is measured. `also`: a further measure, of the run itself."""
        self._path = path
        self._created = created
        self._every = every
        self._also = also
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._every > 0:
            self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(self._every + 1)

    def _run(self) -> None:
        measures = [self._also]
        finders: list[Callable[[], list[Measure]]] = [functools.partial(_machine, self._path), _gpus]
        for find in finders:
            try:
                measures += find()
            except Exception as error:  # no package, or a driver of another kind
                log.debug("not all system metrics: %s", error)
        while not self._ended.wait(self._every):
            values: dict[str, float] = {}
            for measure in measures:
                with contextlib.suppress(Exception):  # libraries of drivers raise what they like
                    values |= measure()
            now = time.time()
            line = {"kind": "system", "step": max(0, int(now - self._created)), "time": round(now, 3), **values}
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


def _machine(path: Path) -> list[Measure]:
    import psutil

    began = psutil.net_io_counters()
    psutil.cpu_percent()  # the first call only begins to count

    def cpu() -> dict[str, float]:
        return {"cpu_utilization_percentage": psutil.cpu_percent()}

    def memory() -> dict[str, float]:
        now = psutil.virtual_memory()
        return {
            "system_memory_usage_megabytes": (now.total - now.available) / _MEGA,
            "system_memory_usage_percentage": now.percent,
            "process_memory_usage_megabytes": psutil.Process().memory_info().rss / _MEGA,
        }

    def disk() -> dict[str, float]:
        now = psutil.disk_usage(str(path.parent))
        return {
            "disk_usage_megabytes": now.used / _MEGA,
            "disk_available_megabytes": now.free / _MEGA,
            "disk_usage_percentage": now.percent,
        }

    def network() -> dict[str, float]:
        now = psutil.net_io_counters()
        return {
            "network_receive_megabytes": (now.bytes_recv - began.bytes_recv) / _MEGA,
            "network_transmit_megabytes": (now.bytes_sent - began.bytes_sent) / _MEGA,
        }

    return [cpu, memory, disk, network]


def _gpus() -> list[Measure]:
    """Those of NVIDIA's; none without the driver or its package."""
    try:
        pynvml = nvml()
    except NoDriver:
        return []
    measures: list[Measure] = []
    for number in range(pynvml.nvmlDeviceGetCount()):
        with contextlib.suppress(pynvml.NVMLError):  # one that fell off the bus: the others are there
            measures += _gpu(pynvml, number)
    return measures


def _gpu(pynvml: ModuleType, number: int) -> list[Measure]:
    """Each apart: slices (MIG) do not tell their use, and virtual ones not their power."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(number)

    def use() -> dict[str, float]:
        return {f"gpu_{number}_utilization_percentage": pynvml.nvmlDeviceGetUtilizationRates(handle).gpu}

    def memory() -> dict[str, float]:
        now = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return {
            f"gpu_{number}_memory_usage_megabytes": now.used / _MEGA,
            f"gpu_{number}_memory_usage_percentage": 100 * now.used / now.total,
        }

    def power() -> dict[str, float]:
        return {f"gpu_{number}_power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000}

    return [use, memory, power]
