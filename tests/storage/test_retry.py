"""Trying again: what, how long, and what is known of writes whose answers were lost."""

import hashlib
import time
from contextlib import contextmanager

import pytest
from tenacity import wait_fixed, wait_none

from tests.servers.proxy import Proxy
from wmtp_worker.errors import (
    AccessDenied,
    ExhaustedError,
    Interrupted,
    ObjectNotFound,
    PreconditionFailed,
    TransientError,
)
from wmtp_worker.storage.retry import Patience, RetryingStore

PART = 5 << 20
WAIT = wait_fixed(0.02)


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


class Flaky:
    """Fails as told, then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def trouble(count: int) -> list[Exception]:
    return [TransientError(f"trouble {number}", where="get s3://bucket/key") for number in range(count)]


class Test_patience:
    def test_transient_trouble_passes(self):
        clock, flaky = Clock(), Flaky(*trouble(5))
        assert Patience(60, sleep=clock.sleep, clock=clock).call(flaky) == "done"
        assert flaky.calls == 6
        assert clock.now > 0

    @pytest.mark.parametrize("error", [ObjectNotFound("x"), AccessDenied("x"), PreconditionFailed("x"), ValueError()])
    def test_anything_else_is_told_at_once(self, error):
        flaky = Flaky(error)
        with pytest.raises(type(error)):
            Patience(60).call(flaky)
        assert flaky.calls == 1
        flaky = Flaky(*trouble(1), error)
        with pytest.raises(type(error)):
            Patience(60, wait=wait_none()).call(flaky)
        assert flaky.calls == 2

    def test_it_ends_after_so_many_seconds(self):
        clock, flaky = Clock(), Flaky(*trouble(1000))
        with pytest.raises(ExhaustedError) as caught:
            Patience(60, sleep=clock.sleep, clock=clock, wait=wait_fixed(7)).call(flaky)
        assert 60 <= clock.now <= 67
        assert flaky.calls == 10
        assert caught.value.what == "trouble 9 (tried 10 times in 63 s)"
        assert caught.value.where == "get s3://bucket/key"
        assert "cloud.patience" in caught.value.fix

    def test_it_tries_three_times_at_least(self):
        flaky = Flaky(*trouble(1000))
        with pytest.raises(ExhaustedError, match="tried 3 times"):
            Patience(0, wait=wait_none()).call(flaky)
        assert flaky.calls == 3

    def test_waits_grow_and_differ(self):
        waits: list[float] = []
        for _ in range(20):
            clock, flaky = Clock(), Flaky(*trouble(4))
            Patience(60, sleep=clock.sleep, clock=clock).call(flaky)
            assert clock.now <= 0.5 + 1 + 2 + 4
            waits.append(clock.now)
        assert len(set(waits)) == 20

    def test_a_stop_is_heeded_while_waiting(self):
        clock, flaky = Clock(), Flaky(*trouble(1000))

        def check() -> None:
            if clock.now >= 3:
                raise Interrupted("stopped by SIGTERM")

        with pytest.raises(Interrupted):
            Patience(600, check, sleep=clock.sleep, clock=clock, wait=wait_fixed(100)).call(flaky)
        assert clock.now < 3.5
        assert flaky.calls == 1


@pytest.fixture
def proxied(s3_server, opened):
    """A store that tries again, its server behind a proxy, and the same place without either."""
    host, _, port = s3_server.endpoint.removeprefix("http://").partition(":")
    with Proxy(host, int(port)) as proxy:
        prefix = f"retry-{time.monotonic_ns()}"
        direct = opened(s3_server, prefix=prefix)
        store = RetryingStore(opened(s3_server, prefix=prefix, endpoint_url=proxy.endpoint), patience=30, wait=WAIT)
        yield store, proxy, direct


@contextmanager
def used(proxy: Proxy):
    """Every fault asked for took effect."""
    yield
    assert proxy.pending == 0
    proxy.heal()


class Test_on_a_server:
    def test_every_call_survives_a_busy_server(self, proxied, tmp_path):
        store, proxy, _ = proxied
        source = tmp_path / "source"
        source.write_bytes(b"x" * 1000)
        calls = (
            lambda: store.put("key", b"content"),
            lambda: store.head("key"),
            lambda: store.get("key"),
            lambda: list(store.list()),
            lambda: store.copy("key", "copy"),
            lambda: store.delete("copy"),
            lambda: store.begin("large", source.stat().st_size, "00", PART, None).abort(),
        )
        for call in calls:
            proxy.answer(503, times=2)
            with used(proxy):
                call()
        assert [info.key for info in store.list()] == ["key"]

    @pytest.mark.parametrize("condition", ["if_absent", "if_version"])
    def test_a_lost_answer_to_a_conditional_put(self, proxied, condition):
        store, proxy, direct = proxied
        chosen = {"if_absent": True}
        if condition == "if_version":
            chosen = {"if_version": direct.put("key", b"before").version}
        proxy.lose_response(match="^PUT")
        with used(proxy):
            info = store.put("key", b"ours", **chosen)
        assert info.version == direct.head("key").version
        assert bytes(direct.get("key")[1]) == b"ours"
        with pytest.raises(PreconditionFailed):
            store.put("key", b"ours", **chosen)

    def test_a_lost_request_after_which_another_writer_was_first(self, proxied):
        store, proxy, direct = proxied
        proxy.call(lambda: direct.put("key", b"theirs"), match="^PUT")
        proxy.answer(500, match="^PUT")
        with used(proxy), pytest.raises(PreconditionFailed):
            store.put("key", b"ours!!", if_absent=True)
        assert bytes(direct.get("key")[1]) == b"theirs"

    def test_a_lost_answer_to_finish(self, proxied, tmp_path):
        store, proxy, direct = proxied
        source = tmp_path / "source"
        source.write_bytes(b"x" * (PART + 1))
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        upload = store.begin("large", source.stat().st_size, digest, PART, None)
        proxy.cut("up", 1 << 20, match="partNumber=1")
        upload.put(0, source.read_bytes()[:PART])
        upload.put(1, source.read_bytes()[PART:])
        proxy.lose_response(match="^POST")
        with used(proxy):
            assert upload.finish().sha256 == digest
        assert direct.head("large").size == PART + 1

    def test_a_listing_goes_on_behind_the_last_key(self, proxied):
        store, proxy, direct = proxied
        for number in range(30):
            direct.put(f"folder-{number % 3}/{number:02}", b"x")
        expected = [info.key for info in direct.list()]
        listing = store.list()
        found = [next(listing).key for _ in range(15)]
        proxy.answer(503, times=2)
        proxy.cut("down", 10)
        with used(proxy):
            found += [info.key for info in listing]
        assert found == expected

    def test_a_download_that_is_cut_comes_whole(self, proxied):
        store, proxy, direct = proxied
        data = bytes(range(256)) * 2000
        direct.put("key", data)
        proxy.cut("down", 1000, reset=True, match="^GET")
        proxy.cut("down", 400_000, match="^GET")
        with used(proxy):
            assert bytes(store.get("key")[1]) == data

    def test_a_server_that_stays_away(self, proxied):
        store, proxy, _ = proxied
        impatient = RetryingStore(store.store, patience=0, wait=WAIT)
        proxy.refuse()
        for call in (lambda: impatient.get("key"), lambda: impatient.head("key"), lambda: list(impatient.list())):
            with pytest.raises(ExhaustedError, match=r"tried 3 times.*s3://") as caught:
                call()
            assert caught.value.fix
