"""What S3 answers: listings, checksums it does not know, faults of the way."""

import time

import pytest

from tests.storage.s3.conftest import PART, REFUSED, digest, send
from wmtp_worker.errors import (
    BucketNotFound,
    InputError,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    TransientError,
)
from wmtp_worker.storage import s3_client
from wmtp_worker.storage.s3_listing import read_contents


class Test_listings:
    PAGE = (
        "<?xml version='1.0' encoding='UTF-8'?><ListBucketResult{}><EncodingType>url</EncodingType>"
        "<IsTruncated>false</IsTruncated>{}</ListBucketResult>"
    )
    ONE = (
        "<Contents><Key>{}</Key><LastModified>2026-01-02T03:04:05.678Z</LastModified><ETag>{}</ETag><Size>{}</Size>"
        "<Owner><ID>x</ID></Owner><StorageClass>STANDARD</StorageClass></Contents>"
    )

    @pytest.mark.parametrize("namespace", ["", " xmlns='http://s3.amazonaws.com/doc/2006-03-01/'"])
    def test_are_read_as_boto3_reads_them(self, proxied, namespace):
        store, proxy = proxied()
        prefix = store.full_key("")
        names = ["a%2Bb%26c", "d&amp;e&#38;f", "g h", "%C3%BC%0A"]
        ones = "".join(self.ONE.format(prefix + name, "&quot;abc-2&quot;", 1 << 40) for name in names)
        listed = []
        for _ in range(2):
            proxy.answer(200, body=self.PAGE.format(namespace, ones), match="^GET")
            listed.append(list(store.list()))
            # the second time by boto3 alone
            store.control.meta.events.unregister("before-parse.s3.ListObjectsV2", read_contents)
        assert [info.key for info in listed[0]] == ["a+b&c", "d&e&f", "g h", "ü\n"]
        assert listed[0] == listed[1]
        assert {(info.size, info.version) for info in listed[0]} == {(1 << 40, "abc-2")}
        assert listed[0][0].modified.isoformat() == "2026-01-02T03:04:05.678000+00:00"

    @pytest.mark.parametrize("size", ["many", ""])
    def test_what_is_no_listing_is_an_error(self, proxied, size):
        store, proxy = proxied()
        whole = self.PAGE.format("", self.ONE.format(store.full_key("a"), "e", 1))
        bodies = (whole[:-30], "<html>", self.PAGE.format("", self.ONE.format(store.full_key("a"), "e", size)))
        for body in bodies:
            proxy.answer(200, body=body, match="^GET")
            with pytest.raises(TransientError, match=r"it is no listing|says 500"):
                list(store.list())
            assert proxy.pending == 0


class Test_checksums:
    @pytest.mark.parametrize(
        ("status", "code", "message"),
        [
            (501, "NotImplemented", "A header you provided implies functionality that is not implemented"),
            (400, "InvalidArgument", "Unsupported header 'x-amz-checksum-sha256' received for this API call."),
        ],
    )
    def test_auto_takes_md5_where_a_server_refuses_better_ones(self, proxied, source, status, code, message):
        for write in (
            lambda store: store.put("key", b"x"),
            lambda store: store.put("other", b"x", if_absent=True),
            lambda store: send(store.begin("large", source.stat().st_size, digest(source), PART, None), source),
        ):
            store, proxy = proxied(checksum="auto")
            proxy.answer(status, body=REFUSED.format(code, message), match="^P")
            write(store)
            assert proxy.pending == 0
            assert store.md5
            proxy.heads.clear()
            store.put("again", b"x")
            assert "content-md5:" in proxy.heads[-1].lower()
            assert "x-amz-checksum" not in proxy.heads[-1].lower()

    def test_sha256_is_not_given_up_when_it_is_asked_for(self, proxied):
        store, proxy = proxied(checksum="sha256")
        proxy.answer(501, body=REFUSED.format("NotImplemented", "no such header"))
        with pytest.raises(StorageError, match=r"cloud\.checksum"):
            store.put("key", b"x")
        assert not store.md5

    @pytest.mark.parametrize("checksum", ["auto", "md5"])
    def test_bytes_changed_on_the_way_up_are_noticed(self, proxied, source, checksum):
        store, proxy = proxied(checksum=checksum)
        upload = store.begin("large", source.stat().st_size, digest(source), PART, None)
        for call in (
            lambda: store.put("small", b"x" * 1000),
            lambda: store.put("conditional", b"x" * 1000, if_absent=True),
            lambda: upload.put(0, source.read_bytes()[: upload.part_size]),
        ):
            proxy.flip("up", 100)
            with pytest.raises(TransientError):
                call()
            assert proxy.pending == 0
        assert list(store.list()) == []

    def test_a_whole_upload_with_md5(self, proxied, source):
        store, _ = proxied(checksum="md5")
        upload = store.begin("large", source.stat().st_size, digest(source), PART, None)
        upload.put(0, source.read_bytes()[: upload.part_size])
        upload.put(1, source.read_bytes()[upload.part_size :])
        assert upload.finish().sha256 == digest(source)
        assert bytes(store.get("large")[1]) == source.read_bytes()

    def test_an_upload_that_was_begun_with_md5_is_finished(self, proxied, source):
        store, proxy = proxied(checksum="md5")
        upload = store.begin("large", source.stat().st_size, digest(source), PART, None)
        upload.put(0, source.read_bytes()[: upload.part_size])
        upload.put(1, source.read_bytes()[upload.part_size :])
        other, _ = proxied(prefix=store.url.rpartition("/")[2])
        upload = other.begin("large", source.stat().st_size, digest(source), PART, None)
        assert upload.has(0, source.read_bytes()[: upload.part_size])
        assert upload.has(1, source.read_bytes()[upload.part_size :])
        proxy.answer(400, body=REFUSED.format("InvalidRequest", "no checksum was asked for"), match="^POST")
        assert upload.finish().sha256 == digest(source)
        assert proxy.pending == 0


