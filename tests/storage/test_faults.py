"""Every fault of a network, a server and a disk, against every provider: nothing torn or wrong ever becomes visible,
what can recover does, what cannot ends in the right error, and no thread, connection or temporary file is left."""

import gc
import hashlib
import os
import random
import resource
import threading
import time
from urllib.parse import urlsplit

import pytest
from tenacity import wait_random

from tests.servers.proxy import Proxy
from wmtp_worker.errors import (
    AccessDenied,
    BucketNotFound,
    DiskFullError,
    ExhaustedError,
    InputError,
    IntegrityError,
    Interrupted,
    PreconditionFailed,
    WorkerError,
)
from wmtp_worker.storage.retry import Patience, RetryingStore
from wmtp_worker.storage.transfer import Transfer, pool

PROVIDERS = ["s3", "gcs", "azure"]
# the smallest that each takes
PARTS = {"s3": 5 << 20, "gcs": 256 << 10, "azure": 256 << 10}
SMALL = 30_000
PATIENCE = 60
READ_SECONDS = 2.0


@pytest.fixture(params=PROVIDERS)
def server(request):
    """Each server that is reached through a network."""
    return request.getfixturevalue(f"{request.param}_server")


@pytest.fixture
def part(server):
    """The size of a part of a large file."""
    return PARTS[server.provider]


@pytest.fixture
def short_timeouts(request, monkeypatch):
    """A silent server is given up after two seconds, not after a minute; later where none is: busy ones are slow."""
    from wmtp_worker.storage import gcs, gcs_upload, http, s3_client

    seconds = READ_SECONDS if "a stalled" in request.node.name else 10 * READ_SECONDS
    monkeypatch.setattr(s3_client, "READ_SECONDS", seconds)
    for module in (http, gcs, gcs_upload):
        monkeypatch.setattr(module, "TIMEOUT", (seconds, seconds))
    monkeypatch.setattr(gcs, "_ONCE", {"retry": None, "timeout": (seconds, seconds)})


@pytest.fixture
def proxy(server):
    """The way to the server."""
    parts = urlsplit(server.endpoint)
    with Proxy(parts.hostname, parts.port) as proxy:
        yield proxy


@pytest.fixture
def direct(server, opened):
    """The bucket, without faults."""
    return opened(server)


@pytest.fixture
def transfer(server, part, opened, direct, proxy, short_timeouts, tmp_path):
    """To the same bucket through the proxy, with retries. Afterwards no thread and no file is left open."""
    gc.collect()
    files = open_files()
    prefix = direct.url.rpartition("/")[2]
    endpoint = f"{proxy.endpoint}{urlsplit(server.endpoint).path}"
    raw = opened(server, prefix=prefix, endpoint_url=endpoint)
    with Transfer(patient(raw), tmp_path / "state", part_size=part, concurrency=4) as made:
        yield made
    raw.close()
    proxy.heal()
    deadline = time.monotonic() + 60
    while (left := [*transfer_threads(), *(open_files() - files)]) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.1)
    assert not left


def patient(raw, seconds=PATIENCE):
    """With retries that do not wait long."""
    store = RetryingStore(raw, seconds)
    store._patience = Patience(seconds, wait=wait_random(0.01, 0.2))
    return store


def transfer_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("transfer")]


def open_files():
    """Regular files that are open now."""
    found = set()
    for name in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else ():
        try:
            path = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if path.startswith("/") and not path.startswith(("/dev", "/proc")):
            found.add(path)
    return found


@pytest.fixture
def source(request, tmp_path):
    """A large file and three small ones, and their content by key."""
    part = request.getfixturevalue("part") if "part" in request.fixturenames else PARTS["gcs"]
    files = {"large.bin": 2 * part + 12_345, "small-1.bin": SMALL, "small-2.bin": 0, "sub/small-3.bin": SMALL + 1}
    found = {}
    for seed, (key, size) in enumerate(files.items()):
        found[key] = random.Random(seed).randbytes(size)
        path = tmp_path / "source" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found[key])
    return found


