"""What only a folder can get wrong: links, hidden files, rights, other people's files."""

import fcntl
import hashlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from wmtp_worker.errors import (
    AccessDenied,
    BucketNotFound,
    InputError,
    ObjectNotFound,
    SettingsError,
    TransientError,
)
from wmtp_worker.settings import load
from wmtp_worker.storage.directory import LOCK, STAGING, open_store

PART = 1 << 16


def cloud(bucket: object, **changes: object):
    environ = {f"WMTP_CLOUD__{name.upper()}": str(value) for name, value in changes.items()}
    return load(preset="smoke", environ={"CLOUD_PROVIDER": "local", "CLOUD_BUCKET": str(bucket), **environ}).cloud


@pytest.fixture
def bucket(tmp_path) -> Path:
    folder = tmp_path / "bucket"
    folder.mkdir()
    return folder


@pytest.fixture
def store(bucket):
    store = open_store(cloud(bucket))
    yield store
    store.close()


def keys(store, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


class Test_the_folder:
    def test_it_is_made_if_only_its_last_part_is_missing(self, tmp_path):
        open_store(cloud(tmp_path / "new")).put("key", b"x")
        assert (tmp_path / "new" / "key").read_bytes() == b"x"
        store = open_store(cloud(tmp_path / "not" / "there"))
        with pytest.raises(BucketNotFound, match="not/there"):
            store.put("key", b"x")
        assert not (tmp_path / "not").exists()

    def test_it_may_go_away_and_come_back(self, bucket, store):
        store.put("key", b"x")
        bucket.rename(bucket.with_name("elsewhere"))
        for call in (lambda: keys(store), lambda: store.head("key"), lambda: store.put("key", b"y")):
            with pytest.raises(BucketNotFound):
                call()
        bucket.with_name("elsewhere").rename(bucket)
        assert keys(store) == ["key"]

    def test_none_is_set(self):
        settings = load(preset="smoke", environ={}).cloud
        with pytest.raises(SettingsError, match="CLOUD_BUCKET"):
            open_store(settings)

    def test_a_link_to_it_is_fine(self, bucket, tmp_path):
        (tmp_path / "link").symlink_to(bucket)
        store = open_store(cloud(tmp_path / "link", prefix="team"))
        store.put("key", b"x")
        assert keys(store) == ["key"]
        assert (bucket / "team" / "key").read_bytes() == b"x"

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
    def test_one_that_is_not_ours(self):
        # pytest's own folders are closed to others
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)
            bucket = Path(folder) / "bucket"
            store = open_store(cloud(bucket))
            store.put("key", b"x")
            bucket.chmod(0o700)
            os.seteuid(65534)
            try:
                for call in (lambda: keys(store), lambda: store.head("key"), lambda: store.put("key", b"y")):
                    with pytest.raises(AccessDenied, match="access to"):
                        call()
            finally:
                os.seteuid(0)
            bucket.chmod(0o755)
            os.seteuid(65534)
            try:
                assert bytes(store.get("key")[1]) == b"x"
                with pytest.raises(AccessDenied, match="access to"):
                    store.put("key", b"y")
            finally:
                os.seteuid(0)


