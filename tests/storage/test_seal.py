"""Reading sealed folders: what whoever reads may decide."""

import pytest

from wmtp_worker.errors import IntegrityError, Interrupted
from wmtp_worker.storage.seal import check_each, file_entry


def test_reading_a_file_can_be_stopped(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(5 << 20))
    heard = []

    def heed(size):
        heard.append(size)
        if len(heard) == 3:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        file_entry(path, heed)
    heard[:] = [0, 0, 0]
    assert file_entry(path, heed) == file_entry(path)
    assert sum(heard) == file_entry(path).size == 5 << 20


def test_files_may_be_read_in_another_way(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    read = []

    def entry_of(path):
        read.append(path.name)
        return file_entry(path)

    check_each([(tmp_path, "file", file_entry(tmp_path / "file"))], entry_of)
    assert read == ["file"]
    other = file_entry(tmp_path / "file").model_copy(update={"sha256": "0" * 64})
    with pytest.raises(IntegrityError, match="SHA-256 differs"):
        check_each([(tmp_path, "file", other)], entry_of)
