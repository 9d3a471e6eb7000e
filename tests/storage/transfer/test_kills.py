"""Killed at any moment: nothing torn is visible, and the next process sends or fetches only what is missing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.servers.proxy import Proxy
from wmtp_worker.errors import Interrupted
from wmtp_worker.storage.open import open_store
from wmtp_worker.storage.transfer.download import STAGING

PART = 256 << 10
SMALL_PART = 64 << 10  # what `transfers` makes unless told otherwise
SMALL, LARGE = 30_000, 40 * PART + 12_345


@pytest.fixture
def source(tmp_path, make_file):
    """Twelve small files, two large ones."""
    for number in range(12):
        make_file(tmp_path / "source" / f"small-{number:02}", SMALL, seed=number)
    make_file(tmp_path / "source" / "large", LARGE, seed=50)
    make_file(tmp_path / "source" / "sub" / "large", LARGE, seed=51)
    return tmp_path / "source"


@pytest.fixture
def child(tmp_path):
    """`child(what, folder, environ, bandwidth, kill_after, kill_at)`: the report, or None where it was killed before.

    After so many seconds, or by itself as soon as that many bytes are there.
    """

    def run(what, folder, environ, bandwidth=0, kill_after=None, kill_at=0):
        command = [
            sys.executable,
            str(Path(__file__).with_name("child.py")),
            what,
            str(folder),
            str(tmp_path / "state"),
        ]
        process = subprocess.Popen(
            [*command, str(bandwidth), str(PART), str(kill_at)],
            env={**os.environ, **environ},
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            try:
                if kill_after is not None and process.stdout.readline() == "started\n":
                    time.sleep(kill_after)
                    process.send_signal(signal.SIGKILL)
                lines = process.communicate(timeout=120)[0].splitlines()
            finally:
                process.kill()
        if process.returncode == -signal.SIGKILL:
            return None
        assert process.returncode == 0
        return json.loads(lines[-1])

    return run


def expected_at(folder: Path, source: Path, found: dict[str, bytes]) -> None:
    """Whatever is visible is whole."""
    for key, data in found.items():
        assert data == (source / key).read_bytes(), f"{key} is torn in {folder}"


def visible(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and ".tmp-" not in str(path.relative_to(folder))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


TOTAL = 12 * SMALL + 2 * LARGE


@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_push_goes_on(directory_server, source, child, seed):
    bucket = Path(directory_server.make_bucket())
    environ = directory_server.variables(str(bucket))
    moments = random.Random(seed)
    for _ in range(2):
        child("push", source, environ, bandwidth=TOTAL / 1.5, kill_after=moments.uniform(0, 0.7))
        expected_at(bucket, source, visible(bucket / "p"))
    done = child("push", source, environ)
    assert done["failed"] == 0
    assert visible(bucket / "p") == visible(source)
    assert child("push", source, environ)["done"] == {"skip": 14}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_pull_goes_on(directory_server, source, child, tmp_path, seed):
    bucket = Path(directory_server.make_bucket())
    environ = directory_server.variables(str(bucket))
    child("push", source, environ)
    moments = random.Random(seed)
    for _ in range(2):
        child("pull", tmp_path / "copy", environ, bandwidth=TOTAL / 1.5, kill_after=moments.uniform(0, 0.7))
        expected_at(tmp_path / "copy", source, visible(tmp_path / "copy"))
    child("pull", tmp_path / "copy", environ)
    assert visible(tmp_path / "copy") == visible(source)
    assert not (tmp_path / "copy" / STAGING).exists()


def test_a_pull_killed_at_half_fetches_only_the_rest(directory_server, source, child, tmp_path):
    bucket = Path(directory_server.make_bucket())
    environ = directory_server.variables(str(bucket))
    child("push", source, environ)
    assert child("pull", tmp_path / "copy", environ, bandwidth=TOTAL / 3, kill_at=TOTAL / 2) is None
    rest = child("pull", tmp_path / "copy", environ)
    assert 0.2 * TOTAL < rest["bytes"] < 0.8 * TOTAL


def test_two_processes_that_pull_into_one_folder_do_it_once(directory_server, source, child, tmp_path):
    bucket = Path(directory_server.make_bucket())
    environ = directory_server.variables(str(bucket))
    child("push", source, environ)
    reports = []

    def pull():
        reports.append(child("pull", tmp_path / "copy", environ, bandwidth=TOTAL))

    threads = [threading.Thread(target=pull) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert sorted(report["bytes"] for report in reports) == [0, TOTAL]
    assert visible(tmp_path / "copy") == visible(source)


@pytest.mark.parametrize("wiped", [False, True], ids=["the same machine", "another machine"])
def test_a_push_to_s3_killed_at_half_sends_only_the_rest(s3_server, child, tmp_path, make_file, use_environ, wiped):
    size = 12 * (5 << 20)  # S3's smallest parts
    data = make_file(tmp_path / "source" / "large", size)
    bucket = s3_server.make_bucket()
    parts = urlsplit(s3_server.endpoint)
    with Proxy(parts.hostname, parts.port) as proxy:
        environ = s3_server.variables(bucket, endpoint_url=proxy.endpoint)
        assert child("push", tmp_path / "source", environ, bandwidth=size / 6, kill_at=size / 4) is None
        sent = proxy.bytes_up
        assert 0.2 * size < sent < 0.9 * size
        if wiped:
            shutil.rmtree(tmp_path / "state")
        report = child("push", tmp_path / "source", environ)
        again = proxy.bytes_up - sent
    assert (report["done"], report["bytes"] < 0.85 * size) == ({"upload": 1}, True)
    assert again < 0.85 * size
    use_environ(s3_server.environ)
    store = open_store(s3_server.cloud(bucket))
    assert bytes(store.get("p/large")[1]) == data
    store.close()


def stop_after(calls):
    """A check that asks to stop when it was called so often."""
    left = [calls]

    def check():
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted("stopped by a test")

    return check


@pytest.mark.parametrize("way", ["push", "pull"])
def test_an_interrupted_transfer_goes_on_in_the_same_place(transfers, bucket, source, tmp_path, way):
    transfers(bucket).push(source, "p") if way == "pull" else None

    def run(**settings):
        transfer = transfers(bucket, part_size=PART, **settings)
        return transfer.push(source, "p") if way == "push" else transfer.pull("p", tmp_path / "copy")

    started = time.monotonic()
    with pytest.raises(Interrupted):
        run(check=stop_after(5), bandwidth=TOTAL / 60)
    assert time.monotonic() - started < 30
    assert run().failed == []
    found = {info.key.removeprefix("p/") for info in bucket.list()} if way == "push" else visible(tmp_path / "copy")
    assert set(found) == set(visible(source))


def test_an_interrupted_download_keeps_its_parts_for_the_next(
    transfers, bucket, tmp_path, make_file, interrupted_download
):
    copy = tmp_path / "out" / "copy"
    data = make_file(tmp_path / "file", 20 * SMALL_PART)
    transfers(bucket).upload_file(tmp_path / "file", "key")
    interrupted_download(bucket, "key", copy, parts=8)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / STAGING]
    read = []
    get = bucket.get
    bucket.get = lambda key, start=0, *rest: (read.append(start), get(key, start, *rest))[1]
    transfers(bucket).download_file("key", copy)
    assert sorted(read) == [number * SMALL_PART for number in range(8, 20)]
    assert copy.read_bytes() == data
    assert list((tmp_path / "out").iterdir()) == [copy]


def test_many_threads_download_into_one_folder(transfer, bucket, tmp_path):
    # each takes its lock in a hidden folder that the last one removes
    errors = []

    def download(number):
        try:
            for turn in range(40):
                transfer.download_file(f"{number}", tmp_path / "out" / f"{number}-{turn}")
        except Exception as error:
            errors.append(error)

    for number in range(6):
        bucket.put(str(number), b"x" * number)
    threads = [threading.Thread(target=download, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert len(list((tmp_path / "out").iterdir())) == 240