class Test_faults_of_the_way:
    @pytest.mark.parametrize("fault", ["cut", "reset", "busy", "failing", "lost"])
    def test_are_transient(self, proxied, source, fault):
        store, proxy = proxied()
        data = source.read_bytes()
        store.put("key", data[: 1 << 18])
        upload = store.begin("large", source.stat().st_size, digest(source), PART, None)
        make = {
            "cut": lambda method: proxy.cut("up" if method == "PUT" else "down", 1000, match=method),
            "reset": lambda method: proxy.cut("up" if method == "PUT" else "down", 1000, reset=True, match=method),
            "busy": lambda method: proxy.answer(503, match=method),
            "failing": lambda method: proxy.answer(500, match=method),
            "lost": lambda method: proxy.lose_response(match=method),
        }[fault]
        for method, call in (
            ("GET", lambda: store.get("key")),
            ("PUT", lambda: store.put("key", data[: 1 << 18])),
            ("PUT", lambda: store.put("other", data[: 1 << 18], if_absent=True)),
            ("PUT", lambda: upload.put(0, data[:PART])),
        ):
            make(method)
            with pytest.raises(TransientError):
                call()
            assert proxy.pending == 0
        assert bytes(store.get("key")[1]) == data[: 1 << 18]

    def test_a_stalled_connection_is_given_up(self, proxied, monkeypatch):
        first, _ = proxied()
        first.put("key", b"x" * 100_000)
        monkeypatch.setattr(s3_client, "READ_SECONDS", 2.0)
        store, proxy = proxied(prefix=first.url.rpartition("/")[2])
        for direction, match, call in (
            ("down", "^GET", lambda: store.get("key")),
            ("up", "^PUT", lambda: store.put("key", b"y" * 100_000)),
            ("up", "^PUT", lambda: store.put("other", b"y" * 100_000, if_absent=True)),
        ):
            proxy.stall(direction, 1000, match=match)
            began = time.monotonic()
            with pytest.raises(TransientError):
                call()
            assert time.monotonic() - began < 40
            assert proxy.pending == 0

    def test_a_bucket_that_disappears(self, s3_server, opened, seaweed):
        bucket = s3_server.make_bucket()
        store = opened(s3_server, bucket)
        store.put("key", b"x")
        client = seaweed.client()
        client.delete_object(Bucket=bucket, Key="key")
        client.delete_bucket(Bucket=bucket)
        client.close()
        for call in (
            lambda: store.head("key"),
            lambda: store.get("key"),
            lambda: store.put("key", b"x"),
            lambda: list(store.list()),
        ):
            with pytest.raises(BucketNotFound, match=bucket):
                call()

    def test_a_server_that_lists_in_no_order(self, proxied):
        store, proxy = proxied()
        store.control  # noqa: B018
        facts = "<Size>1</Size><ETag>x</ETag><LastModified>2026-01-01T00:00:00Z</LastModified>"
        entry = f"<Contents><Key>{{}}</Key>{facts}</Contents>"
        entries = "".join(entry.format(store.full_key(key)) for key in ("b", "a"))
        proxy.answer(200, body=f"<?xml version='1.0'?><ListBucketResult>{entries}</ListBucketResult>")
        with pytest.raises(StorageError, match="no order"):
            list(store.list())


def test_odd_ends(s3_server, opened):
    store = opened(s3_server)
    with pytest.raises(InputError):
        store.put("x" * 1025, b"x")
    version = store.put("key", b"x").version
    store.delete("key")
    with pytest.raises(PreconditionFailed):
        store.put("key", b"y", if_version=version)
    with pytest.raises(ObjectNotFound, match="from copy s3://"):
        store.copy("key", "other")
