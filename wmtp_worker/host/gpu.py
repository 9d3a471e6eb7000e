"""Facts about NVIDIA's GPUs and their driver, without torch: by NVML (nvidia-ml-py) and libcuda.

NVML sees all GPUs that the container was given and needs no CUDA context; libcuda says what the driver can run. Neither
is there without a driver: then every function here says so quietly.
"""

import contextlib
import ctypes
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path("/")
_CUDA_NAMES = {
    3: "not initialized",
    34: "the stub library, which no driver stands behind",
    100: "no device",
    802: "system not yet initialized (is the fabric manager running?)",
    803: "the driver and the library in the container are of different versions",
    804: "forward compatibility is not possible on this GPU",
    999: "unknown error",
}
# what slows a GPU down that a better machine would not have; power caps and idling are usual
_SLOWED_BY = {
    "HwThermalSlowdown": "heat (by hardware)",
    "SwThermalSlowdown": "heat",
    "HwPowerBrakeSlowdown": "an external power brake",
}


class NoDriver(Exception):
    """NVML cannot be asked. `broken`: there is a driver, which does not work."""

    def __init__(self, why: str, *, broken: bool) -> None:
        super().__init__(why)
        self.broken = broken


@dataclass(frozen=True)
class Gpu:
    """One GPU as NVML sees it. Sizes in bytes; None: it does not tell, or has no such thing."""

    index: int
    name: str
    uuid: str
    memory: int | None = None  # a slice of a GPU (MIG) may not ask
    free: int | None = None
    capability: tuple[int, int] | None = None
    uncorrected: int | None = None  # ECC errors since the driver was loaded that could not be put right
    repair_pending: bool = False  # rows to be remapped, or pages to be retired, at the next reset
    repair_failed: bool = False  # no spare rows are left
    slowed_by: tuple[str, ...] = ()
    temperature: int | None = None  # °C


def nvml() -> ModuleType:
    """NVIDIA's own binding, initialized. Raises `NoDriver`."""
    try:
        import pynvml
    except ImportError as error:  # pragma: no cover - it is among our requirements
        raise NoDriver(f"nvidia-ml-py is not installed: {error}", broken=False) from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        absent = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        raise NoDriver(str(error), broken=error.value not in absent) from error
    return pynvml  # type: ignore[no-any-return]


def gpus() -> list[Gpu]:
    """Every GPU of this container. A fact that NVML does not give is left out. Raises `NoDriver`."""
    lib = nvml()
    try:
        return [_gpu(lib, index) for index in range(lib.nvmlDeviceGetCount())]
    except lib.NVMLError as error:
        raise NoDriver(str(error), broken=True) from error


def visible(found: list[Gpu], environ: Mapping[str, str]) -> list[Gpu]:
    """Those that `CUDA_VISIBLE_DEVICES` leaves: by index or by the beginning of a UUID, up to the first wrong one."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return found
    left: list[Gpu] = []
    for word in filter(None, map(str.strip, chosen.split(","))):
        fits = [gpu for gpu in found if word == str(gpu.index) or (not word.isdecimal() and gpu.uuid.startswith(word))]
        if not fits:
            break
        left += fits[:1]
    return left


def device_files(root: Path = ROOT) -> bool:
    """Whether the container was given an NVIDIA device at all."""
    return any((root / "dev").glob("nvidia[0-9]*")) or (root / "dev/nvidiactl").exists()


@dataclass(frozen=True)
class Driver:
    """`version`: the newest CUDA it runs, as (major, minor). `trouble`: why CUDA cannot be started, None if it can."""

    version: tuple[int, int]
    trouble: str | None


def driver() -> Driver | None:
    """What libcuda says, asked by a call that makes no context; None where there is no libcuda. May hang if broken."""
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    if libcuda.cuDriverGetVersion(ctypes.byref(number)) != 0 or number.value <= 0:
        return Driver((0, 0), "it does not tell its version")
    code = libcuda.cuInit(0)
    trouble = None if code == 0 else f"{_CUDA_NAMES.get(code, 'an error')} ({code})"
    return Driver((number.value // 1000, number.value % 1000 // 10), trouble)


def torch_build() -> tuple[str, tuple[int, int] | None] | None:
    """torch's version and the CUDA it was built with (None: none), without importing it; None: there is no torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    found = importlib.util.spec_from_file_location("_torch_version", Path(spec.origin).with_name("version.py"))
    if found is None or found.loader is None:
        return None
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
        version, cuda = str(module.__version__), module.cuda
        return version, None if cuda is None else parse_version(str(cuda))
    except (OSError, AttributeError, ValueError):
        return None


