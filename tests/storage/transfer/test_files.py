"""Single files: small and large, both ways, checked, made visible at once."""

import hashlib

import pytest

from wmtp_worker.errors import InputError, IntegrityError, ObjectNotFound

PART = 64 << 10


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 5 * PART + 17])
def test_a_file_goes_there_and_back(transfer, bucket, tmp_path, make_file, contents, size):
    data = make_file(tmp_path / "source.bin", size)
    digest = hashlib.sha256(data).hexdigest()

    info = transfer.upload_file(tmp_path / "source.bin", "some/key.bin")
    assert (info.size, info.sha256) == (size, digest)
    assert bytes(bucket.get("some/key.bin")[1]) == data

    found = transfer.download_file("some/key.bin", tmp_path / "out" / "copy.bin", sha256=digest)
    assert found.size == size
    assert contents(tmp_path / "out") == {"copy.bin": data}


@pytest.mark.parametrize("size", [100, 3 * PART])
def test_what_is_not_the_expected_content_never_appears(transfer, tmp_path, make_file, contents, size):
    make_file(tmp_path / "source.bin", size)
    transfer.upload_file(tmp_path / "source.bin", "key")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "copy").write_text("old")
    with pytest.raises(IntegrityError):
        transfer.download_file("key", tmp_path / "out" / "copy", sha256="0" * 64)
    assert contents(tmp_path / "out") == {"copy": b"old"}


@pytest.mark.parametrize("size", [100, 3 * PART])
def test_a_file_that_is_not_what_its_digest_says_is_not_uploaded(transfer, bucket, tmp_path, make_file, size):
    make_file(tmp_path / "source.bin", size)
    with pytest.raises(IntegrityError):
        transfer.upload_file(tmp_path / "source.bin", "key", sha256="0" * 64)
    assert list(bucket.list()) == []


@pytest.mark.parametrize("size", [100, 3 * PART])
def test_a_download_of_what_is_there_already_moves_nothing(transfers, bucket, tmp_path, make_file, size):
    data = make_file(tmp_path / "source.bin", size)
    transfers(bucket).upload_file(tmp_path / "source.bin", "key")
    (tmp_path / "copy").write_bytes(data)
    before = (tmp_path / "copy").stat()
    transfers(bucket).download_file("key", tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_ino == before.st_ino


def test_an_object_or_a_file_that_is_missing_is_said_to_be(transfer, tmp_path):
    with pytest.raises(ObjectNotFound):
        transfer.download_file("missing", tmp_path / "out" / "copy")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError):
        transfer.upload_file(tmp_path / "missing", "key")
    with pytest.raises(InputError):
        transfer.upload_file(tmp_path, "key")
