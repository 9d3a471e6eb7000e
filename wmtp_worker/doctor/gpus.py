"""Checks of the GPUs: the driver against torch's CUDA, the GPU against torch's kernels, health, memory, NCCL.

The functions that judge are pure; what they judge comes from `host.gpu`. Where there is no GPU, nothing is said.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from wmtp_worker.doctor.case import Case
from wmtp_worker.doctor.check import Check, Status
from wmtp_worker.host import gpu
from wmtp_worker.host.gpu import Driver, Gpu

GIB = 1 << 30
# of a GPU's memory that somebody else may hold without it meaning another job: the driver's own, a display
_TAKEN = 0.1
COLLECTIVE_SECONDS = 90.0


def driver(case: Case) -> Check | None:
    """The driver against the CUDA that torch was built with."""
    try:
        found = gpu.gpus()
    except gpu.NoDriver as error:
        if not error.broken and not gpu.device_files(case.root):
            return None
        advice = "start the container with --gpus all (NVIDIA Container Toolkit), or take another machine"
        return Check("driver", "fail", f"NVML does not work: {error}", advice)
    return judge_driver(found, gpu.driver(), gpu.torch_build())


def judge_driver(
    found: Sequence[Gpu], driver: Driver | None, build: tuple[str, tuple[int, int] | None] | None
) -> Check | None:
    """`build`: torch's version and its CUDA. A driver runs every older CUDA; of its own major version newer ones too,
    but compiles no PTX of those. https://docs.nvidia.com/deploy/cuda-compatibility/"""
    if not found:
        return None
    names = ", ".join(f"{name} × {count}" for name, count in _counted(found).items())
    if driver is None:
        advice = "start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        return Check("driver", "fail", f"{names}, but libcuda.so.1 is not there", advice)
    text = f"{names}; the driver runs CUDA up to {_dotted(driver.version)}"
    if driver.trouble is not None:
        return Check("driver", "fail", f"{text}, but CUDA does not start: {driver.trouble}", "take another machine")
    if build is None:
        return Check("driver", "pass", text)
    version, cuda = build
    if cuda is None:
        advice = "install a build of torch for CUDA, or use the image: this one computes on the CPU"
        return Check("driver", "warn", f"{text}, but torch {version} is built without CUDA", advice)
    text = f"{text}, torch {version} wants {_dotted(cuda)}"
    if driver.version >= cuda:
        return Check("driver", "pass", text)
    advice = (
        f"rent a machine with CUDA {_dotted(cuda)} or newer (vast: cuda_vers>={_dotted(cuda)}), or build the image "
    )
    advice += "on a base for an older CUDA (--build-arg BASE_IMAGE=…)"
    if driver.version[0] == cuda[0]:
        return Check("driver", "warn", f"{text}: works, but for kernels that are compiled at run time", advice)
    return Check("driver", "fail", text, advice)


def architecture(case: Case) -> Check | None:
    """The GPU's compute capability against the kernels in this build of torch."""
    if not (found := _visible(case)):
        return None
    import torch

    return judge_architecture(found, torch.cuda.get_arch_list())


def judge_architecture(found: Sequence[Gpu], architectures: list[str]) -> Check | None:
    """`architectures`: as `torch.cuda.get_arch_list()` gives them; none: CUDA does not work, as others say."""
    if not architectures:
        return None
    by_way: dict[str, set[str]] = {}
    for one in found:
        if one.capability is not None:
            way = gpu.runs_on(one.capability, architectures)
            by_way.setdefault(way, set()).add(f"{one.name} ({_dotted(one.capability)})")
    built = ", ".join(architectures)
    advice = "build the image on a base with kernels for it (--build-arg BASE_IMAGE=…: a cuda13.0 tag for Blackwell)"
    if "no" in by_way:
        names = ", ".join(sorted(by_way["no"]))
        return Check("architecture", "fail", f"torch has no kernels for {names}, only {built}", advice)
    if "jit" in by_way:
        names = ", ".join(sorted(by_way["jit"]))
        return Check(
            "architecture", "warn", f"kernels for {names} are compiled at the first start, for minutes", advice
        )
    return Check("architecture", "pass", ", ".join(sorted(by_way.get("native", ())))) if by_way else None


def health(case: Case) -> Check | None:
    """ECC errors, rows that wait for repair, and what slows the GPU down."""
    return judge_health(_visible(case))


def judge_health(found: Sequence[Gpu]) -> Check | None:
    if not found:
        return None
    worst: Status = "pass"
    words, advice = [], set()
    for one in found:
        said: list[str] = []
        if one.uncorrected or one.repair_failed:
            worst = "fail"
            said.append(
                f"{one.uncorrected or 0} uncorrected ECC errors" + (", no spare rows" if one.repair_failed else "")
            )
            advice.add("take another machine and tell the host: it computes wrong")
        if one.repair_pending:
            said.append("memory that waits for repair")
            advice.add("have the GPU reset, or take another machine")
        if one.slowed_by:
            said.append(f"slowed down by {', '.join(one.slowed_by)}" + _degrees(one))
            advice.add("it may train at half its speed: take another machine if that stays")
        if said:
            worst = "fail" if worst == "fail" else "warn"
            words.append(f"GPU {one.index}: {'; '.join(said)}")
    if worst == "pass":
        hottest = max((one for one in found if one.temperature is not None), key=_temperature, default=None)
        return Check("gpu health", "pass", "no errors" + ("" if hottest is None else _degrees(hottest)))
    return Check("gpu health", worst, "; ".join(words), "; ".join(sorted(advice)))


