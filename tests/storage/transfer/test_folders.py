"""Folders: only what differs travels, by patterns, with deletion only when asked."""

import pytest

from wmtp_worker.errors import InputError

PART = 64 << 10


@pytest.fixture
def folder(tmp_path, make_file):
    """Files whose keys sort otherwise than their names: `a.txt` comes before `a/…`."""
    for number, name in enumerate(["a/one.bin", "a/deep/two.bin", "a.txt", "a-b/three.bin", "ünï/日本 file.bin", "z"]):
        make_file(tmp_path / "folder" / name, 1000 + number, seed=number)
    make_file(tmp_path / "folder" / "large.bin", 5 * PART + 3, seed=99)
    (tmp_path / "folder" / "empty").touch()
    return tmp_path / "folder"


def test_a_folder_goes_there_and_back(transfer, folder, tmp_path, contents):
    pushed = transfer.push(folder, "assets/it")
    assert (pushed.done, pushed.failed) == ({"upload": 8}, [])
    assert (pushed.files, pushed.bytes) == (8, sum(map(len, contents(folder).values())))
    pulled = transfer.pull("assets/it", tmp_path / "copy")
    assert (pulled.done, pulled.bytes) == ({"download": 8}, pushed.bytes)
    assert contents(tmp_path / "copy") == contents(folder)
    assert not transfer.verify("assets/it", folder).failed


@pytest.mark.parametrize("fresh_journal", [False, True])
def test_only_what_changed_travels(transfers, bucket, folder, tmp_path, make_file, contents, fresh_journal):
    transfers(bucket).push(folder)
    transfers(bucket).pull("", tmp_path / "copy")
    changed = make_file(folder / "a" / "one.bin", 1000, seed=1234)  # the size stays
    make_file(folder / "new", 10)
    transfer = transfers(bucket, state=tmp_path / ("other" if fresh_journal else "state"))
    pushed = transfer.push(folder)
    assert pushed.done == {"upload": 2, "skip": 7}
    assert bytes(bucket.get("a/one.bin")[1]) == changed
    pulled = transfer.pull("", tmp_path / "copy")
    assert pulled.done == {"download": 2, "skip": 7}
    assert contents(tmp_path / "copy") == contents(folder)


def test_a_dry_run_says_what_would_be_done_and_does_nothing(transfer, bucket, folder, tmp_path):
    planned = transfer.push(folder, dry_run=True)
    assert (planned.planned, planned.done) == ({"upload": 8}, {})
    assert [action.key for action in planned.actions][:3] == ["a-b/three.bin", "a.txt", "a/deep/two.bin"]
    assert list(bucket.list()) == []
    transfer.push(folder)
    assert transfer.pull("", tmp_path / "copy", dry_run=True).planned == {"download": 8}
    assert not (tmp_path / "copy").exists()


def test_deletion_only_when_asked_and_only_of_what_takes_part(transfer, bucket, folder, tmp_path, contents):
    transfer.push(folder)
    (folder / "z").unlink()
    (folder / "a.txt").unlink()
    assert "delete" not in transfer.push(folder).planned
    assert transfer.push(folder, delete=True, exclude=["*.txt"]).done == {"delete": 1, "skip": 6}
    assert "a.txt" in [info.key for info in bucket.list()]
    transfer.pull("", tmp_path / "copy")
    bucket.delete("a/deep/two.bin")
    assert "delete" not in transfer.pull("", tmp_path / "copy").planned
    assert transfer.pull("", tmp_path / "copy", delete=True).done["delete"] == 1
    assert not (tmp_path / "copy" / "a" / "deep").exists()
    assert "a.txt" in contents(tmp_path / "copy")


def test_patterns_choose(transfer, bucket, folder):
    def pushed(**patterns):
        return sorted(action.key for action in transfer.push(folder, dry_run=True, **patterns).actions)

    assert pushed(include=["*.txt", "z"]) == ["a.txt", "z"]
    assert pushed(include=["a/"]) == ["a/deep/two.bin", "a/one.bin"]
    assert pushed(include=["a/*"], exclude=["t?o.bin"]) == ["a/one.bin"]
    assert pushed(exclude=["*.bin"]) == ["a.txt", "empty", "z"]


def test_temporaries_locks_and_the_journal_stay_at_home(transfers, bucket, tmp_path, make_file):
    for name in ("file", ".tmp-x-1", "sub/.tmp-pull/data", "sub/.lock", ".hidden"):
        make_file(tmp_path / "folder" / name, 10)
    transfer = transfers(bucket, state=tmp_path / "folder" / "state")
    assert transfer.push(tmp_path / "folder").done == {"upload": 2}
    assert [info.key for info in bucket.list()] == [".hidden", "file"]


def test_links_are_followed_within_the_folder_only(transfer, bucket, folder, tmp_path, caplog):
    (tmp_path / "outside").write_text("secret")
    (folder / "inside").symlink_to(folder / "z")
    (folder / "leaves").symlink_to(tmp_path / "outside")
    (folder / "leads-nowhere").symlink_to(folder / "gone")
    (folder / "around").symlink_to(folder)
    assert transfer.push(folder).done == {"upload": 9}
    assert bytes(bucket.get("inside")[1]) == (folder / "z").read_bytes()
    assert [line for line in ("leaves", "leads-nowhere", "around") if line not in caplog.text] == []


def test_a_missing_folder_is_not_an_empty_one(transfer, tmp_path):
    with pytest.raises(InputError):
        transfer.push(tmp_path / "missing", delete=True)
    (tmp_path / "file").touch()
    with pytest.raises(InputError):
        transfer.pull("", tmp_path / "file")


def test_verify_names_what_differs(transfer, folder, make_file):
    transfer.push(folder, "p")
    status = (folder / "z").stat()
    data = bytearray((folder / "z").read_bytes())
    data[7] ^= 1
    (folder / "z").write_bytes(data)
    import os

    os.utime(folder / "z", ns=(status.st_atime_ns, status.st_mtime_ns))  # a digest from the journal would not show it
    (folder / "a.txt").unlink()
    make_file(folder / "extra", 5)
    make_file(folder / "empty", 5)
    report = transfer.verify("p", folder)
    assert sorted(key for key, _ in report.failed) == ["a.txt", "empty", "extra", "z"]
    assert report.done == {"verify": 5}


def test_a_folder_that_deletion_empties_can_be_filled_at_the_same_time(transfer, bucket, tmp_path, make_file, contents):
    for number in range(200):
        make_file(tmp_path / "out" / f"{number:03}" / "a", 10)
        bucket.put(f"{number:03}/b", b"new")
    make_file(tmp_path / "out" / "gone" / "deep" / "a", 10)
    report = transfer.pull("", tmp_path / "out", delete=True)
    assert (report.done, report.failed) == ({"delete": 201, "download": 200}, [])
    assert contents(tmp_path / "out") == {f"{number:03}/b": b"new" for number in range(200)}
    assert not (tmp_path / "out" / "gone").exists()
