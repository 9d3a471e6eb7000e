"""The plan: both sides in one order, in flat memory, and never wrong about what is missing."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp_worker.errors import StorageError
from wmtp_worker.storage.objects import ObjectInfo
from wmtp_worker.storage.transfer.journal import Stamp
from wmtp_worker.storage.transfer.plan import Local, join, listing, walk


def everything(_):
    """All files take part."""
    return True


def test_the_walk_is_sorted_as_buckets_sort(tmp_path):
    names = ["a/b/c", "a/b.c", "a.b/c", "a-b", "a0", "a/~", "b/é", "b/z", "b/\U0001f600", "b/\uffee", "A", "_"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "folder-without-files" / "x").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")
    found = [local.key for local in walk(tmp_path, everything)]
    assert found == sorted(names, key=str.encode)


def test_no_folder_has_no_files(tmp_path):
    assert list(walk(tmp_path / "missing", everything)) == []


@given(st.sets(st.text("ab/.-é", min_size=1)), st.sets(st.text("ab/.-é", min_size=1)))
def test_every_key_comes_once_with_what_is_on_each_side(local, remote):
    locals_ = (Local(key, key, Stamp(0, 0, 0, 0)) for key in sorted(local, key=str.encode))
    remotes = ((key, ObjectInfo(key, 0, "")) for key in sorted(remote, key=str.encode))
    pairs = list(join(locals_, remotes))
    assert [pair.key for pair in pairs] == sorted(local | remote, key=str.encode)
    assert {pair.key for pair in pairs if pair.local} == local
    assert {pair.key for pair in pairs if pair.remote} == remote


def test_a_listing_out_of_order_is_refused():
    objects = iter([ObjectInfo(key, 1, "") for key in ("p/a", "p/c", "p/b")])
    with pytest.raises(StorageError, match="not sorted"):
        list(listing(objects, "p/", everything))


def test_folder_markers_and_temporaries_in_a_bucket_are_no_files():
    objects = [ObjectInfo(key, 1, "") for key in ("p/", "p/a/", "p/a/.tmp-x", "p/b")]
    assert [key for key, _ in listing(iter(objects), "p/", everything)] == ["b"]


PLANS = """
import resource, sys
from pathlib import Path
from wmtp_worker.storage.objects import ObjectInfo
from wmtp_worker.storage.transfer import Transfer

class Endless:
    url = "memory://"
    def list(self, prefix="", after=""):
        for number in range(int(sys.argv[2])):
            yield ObjectInfo(f"{prefix}{number // 1000:04d}/{number % 1000:04d}.bin", 1, f"v{number}", md5="0" * 32)

with Transfer(Endless(), Path(sys.argv[1], "state")) as transfer:
    report = transfer.push(Path(sys.argv[1], "folder"), "p", dry_run=True)
assert report.planned == {"upload": 100}, report
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_is_flat_with_200_000_keys(tmp_path):
    for number in range(0, 200_000, 2000):
        path = tmp_path / "folder" / f"{number // 1000:04d}" / f"{number % 1000:04d}.bin"
        path.parent.mkdir(parents=True)
        path.write_text("xx")  # another size: differs

    def peak(count):
        command = [sys.executable, "-c", PLANS, str(tmp_path), str(count)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout)

    kib = [peak(20_000), peak(200_000)]
    assert kib[1] < kib[0] + 4_000
