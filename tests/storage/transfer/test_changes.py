"""Files and objects that change, or are damaged, while they travel; disks that fill up; names that clash."""

import os
import resource
import shutil
import subprocess
import sys
import threading

import pytest

from wmtp_worker.errors import DiskFullError, InputError, IntegrityError, PreconditionFailed
from wmtp_worker.storage.transfer.download import STAGING

PART = 64 << 10


class At:
    """Progress that runs an action once, when some bytes have travelled."""

    def __init__(self, action, times=1):
        self._action = action
        self._times = times
        self._lock = threading.Lock()

    def start(self, total):
        pass

    def advance(self, size, files=0):
        with self._lock:
            if size and self._times:
                self._times -= 1
                self._action()

    def finish(self):
        pass


@pytest.fixture
def copy(tmp_path):
    """Where to download to, with an old file in place."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "copy").write_text("old")
    return tmp_path / "out" / "copy"


def test_an_object_that_changes_during_a_download_is_fetched_anew(transfers, bucket, tmp_path, make_file, copy):
    make_file(tmp_path / "first", 20 * PART, seed=1)
    second = make_file(tmp_path / "second", 17 * PART, seed=2)
    transfers(bucket).upload_file(tmp_path / "first", "key")
    change = At(lambda: transfers(bucket).upload_file(tmp_path / "second", "key"))
    transfers(bucket, progress=change, concurrency=2).download_file("key", copy)
    assert copy.read_bytes() == second
    assert os.listdir(copy.parent) == ["copy"]


def test_an_object_that_keeps_changing_is_an_error_and_leaves_the_old_file(
    transfers, bucket, tmp_path, make_file, copy
):
    make_file(tmp_path / "file", 20 * PART)
    transfers(bucket).upload_file(tmp_path / "file", "key")
    change = At(lambda: transfers(bucket).upload_file(tmp_path / "file", "key"), times=50)
    with pytest.raises(PreconditionFailed):
        transfers(bucket, progress=change, concurrency=2).download_file("key", copy)
    assert copy.read_text() == "old"
    assert os.listdir(copy.parent) == ["copy"]


def test_parts_damaged_between_two_processes_are_fetched_again(
    transfers, bucket, tmp_path, make_file, copy, interrupted_download
):
    data = make_file(tmp_path / "file", 20 * PART)
    transfers(bucket).upload_file(tmp_path / "file", "key")
    interrupted_download(bucket, "key", copy, parts=8)
    (left,) = (copy.parent / STAGING).glob("*.data")
    with left.open("r+b") as file:
        file.write(b"damage")
    transfers(bucket).download_file("key", copy)
    assert copy.read_bytes() == data


def test_parts_of_another_version_are_not_used(transfers, bucket, tmp_path, make_file, copy, interrupted_download):
    make_file(tmp_path / "file", 20 * PART)
    transfers(bucket).upload_file(tmp_path / "file", "key")
    interrupted_download(bucket, "key", copy, parts=8)
    data = make_file(tmp_path / "file", 20 * PART, seed=2)
    transfers(bucket).upload_file(tmp_path / "file", "key")
    transfers(bucket).download_file("key", copy)
    assert copy.read_bytes() == data
    assert os.listdir(copy.parent) == ["copy"]


@pytest.mark.parametrize("size", [1000, 20 * PART])
def test_an_object_damaged_at_rest_never_becomes_a_file(transfers, bucket, tmp_path, make_file, copy, size):
    make_file(tmp_path / "file", size)
    digest = transfers(bucket).upload_file(tmp_path / "file", "key").sha256
    make_file(tmp_path / "damaged", size, seed=1)
    bucket.put("key", (tmp_path / "damaged").read_bytes())
    with pytest.raises(IntegrityError):
        transfers(bucket).download_file("key", copy, sha256=digest)
    assert copy.read_text() == "old"
    assert os.listdir(copy.parent) == ["copy"]


@pytest.mark.parametrize("given", [False, True], ids=["digest taken", "digest given"])
def test_a_file_that_changes_during_an_upload_is_sent_as_it_is_in_the_end(
    transfers, bucket, tmp_path, make_file, given
):
    first = make_file(tmp_path / "file", 20 * PART, seed=1)
    second = []
    change = At(lambda: second.append(make_file(tmp_path / "file", 20 * PART, seed=2)))
    transfer = transfers(bucket, progress=change, concurrency=2)
    if given:
        import hashlib

        with pytest.raises(IntegrityError):
            transfer.upload_file(tmp_path / "file", "key", sha256=hashlib.sha256(first).hexdigest())
        assert list(bucket.list()) == []
    else:
        transfer.upload_file(tmp_path / "file", "key")
        assert bytes(bucket.get("key")[1]) == second[0]
    assert not list((tmp_path / "state").glob("*.data"))


def test_a_file_that_never_holds_still_is_an_error(transfers, bucket, tmp_path, make_file):
    make_file(tmp_path / "file", 20 * PART)
    seeds = iter(range(1000))
    change = At(lambda: make_file(tmp_path / "file", 20 * PART, seed=next(seeds)), times=1000)
    with pytest.raises(InputError, match="changes while"):
        transfers(bucket, progress=change, concurrency=2).upload_file(tmp_path / "file", "key")
    assert list(bucket.list()) == []


def test_one_bad_name_does_not_hold_up_the_others(transfer, bucket, tmp_path, make_file):
    for name in ("good", "back\\slash", "new\nline"):
        make_file(tmp_path / "folder" / name, 10)
    make_file(tmp_path / "folder" / os.fsdecode(b"latin-\xe9"), 10)
    report = transfer.push(tmp_path / "folder")
    assert (report.done, len(report.failed)) == ({"upload": 1}, 3)
    with pytest.raises(InputError, match="3 files failed"):
        report.raise_for_failures()
    assert transfer.push(tmp_path / "folder", include=["good"]).failed == []


def test_keys_that_cannot_be_paths_together_fail_alone(transfer, bucket, tmp_path, contents):
    bucket.put("clash/file", b"1")
    bucket.put("other", b"2")
    bucket.put("link", b"3")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "clash").write_text("a file where a folder is needed")
    (tmp_path / "outside").write_text("untouched")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "outside")
    report = transfer.pull("", tmp_path / "out")
    assert sorted(key for key, _ in report.failed) == ["clash/file", "link"]
    assert (tmp_path / "out" / "other").read_text() == "2"
    assert (tmp_path / "outside").read_text() == "untouched"
    assert set(os.listdir(tmp_path / "out")) == {"clash", "other", "link"}


def test_a_linked_folder_is_not_written_through(transfer, bucket, tmp_path):
    bucket.put("sub/deep/file", b"1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
    report = transfer.pull("", tmp_path / "out")
    assert [key for key, _ in report.failed] == ["sub/deep/file"]
    assert os.listdir(tmp_path / "elsewhere") == []


FULL = """
import subprocess, sys
from pathlib import Path
from wmtp_worker.errors import DiskFullError
from wmtp_worker.storage.open import open_url
from wmtp_worker.settings import load
from wmtp_worker.storage.transfer import Transfer

