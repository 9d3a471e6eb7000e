"""Folders as buckets in odd places, odd names, dry runs, and what is left behind: nothing."""

import os
import threading
import time
from pathlib import Path

import pytest

from tests.storage.transfer.conftest import PART
from wmtp_worker.errors import InputError, IntegrityError, StorageError
from wmtp_worker.storage.transfer import Report
from wmtp_worker.storage.transfer.download import STAGING, place_of

EVIL = "x\x1b[31mred\x07\nline\u202e"
NO_TEXT = os.fsdecode(b"latin-\xe9")


@pytest.fixture
def root(bucket):
    """The folder that is the bucket."""
    return Path(bucket.url)


def everything(folder):
    """Every path below a folder."""
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("way", ["push", "pull", "verify"])
@pytest.mark.parametrize(("folder", "prefix"), [("", "a"), ("a", ""), ("a/deep", "a"), ("link", "a/deep")])
def test_folders_in_each_other_are_refused(transfer, root, make_file, way, folder, prefix):
    make_file(root / "a" / "deep" / "file", 10)
    (root / "link").symlink_to(root / "a")
    before = everything(root)
    arguments = (prefix, root / folder) if way != "push" else (root / folder, prefix)
    with pytest.raises(InputError, match="in the other"):
        getattr(transfer, way)(*arguments)
    assert everything(root) == before


def test_the_same_folder_has_nothing_to_transfer_and_proves_nothing(transfer, root, make_file):
    make_file(root / "a" / "file", 10)
    assert transfer.push(root / "a", "a", delete=True).planned == {}
    assert transfer.pull("a", root / "a", delete=True).planned == {}
    with pytest.raises(InputError, match="same folder"):
        transfer.verify("a", root / "a")
    assert everything(root) == [root / "a", root / "a" / "file"]


def test_folders_side_by_side_in_the_bucket_are_fine(transfer, root, make_file, contents):
    data = make_file(root / "work" / "a" / "file", 10)
    make_file(root / "work" / "ab" / "large", 3 * PART)
    assert transfer.push(root / "work" / "a", "b").done == {"upload": 1}
    assert transfer.pull("work/ab", root / "work" / "a").done == {"download": 1}
    transfer.upload_file(root / "work" / "a" / "file", "file")
    transfer.upload_file(root / "file", "file")
    transfer.download_file("work/a/file", root / "work" / "a" / "copy")
    assert contents(root / "b") == {"file": data}
    assert [(root / name).read_bytes() for name in ("file", "work/a/copy")] == [data] * 2


def test_folders_whose_names_are_no_text_are_pushed_and_pulled(transfers, bucket, tmp_path, make_file, contents):
    folder = tmp_path / NO_TEXT
    make_file(folder / "file", 10)
    make_file(folder / "large", 3 * PART)
    time.sleep(0.1)  # so that digests are noted
    for state in ("state", "state", f"state-{NO_TEXT}"):
        transfer = transfers(bucket, state=tmp_path / state)
        report = transfer.push(folder, "p")
        assert report.failed == []
        transfer.upload_file(folder / "large", "large")
        transfer.pull("p", tmp_path / f"copy-{NO_TEXT}").raise_for_failures()
        transfer.download_file("large", tmp_path / NO_TEXT / "copy")
        (tmp_path / NO_TEXT / "copy").unlink()
        transfer.close()
    assert report.done == {"skip": 2}
    assert contents(tmp_path / f"copy-{NO_TEXT}") == contents(folder)


def test_names_that_are_no_text_fail_alone_and_clearly(transfer, bucket, tmp_path, make_file, caplog):
    for name in ("good", NO_TEXT, f"{NO_TEXT}-folder/file"):
        make_file(tmp_path / "folder" / name, 10)
    (tmp_path / "folder" / f"link-{NO_TEXT}").symlink_to("nowhere")
    time.sleep(0.1)
    report = transfer.push(tmp_path / "folder")
    assert report.done == {"upload": 1}
    assert [type(error) for _, error in report.failed] == [InputError] * 2
    with pytest.raises(InputError) as caught:
        report.raise_for_failures()
    for text in (str(caught.value), caplog.text):
        assert "\\udce9" in text
        assert text.encode()


def test_keys_cannot_play_with_the_terminal(transfer, bucket, tmp_path, make_file, caplog):
    report = Report()
    report.fail(EVIL, IntegrityError(f"{EVIL} is bad", where=f"get {EVIL}"))
    with pytest.raises(IntegrityError) as caught:
        report.raise_for_failures()
    make_file(tmp_path / "folder" / EVIL / "link", 1)
    (tmp_path / "folder" / EVIL / "link").unlink()
    (tmp_path / "folder" / EVIL / "link").symlink_to("/etc/passwd")
    make_file(tmp_path / "folder" / EVIL / "file", 1)
    found = transfer.verify("", tmp_path / "folder")
    with pytest.raises(InputError) as missing:
        transfer.push(tmp_path / EVIL)
    texts = [str(caught.value), str(missing.value), *(str(error) for _, error in found.failed)]
    assert len(texts) == 3
    assert [
        text for text in (*texts, *(record.getMessage() for record in caplog.records)) if not text.isprintable()
    ] == []
    assert "\\x1b[31mred\\x07\\nline\\u202e" in texts[0]


