"""Use of the machine while a run trains, in the names that MLflow's own page of system metrics knows."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

_MEGA = 1e6


class SystemSampler:
    """Appends a line to `system.jsonl` every so many seconds, in a thread of its own.

    Its steps are seconds since the run first began: they grow on every machine. A line that cannot be written, and a
    measure that cannot be had, are left out.
    """

    def __init__(self, path: Path, created: float, every: float) -> None:
        """`created` is Unix time; with 0 seconds nothing is measured."""
        self._path = path
        self._created = created
        self._every = every
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
        try:
            measures = [*_machine(self._path), *_gpus()]
        except Exception as error:  # no package, or a driver of another kind
            log.debug("no system metrics: %s", error)
            return
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


Measure = Callable[[], dict[str, float]]


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
    """One for each of NVIDIA's; none without the driver or its package."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return []

    def of(number: int) -> Measure:
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)

        def gpu() -> dict[str, float]:
            use, memory = pynvml.nvmlDeviceGetUtilizationRates(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
            return {
                f"gpu_{number}_utilization_percentage": use.gpu,
                f"gpu_{number}_memory_usage_megabytes": memory.used / _MEGA,
                f"gpu_{number}_memory_usage_percentage": 100 * memory.used / memory.total,
                f"gpu_{number}_power_usage_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            }

        return gpu

    return [of(number) for number in range(pynvml.nvmlDeviceGetCount())]