def memory(case: Case) -> Check | None:
    """Whether somebody else holds the GPU's memory."""
    return judge_memory(_visible(case))


def judge_memory(found: Sequence[Gpu]) -> Check | None:
    """What is free of each, as far as it is known."""
    sizes = {one.index: (one.free, one.memory) for one in found if one.free is not None and one.memory is not None}
    if not sizes:
        return None
    taken = {index: size for index, size in sizes.items() if size[0] < (1 - _TAKEN) * size[1]}
    if taken:
        words = (
            f"GPU {index}: {free / GIB:.1f} of {memory / GIB:.1f} GiB free" for index, (free, memory) in taken.items()
        )
        advice = "another process holds it: end that, or choose other GPUs by CUDA_VISIBLE_DEVICES"
        return Check("gpu memory", "warn", ", ".join(words), advice)
    least = min(free for free, _ in sizes.values())
    return Check("gpu memory", "pass", f"{least / GIB:.1f} GiB free" + (" on each" if len(sizes) > 1 else ""))


def nccl(case: Case) -> Check | None:
    """With several GPUs: NCCL is there, and a sum over all of them is right. One process a GPU, as in a run."""
    if (count := len(_visible(case))) < 2 or case.settings.host.device not in ("auto", "cuda"):
        return None
    import torch

    if not torch.distributed.is_nccl_available():
        return Check("nccl", "fail", "torch is built without NCCL", "use the image, or a build of torch for CUDA")
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return judge_collective(f"NCCL {version}", count, *collective("nccl", count, COLLECTIVE_SECONDS))


def judge_collective(name: str, count: int, results: Sequence[float | None], trouble: str) -> Check:
    """`results`: what each rank got for the sum of ones, None where it got none; `trouble`: the last words of those."""
    if all(result == count for result in results):
        return Check("nccl", "pass", f"{name}: a sum over {count} GPUs is right")
    advice = "give docker --shm-size=8g; else try NCCL_P2P_DISABLE=1 (slower), or NCCL_DEBUG=INFO to see more"
    lost = [rank for rank, result in enumerate(results) if result is None]
    if lost:
        return Check("nccl", "fail", f"{name}: no sum on ranks {lost} of {count}: {trouble or 'no answer'}", advice)
    return Check("nccl", "fail", f"{name}: the sum over {count} GPUs is {list(results)}", advice)


def collective(backend: str, count: int, seconds: float) -> tuple[list[float | None], str]:
    """A sum of ones over `count` processes by `backend`: what each got, and the last words of one that failed."""
    with tempfile.TemporaryDirectory(prefix="wmtp-doctor-") as folder:
        command = [sys.executable, "-m", "wmtp_worker.doctor.collective", backend, str(count), f"{folder}/store"]
        running = [
            subprocess.Popen(
                [*command, str(rank), str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for rank in range(count)
        ]
        results: list[float | None] = []
        trouble = ""
        try:
            for process in running:
                try:
                    out, err = process.communicate(timeout=seconds)
                except subprocess.TimeoutExpired:
                    seconds = 0.1  # the others have had their time
                    process.kill()
                    out, err = process.communicate()  # what it said until then
                    results.append(None)
                else:
                    results.append(_sum(out))
                if results[-1] is None:
                    trouble = _trouble(out, err) or trouble
        finally:
            for process in running:
                process.kill()
                process.wait()
                for stream in (process.stdout, process.stderr):
                    if stream is not None:
                        stream.close()
    return results, trouble


def _sum(said: str) -> float | None:
    """With NCCL_DEBUG, NCCL speaks on the same stream."""
    found = [line for line in said.splitlines() if line.startswith("{")]
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
        return float(json.loads(found[-1])["sum"])
    return None


def _trouble(out: str, err: str) -> str:
    """The last line of each stream: NCCL's own, if it was asked to speak, and the reason."""
    lines = [[line.strip() for line in said.splitlines() if line.strip()] for said in (out, err)]
    return "; ".join(said[-1][:300] for said in lines if said)


def _visible(case: Case) -> list[Gpu]:
    try:
        return gpu.visible(gpu.gpus(), case.environ)
    except gpu.NoDriver:
        return []


def _counted(found: Sequence[Gpu]) -> dict[str, int]:
    names = [one.name for one in found]
    return {name: names.count(name) for name in names}


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _temperature(one: Gpu) -> int:
    return one.temperature or 0


def _degrees(one: Gpu) -> str:
    return "" if one.temperature is None else f", {one.temperature} °C"
