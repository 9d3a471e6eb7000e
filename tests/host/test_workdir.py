"""The work directory, on real file systems."""

import os
import tempfile
from pathlib import Path

import pytest

from tests.disks import mounted
from wmtp_worker.errors import DiskFullError, SettingsError
from wmtp_worker.host.workdir import prepare


def test_it_is_made_and_left_empty(tmp_path):
    workdir = tmp_path / "a/b"
    assert prepare(workdir) == workdir
    assert list(workdir.iterdir()) == []
    assert prepare(workdir) == workdir


def test_what_is_in_it_stays(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def refused(workdir):
    with pytest.raises(SettingsError) as caught:
        prepare(workdir)
    assert "WMTP_WORKDIR" in str(caught.value)
    return str(caught.value)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(tmp_path / "file/work")
    assert "File exists" in refused(tmp_path / "file")


def test_a_file_system_that_takes_no_files():
    assert "cannot be written" in refused(Path("/proc/wmtp"))


@pytest.fixture
def read_only():
    """A folder this process may not write, even if it is root's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        us = os.geteuid()
        if us == 0:
            os.seteuid(65534)
        yield folder
        os.seteuid(us)
        folder.chmod(0o755)


def test_no_permission(read_only):
    assert "Permission denied" in refused(read_only)
    assert "Permission denied" in refused(read_only / "new")


@pytest.fixture
def full_disk(tmp_path):
    """A file system without room for one more file."""
    disk = tmp_path / "disk"
    with mounted(disk, "size=64k,nr_inodes=2"):
        (disk / "the last one").write_text("")
        yield disk


def test_a_full_disk(full_disk):
    with pytest.raises(DiskFullError) as caught:
        prepare(full_disk)
    assert "No space left on device" in str(caught.value)
    assert "WMTP_WORKDIR" in str(caught.value)
    assert [path.name for path in full_disk.iterdir()] == ["the last one"]
