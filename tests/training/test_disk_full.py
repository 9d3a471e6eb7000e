"""A disk that fills up while a run trains."""

import subprocess

import pytest

from wmtp_worker.checkpoint.restore import find
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.metrics import read


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one checkpoint of the tiny run and its exports, not for two checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2600k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_the_training_goes_on(small_disk, tiny_run, tmp_path):
    tiny_run(small_disk, "checkpoint.keep_last=3")
    paths = RunPaths(small_disk, "tiny")
    assert "step_6 is NOT saved, the training goes on" in paths.training_log.read_text()
    assert find(paths, "auto").manifest.step == 3
    assert [line["step"] for line in read(paths.metrics) if line["kind"] == "train"] == list(range(1, 13))
    tiny_run(tmp_path / "elsewhere")
    assert paths.final.read_bytes() == RunPaths(tmp_path / "elsewhere", "tiny").final.read_bytes()