def test_no_cloud_package_is_imported_for_a_folder(bucket):
    program = (
        "import sys; from wmtp_worker.settings import load; from wmtp_worker.storage.open import open_store;"
        f"cloud = load(preset='smoke', environ={{'CLOUD_PROVIDER': 'local', 'CLOUD_BUCKET': {str(bucket)!r}}}).cloud;"
        "open_store(cloud).put('key', b'x');"
        "cloud_packages = ('boto3', 'botocore', 'obstore', 'google.cloud', 'azure', 'torch');"
        "print([name for name in cloud_packages if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180)
    assert (ran.stdout, ran.stderr) == ("[]\n", "")
    assert (bucket / "key").exists()


class Test_links:
    def test_none_leaves_the_bucket(self, bucket, store, tmp_path):
        secret = tmp_path / "secret"
        secret.mkdir()
        (secret / "file").write_text("secret")
        (bucket / "folder").symlink_to(secret)
        (bucket / "file").symlink_to(secret / "file")
        (bucket / "nowhere").symlink_to(tmp_path / "nowhere")
        assert keys(store) == []
        assert keys(store, "folder/") == []
        for key in ("file", "folder/file"):
            with pytest.raises(InputError, match="leaves"):
                store.get(key)
            with pytest.raises(InputError, match="leaves"):
                store.head(key)
        for call in (
            lambda: store.put("folder/file", b"x"),
            lambda: store.delete("folder/file"),
            lambda: store.copy("file", "other"),
        ):
            with pytest.raises(InputError, match="leaves"):
                call()
        store.put("file", b"replaces the link")
        assert (secret / "file").read_text() == "secret"
        assert keys(store) == ["file"]

    def test_files_within_it_are_followed(self, bucket, store):
        store.put("blobs/one", b"x")
        (bucket / "link").symlink_to("blobs/one")
        (bucket / "loop").symlink_to(".")
        assert keys(store) == ["blobs/one", "link"]
        assert bytes(store.get("link")[1]) == b"x"

    def test_a_prefix_that_leaves_it(self, bucket, tmp_path):
        (bucket / "team").symlink_to(tmp_path)
        with pytest.raises(SettingsError, match="leaves"):
            open_store(cloud(bucket, prefix="team"))


class Test_files:
    def test_a_file_and_a_folder_of_one_name(self, store):
        store.put("a", b"x")
        with pytest.raises(InputError, match="file already"):
            store.put("a/b", b"x")
        with pytest.raises(ObjectNotFound):
            store.get("a/b")
        store.delete("a/b")
        store.put("c/d", b"x")
        with pytest.raises(InputError, match="is a folder"):
            store.put("c", b"x")
        with pytest.raises(ObjectNotFound):
            store.get("c")
        store.delete("c")
        assert keys(store) == ["a", "c/d"]

    def test_names_too_long_for_the_file_system(self, store):
        with pytest.raises(InputError, match="another name"):
            store.put("x" * 300, b"x")

    def test_hidden_ones_are_no_objects(self, bucket, store):
        (bucket / "folder").mkdir()
        (bucket / "folder" / ".tmp-half").write_text("half")
        (bucket / "folder" / ".visible").write_text("whole")
        assert keys(store) == ["folder/.visible"]
        for key in (".tmp-x", "folder/.tmp-half", f"{STAGING}/x"):
            with pytest.raises(InputError, match="hidden"):
                store.get(key)

    def test_what_is_no_file(self, bucket, store):
        os.mkfifo(bucket / "pipe")
        assert keys(store) == []
        with pytest.raises(ObjectNotFound):
            store.get("pipe")

    def test_delete_removes_empty_folders_but_not_the_bucket(self, bucket, store):
        store.put("a/b/c", b"x")
        store.put("a/d", b"x")
        store.delete("a/b/c")
        assert sorted(path.name for path in (bucket / "a").iterdir()) == ["d"]
        store.delete("a/d")
        assert [path.name for path in bucket.iterdir() if not path.name.startswith(".tmp-")] == []

    def test_a_digest_is_not_computed_twice(self, bucket, store, monkeypatch):
        info = store.put("key", b"x" * PART)
        monkeypatch.setattr(hashlib, "file_digest", None)
        assert replace(store.head("key"), modified=None) == info
        monkeypatch.undo()
        (bucket / "key").write_bytes(b"y" * PART)
        assert store.head("key").sha256 == hashlib.sha256(b"y" * PART).hexdigest()

    def test_readers_see_whole_objects_only(self, store):
        store.put("key", b"a" * PART)
        stop = threading.Event()

        def write():
            while not stop.is_set():
                for letter in (b"b", b"c"):
                    store.put("key", letter * PART)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(200):
                _, data = store.get("key")
                assert len(data) == PART
                assert len(set(data)) == 1
        finally:
            stop.set()
            writer.join()


def _half(bucket: Path, source: Path, digest: str) -> None:
    upload = open_store(cloud(bucket)).begin("large", source.stat().st_size, digest, PART, None)
    upload.put(0, source.read_bytes()[:PART])
    os._exit(9)


class Test_uploads:
    @pytest.fixture
    def source(self, tmp_path) -> Path:
        path = tmp_path / "source"
        path.write_bytes(os.urandom(3 * PART))
        return path

    def test_a_killed_one_goes_on(self, bucket, store, source):
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        process = multiprocessing.get_context("spawn").Process(target=_half, args=(bucket, source, digest))
        process.start()
        process.join(300)
        assert process.exitcode == 9
        upload = store.begin("large", source.stat().st_size, digest, PART, None)
        assert upload.has(0, source.read_bytes()[:PART])
        assert not upload.has(1, source.read_bytes()[PART : 2 * PART])

    def test_two_at_once_do_not_share_a_file(self, store, source):
        data = source.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        uploads = [store.begin("large", source.stat().st_size, digest, PART, None) for _ in range(2)]
        for number in range(3):
            uploads[0].put(number, data[number * PART : (number + 1) * PART])
        assert not uploads[1].has(0, data[:PART])
        uploads[0].finish()
        for number in range(3):
            uploads[1].put(number, data[number * PART : (number + 1) * PART])
        uploads[1].finish()
        assert bytes(store.get("large")[1]) == data

    def test_nothing_is_left_behind(self, bucket, store, source):
        data = source.read_bytes()
        upload = store.begin("large", source.stat().st_size, hashlib.sha256(data).hexdigest(), PART, None)
        for number in range(3):
            upload.put(number, data[number * PART : (number + 1) * PART])
        upload.finish()
        store.begin("other", source.stat().st_size, "00", PART, None).abort()
        store.copy("large", "copy")
        assert list((bucket / STAGING).iterdir()) == []

    def test_sweep_removes_what_a_killed_put_left(self, bucket, store):
        store.put("key", b"x")
        left = bucket / STAGING / "0123"
        left.write_text("half")
        assert store.sweep("", timedelta(hours=1)) == 0
        assert left.exists()
        assert store.sweep("", timedelta(0)) == 0
        assert not left.exists()


class Test_several_machines:
    def test_a_writer_that_is_stopped_with_the_lock_is_not_waited_for_for_ever(self, bucket, store, monkeypatch):
        monkeypatch.setattr("wmtp_worker.storage.directory._LOCK_SECONDS", 0.1)
        version = store.put("key", b"1").version
        with (bucket / LOCK).open() as stopped:
            fcntl.flock(stopped, fcntl.LOCK_SH)
            store.put("other", b"1")
            with pytest.raises(TransientError, match="stays locked"):
                store.put("key", b"2", if_version=version)
            fcntl.flock(stopped, fcntl.LOCK_EX)
            with pytest.raises(TransientError, match="stays locked"):
                store.put("other", b"2")
        store.put("key", b"2", if_version=version)

    def test_times_are_the_disks_not_the_writers(self, store, monkeypatch):
        now = time.time()
        monkeypatch.setattr("wmtp_worker.storage.directory.time.time_ns", lambda: int((now - 3600) * 1e9))
        first = store.put("key", b"1")
        monkeypatch.undo()
        second = store.put("key", b"2")
        assert first.version != second.version
        store.put("late", b"1")
        for info in (store.head("key"), next(iter(store.list("late")))):
            assert abs(info.modified.timestamp() - now) < 60