def parse_version(text: str) -> tuple[int, int]:
    """`12.6` as (12, 6). Raises `ValueError`."""
    major, minor = (*text.split("."), "0")[:2]
    return int(major), int(minor)


def runs_on(capability: tuple[int, int], architectures: list[str]) -> str:
    """How a build for these architectures (`sm_80`, `compute_90`, …) runs on a GPU: "native", "jit" or "no".

    Machine code runs on its own major version from its own minor one on; PTX (`compute_…`) is compiled for anything
    newer. A letter at the end (`sm_90a`) binds to that one GPU.
    https://docs.nvidia.com/cuda/blackwell-compatibility-guide/
    """
    jit = False
    for name in architectures:
        kind, _, number = name.partition("_")
        exact = number[-1:].isalpha()
        digits = number.rstrip("abcdefghijklmnopqrstuvwxyz")
        if len(digits) < 2 or not digits.isdecimal():
            continue
        built = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and (built == capability if exact else built[0] == capability[0] and built <= capability):
            return "native"
        jit |= kind == "compute" and not exact and built <= capability
    return "jit" if jit else "no"


def _gpu(lib: ModuleType, index: int) -> Gpu:
    handle = lib.nvmlDeviceGetHandleByIndex(index)
    memory = _ask(lib, lambda: lib.nvmlDeviceGetMemoryInfo(handle), None)
    return Gpu(
        index=index,
        name=_words(lib.nvmlDeviceGetName(handle)),
        uuid=_words(lib.nvmlDeviceGetUUID(handle)),
        memory=None if memory is None else memory.total,
        free=None if memory is None else memory.free,
        capability=_ask(lib, lambda: tuple(lib.nvmlDeviceGetCudaComputeCapability(handle)), None),
        uncorrected=_ask(lib, lambda: _uncorrected(lib, handle), None),
        repair_pending=_ask(lib, lambda: bool(lib.nvmlDeviceGetRemappedRows(handle)[2]), False)
        or _ask(lib, lambda: bool(lib.nvmlDeviceGetRetiredPagesPendingStatus(handle)), False),
        repair_failed=_ask(lib, lambda: bool(lib.nvmlDeviceGetRemappedRows(handle)[3]), False),
        slowed_by=_ask(lib, lambda: _slowed_by(lib, handle), ()),
        temperature=_ask(lib, lambda: int(lib.nvmlDeviceGetTemperature(handle, lib.NVML_TEMPERATURE_GPU)), None),
    )


def _uncorrected(lib: ModuleType, handle: object) -> int:
    return int(lib.nvmlDeviceGetTotalEccErrors(handle, lib.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, lib.NVML_VOLATILE_ECC))


def _slowed_by(lib: ModuleType, handle: object) -> tuple[str, ...]:
    reasons = int(lib.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    known = [words for name, words in _SLOWED_BY.items() if reasons & getattr(lib, f"nvmlClocksThrottleReason{name}")]
    # the general reason comes with the others, or alone
    return tuple(known) or (("its hardware",) if reasons & lib.nvmlClocksThrottleReasonHwSlowdown else ())


def _ask(lib: ModuleType, question: Callable[[], Any], otherwise: Any) -> Any:
    # what a GPU or an older driver does not know is an error to NVML
    with contextlib.suppress(lib.NVMLError, AttributeError):
        return question()
    return otherwise


def _words(text: str | bytes) -> str:
    return text.decode(errors="replace") if isinstance(text, bytes) else text
