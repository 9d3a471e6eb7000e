"""Libraries that act as NVIDIA's driver: real calls through the real bindings, without a GPU."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

FILES = {"nvml.c": "libnvidia-ml.so.1", "cuda.c": "libcuda.so.1"}


@pytest.fixture(scope="session")
def acting_driver(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """`acting_driver(ACTING_FREE=…)`: variables with which a process finds the acting driver."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    for source, library in FILES.items():
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(folder / library), source]
        subprocess.run(command, check=True, timeout=60, cwd=Path(__file__).parent)
    return lambda **acting: {**os.environ, "LD_LIBRARY_PATH": str(folder), **acting}