@pytest.fixture
def filled(direct, part, source, tmp_path):
    """The bucket holds the source's files under `p`."""
    with Transfer(patient(direct, 60), tmp_path / "other-state", part_size=part) as transfer:
        assert transfer.push(tmp_path / "source", "p").failed == []
    return source


def stored(direct):
    """What readers of the bucket see."""
    return {info.key.removeprefix("p/"): bytes(direct.get(info.key)[1]) for info in direct.list("p/")}


def visible(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# name -> how to make it; each is to be survived
PASSING = {
    "latency": lambda proxy: slow(proxy),
    "a connection cut in the middle of what is sent": lambda proxy: proxy.cut(
        "up", 20_000, times=2, match="(PUT|POST)"
    ),
    "a connection reset in the middle of what is sent": lambda proxy: proxy.cut(
        "up", 20_000, reset=True, times=2, match="(PUT|POST)"
    ),
    "an answer cut short": lambda proxy: proxy.cut("down", 20_000, times=3, match="GET"),
    "an answer reset": lambda proxy: proxy.cut("down", 20_000, reset=True, times=3, match="GET"),
    "a busy server": lambda proxy: proxy.answer(503, times=5),
    "a failing server": lambda proxy: proxy.answer(500, times=5),
    "lost answers": lambda proxy: proxy.lose_response(times=3),
    "a stalled upload": lambda proxy: proxy.stall("up", 25_000, match="(PUT|POST)"),
    "a stalled download": lambda proxy: proxy.stall("down", 25_000, match="GET"),
    "bytes flipped on the way there": lambda proxy: proxy.flip("up", 25_000, match="(PUT|POST)"),
    "bytes flipped in a small answer": lambda proxy: proxy.flip("down", 25_000, match="GET .*small-1"),
    "bytes flipped in a large answer": lambda proxy: proxy.flip("down", 25_000, match="GET .*large"),
    "all at once": lambda proxy: (
        slow(proxy),
        proxy.answer(503, times=2),
        proxy.cut("up", 20_000),
        proxy.cut("down", 9),
    ),
}


def slow(proxy):
    proxy.latency_up = proxy.latency_down = 0.025


@pytest.mark.parametrize("fault", PASSING)
def test_passing_faults_are_survived(transfer, proxy, direct, source, tmp_path, fault):
    PASSING[fault](proxy)
    assert transfer.push(tmp_path / "source", "p").failed == []
    assert stored(direct) == source
    proxy.heal()
    PASSING[fault](proxy)
    assert transfer.pull("p", tmp_path / "out").failed == []
    assert visible(tmp_path / "out") == source


def refuse(proxy):
    proxy.refuse()


LASTING = {
    "refused connections": refuse,
    "a server that never answers well": lambda proxy: proxy.answer(503, times=10**6),
    "connections that always break": lambda proxy: (
        proxy.cut("up", 1, times=10**6, match="(PUT|POST)"),
        proxy.cut("down", 1, times=10**6),
    ),
}


@pytest.mark.parametrize("fault", LASTING)
def test_lasting_faults_are_an_error_and_the_next_attempt_goes_on(
    transfer, proxy, direct, filled, tmp_path, fault, monkeypatch
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "small-1.bin").write_bytes(b"old")
    before = stored(direct)
    (tmp_path / "source" / "small-1.bin").write_bytes(b"new")
    monkeypatch.setattr(transfer.store._patience, "_seconds", 1)
    LASTING[fault](proxy)
    with pytest.raises(ExhaustedError) as raised:
        transfer.push(tmp_path / "source", "p")
    assert transfer.store.url in str(raised.value)
    with pytest.raises(ExhaustedError):
        transfer.pull("p", tmp_path / "out")
    assert stored(direct) == before
    assert visible(tmp_path / "out") == {"small-1.bin": b"old"}
    proxy.accept()
    proxy.heal()
    monkeypatch.setattr(transfer.store._patience, "_seconds", PATIENCE)
    assert transfer.pull("p", tmp_path / "out").failed == []
    assert visible(tmp_path / "out") == filled


def test_a_name_that_nobody_knows_is_said_and_nothing_changes(server, opened, short_timeouts, source, tmp_path):
    raw = opened(server, endpoint_url="http://bucket.invalid:1", allow_http=True)
    with Transfer(patient(raw, 0), tmp_path / "state") as transfer:
        with pytest.raises(WorkerError) as raised:
            transfer.push(tmp_path / "source", "p")
        assert isinstance(raised.value, ExhaustedError | AccessDenied)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "kept").touch()
        with pytest.raises((ExhaustedError, AccessDenied)):
            transfer.pull("p", tmp_path / "out", delete=True)
    assert os.listdir(tmp_path / "out") == ["kept"]


