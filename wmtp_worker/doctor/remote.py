"""Checks of what is elsewhere: the metadata service, somebody's clock, the bucket, the tracking server."""

import hashlib
import secrets
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path

from wmtp_worker.doctor.case import Case
from wmtp_worker.doctor.check import Check, failed
from wmtp_worker.errors import AccessDenied, IntegrityError, StorageError, WorkerError
from wmtp_worker.host.metadata import Unavailable
from wmtp_worker.host.notices import service_of
from wmtp_worker.storage.layout import PROBES
from wmtp_worker.storage.objects import ObjectStore

HTTP_SECONDS = 2.0
_PATIENCE = 3.0  # seconds: whoever asks wants to know how it is now
# bytes there and back to learn the speed: by one stream, and, where that makes more than _SLOW a second, by several
_SENT, _SENT_BY_PARTS, _SLOW = 4 << 20, 32 << 20, 4e6
_OWN_ADDRESS = {"s3": "https://s3.amazonaws.com", "gcs": "https://storage.googleapis.com", "azure": None, "local": None}
_HOP_LIMIT = (
    "a container is one hop further away than its machine: aws ec2 modify-instance-metadata-options --instance-id ID "
    "--http-put-response-hop-limit 2 (at the launch: --metadata-options HttpPutResponseHopLimit=2); else docker run "
    "--network host"
)

_SWITCHED_OFF = (
    "it refuses: aws ec2 modify-instance-metadata-options --instance-id ID --http-endpoint enabled, if this is EC2"
)


def metadata(case: Case, seconds: float = HTTP_SECONDS) -> Check | None:
    """The service that would tell us that the machine goes; nothing to say where there is none."""
    service = service_of(case.settings.host.notices, case.environ, case.root)
    if service is None:
        return None
    try:
        case.saw_clock(service.clock(seconds), f"the metadata service of {service.name}")
    except Unavailable as error:
        advice = "let this container reach it: docker run --network host"
        if service.name == "ec2":
            advice = _SWITCHED_OFF if error.answered else _HOP_LIMIT
        found = f"{service.name} does not answer, so its notices are not heard: {error}"
        return Check("metadata", "warn", found, advice)
    finally:
        service.close()
    return Check("metadata", "pass", f"{service.name} answers: its notices will be heard")


def ask_clock(case: Case) -> None:
    """Ask the bucket's server for its time, else the tracking server, unless somebody was asked before.

    Any answer has it in its head, a refusal too, so this works with wrong credentials and with a wrong clock.
    """
    cloud = case.settings.cloud
    address = (cloud.endpoint_url or _OWN_ADDRESS[cloud.provider]) if cloud.bucket else None
    for url in filter(None, (address, case.settings.tracking.uri)):
        scheme, _, rest = url.partition("://")
        server = rest.partition("/")[0]
        if case.skew is None and scheme in ("http", "https") and (theirs := date_of(f"{scheme}://{server}/")):
            case.saw_clock(theirs, server)


def date_of(url: str, seconds: float = HTTP_SECONDS) -> float | None:
    """The time of a web server, in seconds since the epoch, by the `Date` of whatever it answers; None: no answer."""
    try:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                date = answer.headers["Date"]
        except urllib.error.HTTPError as refusal:
            date = refusal.headers["Date"]
            refusal.close()
        return None if date is None else parsedate_to_datetime(date).timestamp()
    except (OSError, HTTPException, ValueError):
        return None


def bucket(case: Case) -> Check:
    """Everything that a run does with its bucket, once, on objects that are gone afterwards; and how fast it is."""
    cloud = case.settings.cloud
    if cloud.bucket is None:
        found = "none is set: work stays on this machine's disk"
        if case.host.name == "bare":
            return Check("bucket", "pass", found)
        return Check(
            "bucket", "warn", found, "set CLOUD_PROVIDER and CLOUD_BUCKET: rented machines go, and disks with them"
        )
    from wmtp_worker.storage.open import open_store

    try:
        store = open_store(cloud.model_copy(update={"patience": _PATIENCE}))
        try:
            return _try_out(case, store)
        finally:
            store.close()
    except AccessDenied as error:
        return failed("bucket", _with_clock(error, case))
    except WorkerError as error:
        return failed("bucket", error)


