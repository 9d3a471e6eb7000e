"""Copy a folder (models, data sets) to VESSL's storage, compare every digest, and tell MLflow how it went.

    python scripts/sync_to_vessl_storage.py work/models s3://wmtp/models --dry-run
    python scripts/sync_to_vessl_storage.py work/datasets /volumes/datasets            a mounted volume
    python scripts/sync_to_vessl_storage.py work/models s3://wmtp/models --run-id ID   tags a run that is there

The target is a bucket's URL (s3, gs, az) or a mounted folder; only what differs is sent. With MLFLOW_TRACKING_URI the
copy is a run of the experiment <prefix>/storage_sync, with what was sent as metrics: tagged storage_sync=True when all
of it is there and has the same SHA-256, FAILED otherwise. Exit codes are those of wmtp; a dry run sends and tells
nothing.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from wmtp_worker.errors import NotSafeError, WorkerError
from wmtp_worker.host.stop import STOP
from wmtp_worker.redact import redact
from wmtp_worker.settings import Settings, load
from wmtp_worker.storage.sync import check_sides, check_slashes, folder_to_push, open_transfer
from wmtp_worker.storage.transfer import Report
from wmtp_worker.tracking.server import find_experiment, make_client

TAG = "storage_sync"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("target", metavar="URL|FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent")
    parser.add_argument("--run-id", metavar="ID", help="a run of MLflow to tag, instead of one of its own")
    asked = parser.parse_args()
    STOP.install()
    try:
        settings = load(options={"run.resume": "auto"}, needs_bucket=False)
        with told(settings, asked) as numbers:
            numbers |= copy(settings, asked.folder, asked.target, asked.dry_run)
    except WorkerError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return error.exit_code
    return 0


def copy(settings: Settings, folder: str, target: str, dry_run: bool) -> dict[str, float]:
    """Send what differs and compare the digests; what was done, as numbers. Raises where anything is not there."""
    check_sides(folder, target, "push")
    check_slashes(target)
    source = folder_to_push(folder)
    with open_transfer(target, settings, STOP.check) as transfer:
        report: Report = transfer.push(source, "", dry_run=dry_run)
        for action in report.actions:
            print(redact(f"{action.kind:8}  {action.size:>15,}  {action.key}"))
        report.raise_for_failures()
        if dry_run:
            print(f"{len(report.actions)} files would be sent")
            return {}
        compared = transfer.verify("", source)
    missing = [key for key, _ in compared.failed if (source / key).exists()]  # the target may have more
    if missing:
        raise NotSafeError(f"{len(missing)} files differ after the copy: {', '.join(missing[:5])}", where=target)
    same = compared.done.get("verify", 0)
    print(f"{report.files} files sent ({report.bytes / 1e6:,.1f} MB); {same} have the same SHA-256 in {redact(target)}")
    return {"files_sent": report.files, "bytes_sent": report.bytes, "files_verified": same}


@contextlib.contextmanager
def told(settings: Settings, asked: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Tell MLflow how the block went, with the numbers that it leaves. A server that is away does not stop the copy."""
    numbers: dict[str, float] = {}
    uri, run_id = settings.tracking.uri, asked.run_id
    client: Any = None
    if uri is not None and not asked.dry_run:
        with warned(uri):
            made = make_client(uri)
            prefix = settings.tracking.experiment_prefix or "wmtp"
            if run_id is None:
                tags = {TAG: "False", "folder": redact(asked.folder), "target": redact(asked.target)}
                experiment = find_experiment(made, f"{prefix}/storage_sync")
                run_id = made.create_run(experiment, tags=tags, run_name="storage sync").info.run_id
            client = made
    done = False
    try:
        yield numbers
        done = True
    finally:
        if client is not None:  # each by itself: what does not arrive keeps nothing else away
            with warned(uri):
                client.set_tag(run_id, TAG, str(done))
            if asked.run_id is None or not done:
                with warned(uri):
                    client.set_terminated(run_id, status="FINISHED" if done else "FAILED")
            with warned(uri):
                for key, value in numbers.items():
                    client.log_metric(run_id, key, value, timestamp=int(time.time() * 1000))


@contextlib.contextmanager
def warned(uri: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # MLflow raises whatever its libraries do
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(redact(f"warning: MLflow at {uri} was not told: {words}"), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
