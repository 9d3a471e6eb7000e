"""Folders that vanish while they are walked through, as those on a disk that is unmounted: never taken for empty."""

import os
import shutil

import pytest

from wmtp_worker.errors import InputError
from wmtp_worker.storage.transfer import plan


@pytest.fixture
def folder(tmp_path, make_file):
    """Three folders with two files each, and a file between them."""
    for name in ("a/1", "a/2", "b/1", "b/2", "c/1", "c/2", "b.txt"):
        make_file(tmp_path / "folder" / name, 10)
    return tmp_path / "folder"


@pytest.fixture
def meanwhile(monkeypatch, folder):
    """`meanwhile(name, action)`: do it just before the facts of that file are asked for."""

    def arrange(name, action):
        status, left = plan._status, [action]

        def asked(path, *rest):
            if path == str(folder / name) and left:
                left.pop()()
            return status(path, *rest)

        monkeypatch.setattr(plan, "_status", asked)

    return arrange


def keys(bucket):
    """What is in the bucket."""
    return [info.key for info in bucket.list()]


def unmount(folder):
    """Leave the empty folder on which a disk was mounted."""
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()


@pytest.mark.parametrize("name", ["a/1", "a/2", "b.txt", "c/2"])
@pytest.mark.parametrize("leave", [shutil.rmtree, unmount])
def test_nothing_is_deleted_where_the_folder_vanishes(transfer, bucket, folder, meanwhile, name, leave):
    transfer.push(folder)
    bucket.put("0-not-in-the-folder", b"")
    before = keys(bucket)
    meanwhile(name, lambda: leave(folder))
    with pytest.raises(InputError, match="vanished"):
        transfer.push(folder, delete=True)
    assert keys(bucket) == before


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_folder_that_vanishes_is_an_error_without_deletion_too(transfer, folder, meanwhile, dry_run):
    meanwhile("a/2", lambda: unmount(folder))
    with pytest.raises(InputError, match="vanished"):
        transfer.push(folder, dry_run=dry_run)


@pytest.mark.parametrize("gone", ["b", "c"])
def test_a_folder_in_it_that_vanishes_is_left_out_with_a_warning(transfer, bucket, folder, meanwhile, caplog, gone):
    transfer.push(folder)
    before = keys(bucket)
    meanwhile("b/1", lambda: shutil.rmtree(folder / gone))
    report = transfer.push(folder)
    assert (report.failed, report.done["skip"]) == ([], 5)
    assert f"skipping {folder}/{gone}" in caplog.text
    meanwhile("a/1", lambda: shutil.rmtree(folder / ("c" if gone == "b" else "b")))
    with pytest.raises(InputError, match="vanished"):
        transfer.push(folder, delete=True)
    assert keys(bucket) == before


def test_a_file_that_vanishes_alone_is_deleted(transfer, bucket, folder, meanwhile):
    transfer.push(folder)
    meanwhile("b/1", (folder / "b" / "1").unlink)
    assert transfer.push(folder, delete=True).done == {"delete": 1, "skip": 6}
    assert "b/1" not in keys(bucket)


def test_a_file_of_which_nothing_can_be_learned_is_not_deleted(transfer, bucket, folder, monkeypatch):
    transfer.push(folder)
    before, lstat = keys(bucket), os.lstat

    def broken(path, **kinds):
        if str(path) == str(folder / "b" / "1"):
            raise OSError(5, "Input/output error", path)
        return lstat(path, **kinds)

    monkeypatch.setattr(plan.os, "lstat", broken)
    with pytest.raises(InputError, match="Input/output error"):
        transfer.push(folder, delete=True)
    assert keys(bucket) == before


def test_a_pull_into_a_folder_that_vanishes_is_an_error(transfer, bucket, folder, meanwhile):
    transfer.push(folder)
    meanwhile("b/1", lambda: unmount(folder))
    with pytest.raises(InputError, match="vanished"):
        transfer.pull("", folder, dry_run=True)


def test_an_object_makes_way_for_a_folder(transfer, bucket, tmp_path, make_file):
    bucket.put("a", b"old")
    bucket.put("b", b"old")
    make_file(tmp_path / "folder" / "a" / "deep" / "file", 10)
    assert transfer.push(tmp_path / "folder", delete=True).done == {"delete": 2, "upload": 1}
    assert keys(bucket) == ["a/deep/file"]