def test_a_change_with_its_time_put_back_is_noticed(transfers, bucket, tmp_path, make_file):
    def tamper(path):
        time.sleep(0.1)
        status = path.stat()
        path.write_bytes(b"tampered" * 2)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    transfer = transfers(bucket)
    source, copy = tmp_path / "source" / "file", tmp_path / "copy" / "file"
    make_file(source, 16)
    time.sleep(0.1)
    transfer.push(source.parent)
    tamper(source)
    assert transfer.push(source.parent).done == {"upload": 1}
    transfer.pull("", copy.parent)
    make_file(source, 16, seed=2)
    transfer.upload_file(source, "file")
    transfer.pull("", copy.parent)
    tamper(copy)
    assert transfer.pull("", copy.parent).done == {"download": 1}
    tamper(copy)
    transfer.download_file("file", copy)
    assert copy.read_bytes() == source.read_bytes()


def test_what_was_transferred_is_not_hashed_again(transfers, bucket, tmp_path, make_file, monkeypatch):
    for name, size in (("file", 10), ("large", 3 * PART)):
        make_file(tmp_path / "source" / name, size)
    transfers(bucket).push(tmp_path / "source")
    transfers(bucket).pull("", tmp_path / "copy")
    hashed = []
    monkeypatch.setattr("wmtp_worker.storage.transfer.compare._hash", lambda *args: hashed.append(args))
    assert transfers(bucket).pull("", tmp_path / "copy", dry_run=True).planned == {"skip": 2}
    assert hashed == []


def test_dry_runs_make_and_remove_nothing(transfers, bucket, root, tmp_path, make_file):
    make_file(root / "file", 10)
    make_file(tmp_path / "folder" / "file", 10, seed=2)  # the digests have to be computed
    make_file(tmp_path / "folder" / STAGING / "p-0", 10)  # of another process
    make_file(tmp_path / "folder" / STAGING / f"{'0' * 32}.data", 10)
    before = everything(tmp_path), everything(root)
    with transfers(bucket, state=tmp_path / "work" / "state") as transfer:
        assert transfer.pull("", tmp_path / "folder", dry_run=True, delete=True).planned == {"download": 1}
        assert transfer.pull("", tmp_path / "new", dry_run=True).planned == {"download": 1}
        assert transfer.push(tmp_path / "folder", dry_run=True, delete=True).planned == {"upload": 1}
    assert (everything(tmp_path), everything(root)) == before


def test_nothing_hidden_is_left_when_many_threads_download_into_one_folder(transfer, bucket, tmp_path):
    sizes = [10, 3 * PART, 0, 2 * PART + 1] * 6
    for number, size in enumerate(sizes):
        bucket.put(f"p/{number}", os.urandom(size))
    errors = []

    def download(number):
        try:
            transfer.download_file(f"p/{number}", tmp_path / "out" / str(number))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=download, args=(number,)) for number in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert sorted(os.listdir(tmp_path / "out"), key=int) == [str(number) for number in range(len(sizes))]
    transfer.pull("p", tmp_path / "pulled")
    assert len(os.listdir(tmp_path / "pulled")) == len(sizes)


@pytest.mark.parametrize("suffix", [".small", ".state", ".data", ".lock"])
def test_a_pull_removes_what_killed_downloads_left(transfer, bucket, tmp_path, make_file, suffix):
    bucket.put("p/file", b"1")
    left = place_of(tmp_path / "out" / STAGING, "gone")
    make_file(left.with_name(left.name + suffix), 10)
    transfer.pull("p", tmp_path / "out").raise_for_failures()
    assert os.listdir(tmp_path / "out") == ["file"]


@pytest.mark.parametrize("size", [10, 3 * PART])
def test_a_closed_transfer_says_so(transfers, bucket, tmp_path, make_file, size):
    make_file(tmp_path / "folder" / "file", size)
    bucket.put("key", bytes(size))
    transfer = transfers(bucket)
    transfer.close()
    before = set(threading.enumerate())
    for work in (
        lambda: transfer.upload_file(tmp_path / "folder" / "file", "k"),
        lambda: transfer.download_file("key", tmp_path / "copy"),
        lambda: transfer.push(tmp_path / "folder"),
        lambda: transfer.pull("", tmp_path / "out"),
        lambda: transfer.verify("", tmp_path / "folder"),
    ):
        with pytest.raises(StorageError, match="closed"):
            work()
    transfer.close()
    assert set(threading.enumerate()) <= before
    assert not (tmp_path / "copy").exists()
    assert [info.key for info in bucket.list()] == ["key"]


def test_a_transfer_closed_while_it_is_under_way_ends(transfers, bucket, tmp_path, make_file):
    make_file(tmp_path / "large", 200 * PART)
    transfer = transfers(bucket, bandwidth=10 * PART, concurrency=2)
    closer = threading.Timer(0.2, transfer.close)
    closer.start()
    with pytest.raises(StorageError, match="closed"):
        transfer.upload_file(tmp_path / "large", "key")
    closer.join()
    assert list(bucket.list()) == []