bucket, disk, state, what = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
store = open_url(bucket, load(preset="smoke").cloud)
with Transfer(store, Path(state), part_size=64 << 10) as transfer:
    try:
        transfer.pull("", Path(disk, "out")) if what == "pull" else transfer.download_file("large", Path(disk, "copy"))
    except DiskFullError as error:
        print(error)
    else:
        sys.exit("no error")
left = [str(path) for path in Path(disk).rglob("*") if path.is_file()]
good = {path.stat().st_size for path in Path(disk).rglob("*") if path.is_file()}
assert not any(".tmp-" in name for name in left), left
assert good <= {50_000}, good
"""


@pytest.mark.parametrize("what", ["pull", "download"])
def test_a_full_disk_is_said_and_cleaned_up(bucket, tmp_path, make_file, what):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("user namespaces are needed to mount a small disk")
    for number in range(30):
        make_file(tmp_path / "source" / f"{number:02}", 50_000, seed=number)
    bucket.put("large", os.urandom(2 << 20))
    for path in (tmp_path / "source").iterdir() if what == "pull" else ():
        bucket.put(path.name, path.read_bytes())
    bucket.delete("large") if what == "pull" else None
    (tmp_path / "disk").mkdir()
    command = [
        "unshare",
        "-rm",
        sys.executable,
        "-c",
        FULL,
        bucket.url,
        str(tmp_path / "disk"),
        str(tmp_path / "state"),
    ]
    ran = subprocess.run([*command, what], capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr
    assert "disk" in ran.stdout or "free" in ran.stdout


def test_a_write_that_fails_in_the_middle_leaves_nothing(transfers, bucket, tmp_path, make_file, copy):
    make_file(tmp_path / "file", 20 * PART)
    transfers(bucket).upload_file(tmp_path / "file", "key")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    transfer = transfers(bucket)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 * PART, limits[1]))
        with pytest.raises((DiskFullError, InputError)):
            transfer.download_file("key", copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert copy.read_text() == "old"
    assert os.listdir(copy.parent) == ["copy"]
