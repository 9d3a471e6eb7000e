"""What the journal remembers, and that nothing fails without it."""

import os
import sqlite3
import stat
import threading
import time
from dataclasses import replace

import pytest

from wmtp_worker.storage.transfer.journal import NAME, Journal, Stamp


@pytest.fixture
def journals(tmp_path):
    made = []

    def make(url="s3://bucket", folder=tmp_path / "state"):
        made.append(Journal(folder, url))
        made[-1].open()
        return made[-1]

    yield make
    for journal in made:
        journal.close()


LONG_AGO = time.time_ns() - 10**12
STAMP = Stamp(10, LONG_AGO, LONG_AGO, 7)


def test_digests_are_known_to_the_next_process_and_only_for_the_same_content(journals, tmp_path):
    first = journals()
    first.note_file(tmp_path / "a", STAMP, "d1")
    first.note_object("key", "v1", "d2")
    assert first.file_digest(tmp_path / "a", STAMP) == "d1"
    first.close()
    second = journals()
    assert second.file_digest(tmp_path / "a", STAMP) == "d1"
    for change in ({"size": 11}, {"mtime_ns": LONG_AGO + 1}, {"ctime_ns": LONG_AGO + 1}, {"inode": 8}):
        assert second.file_digest(tmp_path / "a", replace(STAMP, **change)) is None
    assert second.object_digest("key", "v1") == "d2"
    assert second.object_digest("key", "v2") is None
    assert journals("s3://other").object_digest("key", "v1") is None


def test_a_file_written_a_moment_ago_is_not_remembered(journals, tmp_path):
    # it could be written again within the same tick of the clock
    journal = journals()
    for age in (0, 10_000_000):
        for written in (LONG_AGO, time.time_ns() - age):  # its time of modification may be put back
            stamp = Stamp(10, written, time.time_ns() - age, 7)
            journal.note_file(tmp_path / "a", stamp, "d")
            assert journal.file_digest(tmp_path / "a", stamp) is None
    whole_second = Stamp(10, LONG_AGO, (time.time_ns() // 10**9 - 1) * 10**9, 7)
    journal.note_file(tmp_path / "a", whole_second, "d")
    assert journal.file_digest(tmp_path / "a", whole_second) is None


def test_unfinished_uploads_survive_a_kill(journals):
    journals().note_upload("key", "digest", {"id": "1"})  # neither flushed nor closed
    other = journals()
    assert other.upload("key", "digest") == {"id": "1"}
    assert other.upload("key", "of other content") is None
    other.forget_upload("key")
    assert journals().upload("key", "digest") is None


def test_tokens_are_private(journals, tmp_path):
    journals().note_upload("key", "digest", {"id": "1"})
    assert stat.S_IMODE(os.stat(tmp_path / "state").st_mode) == 0o700
    for path in (tmp_path / "state").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", [b"not a database at all" * 100, "version"])
def test_a_damaged_or_foreign_journal_is_made_anew(journals, tmp_path, caplog, damage):
    path = tmp_path / "state" / NAME
    path.parent.mkdir()
    if damage == "version":
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 99")
        database.close()
    else:
        path.write_bytes(damage)
    journal = journals()
    assert "anew" in caplog.text
    journal.note_object("key", "v", "d")
    journal.close()
    assert journals().object_digest("key", "v") == "d"


def test_a_journal_that_cannot_be_written_is_done_without(journals, tmp_path, caplog):
    (tmp_path / "state" / NAME).mkdir(parents=True)
    journal = journals()
    journal.note_object("key", "v", "d")
    journal.note_upload("key", "d", {})
    assert journal.upload("key", "d") is None
    journal.close()
    assert "without the journal" in caplog.text


def test_threads_and_processes_share_it(journals, tmp_path):
    shared = [journals(), journals()]

    def work(number):
        for item in range(300):
            shared[number % 2].note_object(f"{number}/{item}", "v", "d")
            shared[number % 2].note_upload(f"{number}", "d", {"item": str(item)})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for journal in shared:
        journal.flush()
    found = journals()
    assert [found.object_digest(f"{number}/299", "v") for number in range(4)] == ["d"] * 4
    assert found.upload("3", "d") == {"item": "299"}
