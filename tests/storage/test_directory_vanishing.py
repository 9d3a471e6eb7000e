"""A folder as bucket that is not there yet, or not any more: the one is empty, the other is never taken for that."""

import os
import shutil

import pytest

from wmtp_worker.errors import BucketNotFound, ObjectNotFound
from wmtp_worker.settings import load
from wmtp_worker.storage import directory_listing
from wmtp_worker.storage.directory import LOCK
from wmtp_worker.storage.open import open_store
from wmtp_worker.storage.transfer import Transfer

NAMES = ("a/1", "a/2", "b/1", "b.txt", "c/1", "d")


def cloud(bucket):
    return load(preset="smoke", environ={"CLOUD_PROVIDER": "local", "CLOUD_BUCKET": str(bucket)}).cloud


def keys(store):
    return [info.key for info in store.list()]


def unmount(folder):
    """Leave the empty folder on which a disk was mounted."""
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()


@pytest.fixture
def bucket(tmp_path):
    """Files that others put there: no worker has written to it."""
    folder = tmp_path / "bucket"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def store(bucket):
    store = open_store(cloud(bucket))
    yield store
    store.close()


@pytest.fixture
def meanwhile(monkeypatch, bucket):
    """`meanwhile(name, action)`: do it just before that folder is read."""

    def arrange(name, action):
        scandir, left = os.scandir, [action]

        def asked(path):
            if str(path) == str(bucket / name) and left:
                left.pop()()
            return scandir(path)

        monkeypatch.setattr(directory_listing.os, "scandir", asked)

    return arrange


class Test_one_that_is_not_there_yet:
    def test_is_empty_and_reading_does_not_make_it(self, tmp_path):
        store = open_store(cloud(tmp_path / "new"))
        assert keys(store) == []
        for call in (store.head, store.get):
            with pytest.raises(ObjectNotFound):
                call("key")
        store.delete("key")
        assert list(tmp_path.iterdir()) == []
        store.put("key", b"x")
        assert keys(store) == ["key"]

    def test_a_dry_run_does_not_make_it(self, bucket, tmp_path):
        with Transfer(open_store(cloud(tmp_path / "new")), tmp_path / "state") as transfer:
            assert transfer.push(bucket, dry_run=True).planned == {"upload": len(NAMES)}
            assert not (tmp_path / "new").exists()
            assert transfer.push(bucket).done == {"upload": len(NAMES)}

    def test_nor_the_one_it_would_be_in(self, tmp_path):
        store = open_store(cloud(tmp_path / "disk" / "bucket"))
        for call in (lambda: keys(store), lambda: store.get("key"), lambda: store.put("key", b"x")):
            with pytest.raises(BucketNotFound, match=f"make {tmp_path}/disk, mount the disk, or set CLOUD_BUCKET"):
                call()

    def test_a_file_is_none(self, tmp_path):
        (tmp_path / "file").touch()
        for call in (keys, lambda store: store.put("key", b"x")):
            with pytest.raises(BucketNotFound):
                call(open_store(cloud(tmp_path / "file")))


@pytest.mark.parametrize("leave", [shutil.rmtree, unmount])
@pytest.mark.parametrize("written", [False, True])
class Test_one_that_vanishes:
    def calls(self, store):
        yield lambda: keys(store)
        yield lambda: list(store.list("a/"))
        yield lambda: store.head("d")
        yield lambda: store.get("d")
        yield lambda: store.put("d", b"x")
        yield lambda: store.delete("d")
        yield lambda: store.begin("large", 10, "00", 10, None)

    def test_is_not_empty(self, store, bucket, leave, written):
        store.put("d", b"d") if written else keys(store)
        leave(bucket)
        for call in self.calls(store):
            with pytest.raises(BucketNotFound, match="vanished"):
                call()
        assert not bucket.exists() or list(bucket.iterdir()) == []

    @pytest.mark.parametrize("name", ["", "a", "b", "c"])
    def test_while_it_is_listed(self, store, bucket, meanwhile, leave, written, name):
        if written:
            store.put("d", b"d")
        meanwhile(name, lambda: leave(bucket))
        with pytest.raises(BucketNotFound, match="vanished"):
            keys(store)

    @pytest.mark.parametrize("name", ["a", "b", "c"])
    def test_nothing_is_deleted_on_the_other_side(self, store, bucket, meanwhile, tmp_path, leave, written, name):
        with Transfer(store, tmp_path / "state") as transfer:
            transfer.pull("", tmp_path / "folder")
            if written:
                store.put("d", b"d")
            meanwhile(name, lambda: leave(bucket))
            with pytest.raises(BucketNotFound, match="vanished"):
                transfer.pull("", tmp_path / "folder", delete=True)
        assert all((tmp_path / "folder" / name).exists() for name in NAMES)


def test_a_disk_that_is_mounted_again_is_known_by_the_lock_file(store, bucket):
    store.put("d", b"d")
    shutil.copytree(bucket, bucket.with_name("copy"))
    unmount(bucket)
    with pytest.raises(BucketNotFound):
        keys(store)
    bucket.rmdir()
    bucket.with_name("copy").rename(bucket)
    assert (bucket / LOCK).exists()
    assert keys(store) == sorted(NAMES)
    store.put("e", b"e")


def test_what_is_deleted_while_it_is_listed_is_left_out(store, bucket, meanwhile):
    meanwhile("b", lambda: shutil.rmtree(bucket / "b"))
    assert keys(store) == sorted(set(NAMES) - {"b/1"})