def _try_out(case: Case, store: ObjectStore) -> Check:
    from wmtp_worker.storage.conditional import check_conditional_put

    next(iter(store.list(PROBES)), None)
    _may_write(lambda: check_conditional_put(store, PROBES), store)
    up, down = _speed(store, _there_and_back)
    if up > _SLOW:  # a fast way shows its speed only to several streams
        up, down = _speed(store, lambda *ours: _by_parts(case, *ours))
    case.upload_rate = up
    speed = f"{up / 1e6:.0f} MB/s up, {down / 1e6:.0f} MB/s down"
    return Check("bucket", "pass", f"{store.url}: list, put, conditional put, get, delete; {speed}")


def _speed(store: ObjectStore, carry: Callable[[ObjectStore, str], tuple[float, float]]) -> tuple[float, float]:
    """Bytes per second there and back, of an object that is gone afterwards."""
    key = f"{PROBES}{secrets.token_hex(16)}"
    try:
        return carry(store, key)
    finally:
        _may_write(lambda: store.delete(key), store)


def _there_and_back(store: ObjectStore, key: str) -> tuple[float, float]:
    data = secrets.token_bytes(_SENT)
    began = time.monotonic()
    store.put(key, data)
    sent = time.monotonic()
    back = store.get(key)[1]
    got = time.monotonic()
    if hashlib.sha256(back).digest() != hashlib.sha256(data).digest():
        raise IntegrityError("what was written comes back as something else", where=store.url, fix="do not use it")
    return _SENT / (sent - began), _SENT / (got - sent)


def _by_parts(case: Case, store: ObjectStore, key: str) -> tuple[float, float]:
    """As a run does it: in parts, several at once, digests and all."""
    from wmtp_worker.storage.transfer import Transfer

    cloud = case.settings.cloud
    with tempfile.TemporaryDirectory(prefix="wmtp-doctor-") as name:
        folder = Path(name)
        (folder / "sent").write_bytes(secrets.token_bytes(_SENT_BY_PARTS))
        with Transfer(
            store,
            folder / "state",
            concurrency=cloud.concurrency,
            memory=cloud.memory << 20,
            bandwidth=cloud.bandwidth * 1e6,
        ) as transfer:
            began = time.monotonic()
            transfer.upload_file(folder / "sent", key)
            sent = time.monotonic()
            transfer.download_file(key, folder / "back")
            got = time.monotonic()
    return _SENT_BY_PARTS / (sent - began), _SENT_BY_PARTS / (got - sent)


def _may_write(work: Callable[[], object], store: ObjectStore) -> None:
    """Do it; a refusal says what is missing, for these credentials can read."""
    try:
        work()
    except AccessDenied as error:
        deletes = (error.where or "").startswith("delete")
        right = "delete objects (s3:DeleteObject)" if deletes else "write objects (s3:PutObject)"
        fix = f"give these credentials the right to {right} below {store.url}"
        raise AccessDenied(f"may be read, but: {error.what}", where=error.where, fix=fix) from error


def _with_clock(error: AccessDenied, case: Case) -> StorageError:
    if case.skew is None or abs(case.skew[0]) < 300:
        return error
    fix = f"set the clock first, it is {abs(case.skew[0]):.0f} s off; then: {error.fix}"
    return AccessDenied(error.what, where=error.where, fix=fix)


def tracking(case: Case) -> Check:
    """The MLflow server: an experiment, a run, a metric and an artifact, there and back."""
    uri = case.settings.tracking.uri
    if uri is None:
        return Check("tracking", "pass", "no MLflow server is set: the record stays with the run")
    from wmtp_worker.tracking.check import check
    from wmtp_worker.tracking.facts import experiment_name

    findings = list(check(uri, experiment_name(case.settings)))
    last = findings[-1]
    if last.state == "ok":
        seconds = sum(finding.seconds for finding in findings)
        return Check(
            "tracking", "pass", f"{findings[0].detail}; experiment, run, metric and artifact in {seconds:.1f} s"
        )
    found = f"{last.name}: {last.detail}"
    if last.state == "denied":
        return Check("tracking", "fail", found, "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
    return Check("tracking", "warn", found, "a run keeps its record and sends it later; wmtp tracking check says more")
