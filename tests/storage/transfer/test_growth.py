"""Files that grow, are replaced or vanish while they are uploaded: what was there when they were opened is sent."""

import hashlib
import os
import threading
import time

import pytest

from tests.storage.transfer.test_changes import At
from wmtp_worker.errors import InputError
from wmtp_worker.storage.transfer import upload
from wmtp_worker.storage.transfer.journal import Stamp

PART = 64 << 10
LINE = b'{"step": 1, "loss": 2.5}\n'


@pytest.fixture
def log(tmp_path):
    """A log of several parts, to which somebody appends every few milliseconds."""
    path = tmp_path / "logs" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_bytes(LINE * (10 * PART // len(LINE)))
    stop = threading.Event()

    def grow():
        with path.open("ab", buffering=0) as file:
            while not stop.wait(0.003):
                file.write(LINE)

    writer = threading.Thread(target=grow)
    writer.start()
    yield path
    stop.set()
    writer.join()


def is_beginning(bucket, key, path):
    """Whether an object is what the file began with, and says so."""
    info, data = bucket.get(key)
    recorded = bucket.head(key).sha256
    return recorded == hashlib.sha256(data).hexdigest() and path.read_bytes().startswith(data) and info.size > 9 * PART


@pytest.mark.parametrize("parts", [PART, 64 * PART], ids=["in parts", "by one request"])
def test_a_log_that_keeps_growing_is_uploaded_as_it_was_at_first(transfers, bucket, log, parts):
    transfer = transfers(bucket, part_size=parts, bandwidth=200 * PART)
    report = transfer.push(log.parent, "logs")
    assert (report.done, report.failed) == ({"upload": 1}, [])
    assert is_beginning(bucket, "logs/metrics.jsonl", log)
    transfer.upload_file(log, "again")
    assert is_beginning(bucket, "again", log)


def test_no_digest_is_noted_for_a_stamp_it_does_not_belong_to(transfers, bucket, tmp_path, make_file):
    path = tmp_path / "file"
    make_file(path, 20 * PART)
    os.utime(path, (1, 1))

    def grow():
        with path.open("ab") as file:
            file.write(b"more")

    transfers(bucket, progress=At(grow), concurrency=2).upload_file(path, "key")
    assert bucket.head("key").size == 20 * PART
    time.sleep(0.1)
    info = transfers(bucket).upload_file(path, "key")
    assert (info.size, info.sha256) == (20 * PART + 4, hashlib.sha256(path.read_bytes()).hexdigest())


def test_what_grows_but_begins_otherwise_has_changed(transfers, bucket, tmp_path, make_file):
    path = tmp_path / "file"
    make_file(path, 20 * PART)
    rewrite = At(lambda: make_file(path, 21 * PART, seed=2))
    transfers(bucket, progress=rewrite, concurrency=2).upload_file(path, "key")
    assert bytes(bucket.get("key")[1]) == path.read_bytes()


@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "removed"])
@pytest.mark.parametrize("when", ["hashed", "sent"])
def test_the_opened_file_is_sent_whatever_takes_its_place(
    transfers, bucket, tmp_path, make_file, monkeypatch, replaced, when
):
    path = tmp_path / "folder" / "best_model.pt"
    first = make_file(path, 20 * PART)

    def act():
        if replaced:
            make_file(tmp_path / "new", 19 * PART, seed=2)
            os.replace(tmp_path / "new", path)
        else:
            path.unlink(missing_ok=True)

    progress = None
    if when == "sent":
        progress = At(act)
    else:
        hash_descriptor, once = upload.hash_descriptor, iter([act])

        def hashed(*args, **kinds):
            digest = hash_descriptor(*args, **kinds)
            next(once, lambda: None)()
            return digest

        monkeypatch.setattr(upload, "hash_descriptor", hashed)
    report = transfers(bucket, progress=progress, concurrency=2).push(path.parent)
    assert (report.done, report.failed) == ({"upload": 1}, [])
    assert bytes(bucket.get(path.name)[1]) == first
    assert bucket.head(path.name).sha256 == hashlib.sha256(first).hexdigest()
    assert not list((tmp_path / "folder").glob("best_model.pt")) or replaced


def test_a_file_that_vanishes_before_it_is_opened_fails_alone(transfers, bucket, tmp_path, make_file):
    folder = tmp_path / "folder"
    for name in ("a", "b", "c"):
        make_file(folder / name, 3 * PART)
    make_file(folder / "z", 10)
    gone = At((folder / "c").unlink)
    report = transfers(bucket, progress=gone, concurrency=1).push(folder)
    assert report.done == {"upload": 3}
    [(key, error)] = report.failed
    assert (key, type(error)) == ("c", InputError)
    assert "cannot read" in error.what


@pytest.mark.parametrize("size", [0, 10])
def test_a_large_file_that_is_cut_before_it_is_opened_is_sent_as_it_is(
    transfers, bucket, tmp_path, make_file, size, monkeypatch
):
    path = tmp_path / "file"
    make_file(path, 3 * PART)
    of = Stamp.of

    def cut(status):
        if status.st_size > size:
            os.truncate(path, size)
            status = path.stat()
        return of(status)

    monkeypatch.setattr(Stamp, "of", staticmethod(cut))
    assert transfers(bucket).upload_file(path, "key").size == size
    assert len(bytes(bucket.get("key")[1])) == size