S3_ERROR = "<Error><Code>{}</Code><Message>by the test</Message></Error>"
REFUSALS = {
    "expired credentials": {
        "s3": (400, S3_ERROR.format("ExpiredToken"), ""),
        "gcs": (401, '{"error": {"code": 401, "message": "Invalid Credentials"}}', ""),
        "azure": (401, S3_ERROR.format("InvalidAuthenticationInfo"), "x-ms-error-code: InvalidAuthenticationInfo\r\n"),
    },
    "a clock that is off": {
        "s3": (403, S3_ERROR.format("RequestTimeTooSkewed"), ""),
        "azure": (403, S3_ERROR.format("AuthenticationFailed"), "x-ms-error-code: AuthenticationFailed\r\n"),
    },
    "too few rights": {
        "s3": (403, S3_ERROR.format("AccessDenied"), ""),
        "gcs": (403, '{"error": {"code": 403, "message": "no", "errors": [{"reason": "forbidden"}]}}', ""),
        "azure": (403, S3_ERROR.format("AuthorizationFailure"), "x-ms-error-code: AuthorizationFailure\r\n"),
    },
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refusals_are_said_at_once_and_what_was_done_serves_the_next_attempt(
    transfer, proxy, server, direct, filled, tmp_path, refusal
):
    if server.provider not in REFUSALS[refusal]:
        pytest.skip("this provider's tokens do not depend on this machine's clock once they are issued")
    status, body, headers = REFUSALS[refusal][server.provider]
    proxy.answer(status, body=body, headers=headers, times=10**6, match="GET .*large")
    started = time.monotonic()
    with pytest.raises(AccessDenied) as raised:
        transfer.pull("p", tmp_path / "out", include=["large.bin"])
    assert raised.value.fix
    assert time.monotonic() - started < PATIENCE  # not tried again and again
    assert [key for key in visible(tmp_path / "out") if ".tmp-pull/" not in key] == []
    proxy.heal()
    assert transfer.pull("p", tmp_path / "out").failed == []
    assert visible(tmp_path / "out") == filled


def test_wrong_credentials_are_never_an_empty_bucket(server, opened, filled, tmp_path):
    raw = opened(server, environ=server.wrong_environ)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with Transfer(patient(raw), tmp_path / "state") as transfer, pytest.raises(AccessDenied):
        transfer.pull("", tmp_path / "out", delete=True)
    assert os.listdir(tmp_path / "out") == ["kept"]


MISSING = {
    "s3": (404, S3_ERROR.format("NoSuchBucket"), ""),
    "gcs": (404, '{"error": {"code": 404, "message": "The specified bucket does not exist."}}', ""),
    "azure": (404, S3_ERROR.format("ContainerNotFound"), "x-ms-error-code: ContainerNotFound\r\n"),
}


def test_a_bucket_that_disappears_is_not_an_empty_one(transfer, proxy, server, filled, tmp_path):
    status, body, headers = MISSING[server.provider]
    transfer.pull("p", tmp_path / "out")
    proxy.answer(status, body=body, headers=headers, times=10**6)
    for attempt in (
        lambda: transfer.pull("p", tmp_path / "out", delete=True),
        lambda: transfer.push(tmp_path / "source", "other"),
        lambda: transfer.download_file("p/large.bin", tmp_path / "copy"),
        lambda: transfer.upload_file(tmp_path / "source" / "small-1.bin", "other"),
    ):
        with pytest.raises(BucketNotFound):
            attempt()
    assert visible(tmp_path / "out") == filled
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("size", [SMALL, None], ids=["small then", "as large"])
def test_an_object_that_changes_during_a_download_is_taken_as_it_is_then(
    transfer, proxy, direct, filled, tmp_path, size
):
    new = random.Random(9).randbytes(size or len(filled["large.bin"]))
    listed = transfer.store.head("p/large.bin")
    proxy.call(lambda: direct.put("p/large.bin", new), match="GET .*large")
    transfer.download_file("p/large.bin", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == new
    assert transfer.store.head("p/large.bin").version != listed.version


def test_an_object_that_keeps_changing_is_an_error(transfer, proxy, direct, filled, part, tmp_path):
    seeds = iter(range(100, 200))

    def change():
        direct.put("p/large.bin", random.Random(next(seeds)).randbytes(2 * part))

    proxy.call(change, times=50, match="GET .*large")
    with pytest.raises(PreconditionFailed):
        transfer.download_file("p/large.bin", tmp_path / "out" / "copy")
    assert visible(tmp_path).keys() & {"out/copy"} == set()
    assert not (tmp_path / "out" / ".tmp-pull").exists()


@pytest.mark.parametrize("key", ["small-1.bin", "large.bin"])
def test_bytes_that_are_always_wrong_never_become_a_file(server, transfer, direct, filled, tmp_path, key):
    right = hashlib.sha256(filled[key]).hexdigest()
    direct.put(f"p/{key}", filled[key][:-1] + b"?", sha256=right)  # damaged after its digest was recorded
    report = transfer.pull("p", tmp_path / "out")
    assert [(name, type(error)) for name, error in report.failed] == [(key, IntegrityError)]
    assert visible(tmp_path / "out") == {name: data for name, data in filled.items() if name != key}


def test_a_full_disk_leaves_nothing_behind(transfer, filled, part, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    transfer.pull("p", tmp_path / "out", include=["small-*"])
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (part, limits[1]))
        with pytest.raises((DiskFullError, InputError)):
            transfer.pull("p", tmp_path / "out").raise_for_failures()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert visible(tmp_path / "out") == {key: data for key, data in filled.items() if key != "large.bin"}


def test_a_stop_during_a_stall_is_heeded_soon(transfer, proxy, filled, tmp_path, monkeypatch):
    asked = time.monotonic() + 0.5

    def check():
        if time.monotonic() > asked:
            raise Interrupted("stopped by a test")

    monkeypatch.setattr(transfer, "_check", check)
    monkeypatch.setattr(pool, "GRACE", 1.0)
    proxy.stall("down", 25_000, times=10, match="GET .*large")
    with pytest.raises(Interrupted):
        transfer.pull("p", tmp_path / "out")
    assert time.monotonic() - asked < 9 * READ_SECONDS  # less than what a silent server is given
    monkeypatch.setattr(transfer, "_check", lambda: None)
    proxy.heal()
    assert transfer.pull("p", tmp_path / "out").failed == []
    assert visible(tmp_path / "out") == filled


@pytest.mark.parametrize("fault", ["gone", "damaged"])
def test_an_upload_that_the_server_lost_is_begun_anew(gcs_process, gcs_server, opened, source, tmp_path, fault):
    with Proxy("127.0.0.1", gcs_process.port) as proxy:
        raw = opened(gcs_server, endpoint_url=proxy.endpoint)
        if fault == "gone":
            proxy.call(gcs_process.expire_sessions, match="^PUT .*upload")
        else:
            proxy.flip("up", 1000, match="^PUT .*upload")
        with Transfer(patient(raw), tmp_path / "state", part_size=PARTS["gcs"]) as transfer:
            transfer.upload_file(tmp_path / "source" / "large.bin", "key")
        assert proxy.pending == 0
        assert bytes(raw.get("key")[1]) == source["large.bin"]
        raw.close()
