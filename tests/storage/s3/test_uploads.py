"""Unfinished uploads, as S3 lists them: which are taken up, and which are somebody else's."""

import time
from datetime import timedelta

import pytest

from tests.storage.s3.conftest import PART, REFUSED, digest, send
from wmtp_worker.errors import IntegrityError


class Test_unfinished_uploads:
    def names(self, store) -> list[str]:
        return [upload["Key"].removeprefix(store.full_key("")) for upload in store.unfinished("")]

    def test_they_are_listed_and_swept(self, s3_server, opened, source):
        store = opened(s3_server)
        for key in ("a/one", "a/two", "b/three"):
            store.begin(key, source.stat().st_size, digest(source), PART, None)
        assert sorted(self.names(store)) == ["a/one", "a/two", "b/three"]
        assert store.sweep("", timedelta(hours=1)) == 0
        time.sleep(1.1)
        assert store.sweep("a/", timedelta(0)) == 2
        assert self.names(store) == ["b/three"]
        assert store.sweep("", timedelta(0)) == 1
        assert self.names(store) == []

    def test_one_of_a_file_whose_end_has_changed_is_left_alone(self, s3_server, opened, source):
        store = opened(s3_server)
        old_size = source.stat().st_size
        old = store.begin("large", old_size, digest(source), PART, None)
        first = source.read_bytes()[: old.part_size]
        old.put(0, first)
        source.write_bytes(source.read_bytes() + b"another end")
        new = store.begin("large", source.stat().st_size, digest(source), PART, None)
        assert new.token["upload"] != old.token["upload"]
        old.put(1, bytes(old_size - old.part_size))
        send(new, source)
        assert new.finish().sha256 == digest(source)
        assert store.head("large").sha256 == digest(source)
        assert bytes(store.get("large")[1]) == source.read_bytes()

    @pytest.mark.parametrize("checksum", [{}, {"ChecksumAlgorithm": "SHA256"}, {"ChecksumAlgorithm": "CRC32C"}])
    def test_one_of_another_tool_is_left_alone(self, s3_server, opened, source, checksum):
        store, data = opened(s3_server), source.read_bytes()
        names = {"Bucket": store.bucket, "Key": store.full_key("large")}
        theirs = store.control.create_multipart_upload(**names, **checksum)["UploadId"]
        etags = []
        for number, body in enumerate((data[:PART], data[PART:]), start=1):
            said = store.control.upload_part(**names, UploadId=theirs, PartNumber=number, Body=body)
            etags.append(said["ETag"])
        upload = store.begin("large", len(data), digest(source), PART, None)
        assert upload.token["upload"] != theirs
        send(upload, source)
        upload.abort()
        # theirs is as it was
        there = store.control.list_parts(**names, UploadId=theirs)["Parts"]
        assert [part["ETag"] for part in there] == etags
        store.control.abort_multipart_upload(**names, UploadId=theirs)

    def test_one_begun_for_other_checksums_is_neither_taken_up_nor_swept(self, proxied, source):
        store, proxy = proxied()
        listed = (
            "<?xml version='1.0'?><ListMultipartUploadsResult><IsTruncated>false</IsTruncated><Upload>"
            f"<Key>{store.full_key('large')}</Key><UploadId>theirs</UploadId><Initiated>2020-01-01T00:00:00.000Z"
            "</Initiated>{}</Upload></ListMultipartUploadsResult>"
        )
        for kinds in (
            "<ChecksumAlgorithm>CRC64NVME</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>",
            "<ChecksumAlgorithm>CRC32C</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>",
            "<ChecksumAlgorithm>SHA256</ChecksumAlgorithm><ChecksumType>COMPOSITE</ChecksumType>",
        ):
            proxy.answer(200, body=listed.format(kinds), match="^GET", times=2)
            proxy.heads.clear()
            upload = store.begin("large", source.stat().st_size, digest(source), PART, None)
            assert store.sweep("", timedelta(0)) == 0
            assert proxy.pending == 0
            assert not [head for head in proxy.heads if "theirs" in head]
            upload.abort()

    def test_parts_that_somebody_else_has_replaced(self, proxied, source):
        store, proxy = proxied()
        upload = store.begin("large", source.stat().st_size, digest(source), PART, None)
        send(upload, source)
        # SeaweedFS does not look
        proxy.answer(400, body=REFUSED.format("InvalidPart", "not found, or another ETag"), match="^POST")
        with pytest.raises(IntegrityError, match="somebody else's parts"):
            upload.finish()
        assert list(store.list()) == []
        upload.abort()

    def test_one_of_a_longer_key_is_not_ours(self, s3_server, opened, source):
        store = opened(s3_server)
        other = store.begin("large-other", source.stat().st_size, digest(source), PART, None)
        other.put(0, source.read_bytes()[: other.part_size])
        assert (
            store.begin("large", source.stat().st_size, digest(source), PART, None).token["upload"]
            != other.token["upload"]
        )

    def test_two_workers_that_send_the_same_file_both_succeed(self, s3_server, opened, source):
        store = opened(s3_server)
        data = source.read_bytes()
        first = store.begin("large", source.stat().st_size, digest(source), PART, None)
        size = first.part_size
        first.put(0, data[:size])
        second = store.begin("large", source.stat().st_size, digest(source), PART, None)
        assert second.token["upload"] == first.token["upload"]
        assert second.has(0, data[:size])
        first.put(1, data[size:])
        assert first.finish().sha256 == digest(source)
        second.put(1, data[size:])
        assert second.finish().sha256 == digest(source)

    def test_who_may_not_list_them_begins_anew(self, proxied, source):
        store, proxy = proxied()
        upload = store.begin("large", source.stat().st_size, digest(source), PART, None)
        upload.put(0, source.read_bytes()[: upload.part_size])
        for token in (None, upload.token):
            body = "<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>no</Message></Error>"
            proxy.answer(403, body=body, match="^GET", times=1 + (token is not None))
            other = store.begin("large", source.stat().st_size, digest(source), PART, token)
            assert proxy.pending == 0
            assert other.token["upload"] != upload.token["upload"]
            other.abort()

    def test_parts_are_large_enough_for_the_limits(self, s3_server, opened, tmp_path):
        huge = tmp_path / "huge"
        with huge.open("wb") as file:
            file.truncate(200 << 30)
        store = opened(s3_server)
        upload = store.begin("huge", huge.stat().st_size, "00", 1, None)
        assert upload.part_size * 10_000 >= huge.stat().st_size
        upload.abort()
        small = store.begin("small", huge.stat().st_size, "00", 64 << 20, None)
        assert 64 << 20 < small.part_size <= 65 << 20
        small.abort()
