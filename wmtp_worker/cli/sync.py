"""`wmtp sync`: copy between a folder and a bucket what differs, list a bucket, compare the two."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wmtp_worker.cli.options import Json, Set
from wmtp_worker.cli.text import printable

if TYPE_CHECKING:
    from wmtp_worker.settings import Settings
    from wmtp_worker.storage.transfer import Report, Transfer
    from wmtp_worker.storage.transfer.report import Kind

app = typer.Typer(no_args_is_help=True, help="Copy what differs between a folder and a bucket; list and compare.")

_WORDS: "dict[Kind, str]" = {"upload": "uploaded", "download": "downloaded", "delete": "deleted"}
_URL = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, or a folder that acts as one"
Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="A folder on this machine.")]
Url = Annotated[str, typer.Argument(metavar="URL", help=f"{_URL}.")]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Only files that match, as '*.safetensors' or 'logs/*'; may be repeated."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Not files that match; may be repeated, wins over --include."),
]
Delete = Annotated[bool, typer.Option("--delete", help="Delete on the other side what is not on this one.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


@app.command()
def push(
    folder: Folder,
    url: Url,
    include: Include = None,
    exclude: Exclude = None,
    delete: Delete = False,
    dry_run: DryRun = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Upload what differs, by size and SHA-256, from a folder to a bucket.

    wmtp sync push work/logs s3://lab/team/logs

    wmtp sync push results gs://lab/results --include '*.json' --dry-run

    wmtp sync push . az://lab/copy --exclude '*.tmp' --delete

    Each object appears whole. What was interrupted goes on when the same command is given again.
    """
    from wmtp_worker.storage.sync import check_files, check_sides, folder_to_push

    check_sides(folder, url, "push")
    path = folder_to_push(folder)
    with _transfer(url, _settings(set_), f"push {folder}") as transfer:
        if delete:
            check_files(path, include or (), exclude or ())
        report = transfer.push(path, "", include=include or (), exclude=exclude or (), delete=delete, dry_run=dry_run)
    _finish(report, as_json, dry_run)


@app.command()
def pull(
    url: Url,
    folder: Folder,
    include: Include = None,
    exclude: Exclude = None,
    delete: Delete = False,
    dry_run: DryRun = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Download what differs, by size and SHA-256, from a bucket to a folder.

    wmtp sync pull s3://lab/team/logs work/logs

    wmtp sync pull gs://lab/results . --include 'summary-*.json'

    wmtp sync pull s3://lab/x . --set cloud.endpoint_url=https://storage.example.org --set cloud.bandwidth=20

    Each file appears whole, with the SHA-256 that was recorded when it was uploaded.
    """
    from wmtp_worker.storage.sync import check_is_there, check_objects, check_sides

    check_sides(folder, url, "pull")
    check_is_there(url)
    settings = _settings(set_)
    with _transfer(url, settings, f"pull {url}") as transfer:
        chosen = (include or (), exclude or ()) if delete else ((), ())
        check_objects(transfer.store, url, settings.cloud, *chosen)
        report = transfer.pull(
            "", Path(folder), include=include or (), exclude=exclude or (), delete=delete, dry_run=dry_run
        )
    _finish(report, as_json, dry_run)


@app.command()
def verify(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder on this machine, or a URL.")],
    target: Annotated[str, typer.Argument(metavar="DST", help=f"{_URL}; or the folder.")],
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Compare the digests of a folder and a bucket, file by file; change nothing.

    Ends with exit code 78 if anything differs or is on one side only.

    wmtp sync verify work/checkpoints s3://lab/team/checkpoints

    wmtp sync verify gs://lab/results results --json
    """
    from wmtp_worker.errors import WRONG
    from wmtp_worker.redact import redact
    from wmtp_worker.storage.sync import check_objects, folder_and_url

    folder, url = folder_and_url(source, target)
    settings = _settings(set_)
    with _transfer(url, settings, f"verify {url}") as transfer:
        check_objects(transfer.store, url, settings.cloud)
        report = transfer.verify("", folder)
    if as_json:
        typer.echo(redact(json.dumps(_as_json(report), indent=1)))
    else:
        for key, error in report.failed:
            typer.echo(printable(redact(f"differs  {key}: {error.what}")))
        same = report.done.get("verify", 0)
        typer.echo(f"{same} files are the same, {len(report.failed)} differ ({report.seconds:.1f} s)")
    if report.failed:
        raise typer.Exit(WRONG)


@app.command()
def ls(url: Url, set_: Set = None, as_json: Json = False) -> None:
    """List a bucket, or the part of it below a prefix: size, time (UTC) and key, in the order of the keys.

    wmtp sync ls s3://lab/team/checkpoints

    wmtp sync ls gs://lab --json | jq '.[].key'
    """
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.storage.open import open_url
    from wmtp_worker.storage.sync import check_is_there, check_no_object

    check_is_there(url)
    cloud = _settings(set_).cloud
    store = open_url(url, cloud, STOP.check)
    count = size = 0
    try:
        for info in store.list():
            STOP.check()
            time = info.modified.strftime("%Y-%m-%d %H:%M:%S") if info.modified else ""
            if as_json:
                line = {"key": info.key, "size": info.size, "modified": info.modified and info.modified.isoformat()}
                sys.stdout.write(("[\n" if count == 0 else ",\n") + json.dumps(line))
            else:
                sys.stdout.write(f"{info.size:>15,}  {time:19}  {printable(info.key)}\n")
            count, size = count + 1, size + info.size
        if not count:
            check_no_object(url, cloud, STOP.check)
    finally:
        store.close()
    if as_json:
        sys.stdout.write("\n]\n" if count else "[]\n")
    else:
        sys.stdout.write(f"{count:,} objects, {size / 1e6:,.1f} MB\n")


def _settings(set_: list[str] | None) -> "Settings":
    from wmtp_worker.settings import load

    return load(overrides=set_ or (), options={"run.resume": "auto"}, needs_bucket=False)


@contextmanager
def _transfer(url: str, settings: "Settings", title: str) -> "Iterator[Transfer]":
    """An engine on the bucket of `url`, with a bar on a terminal and lines in a pipe, both on standard error."""
    from rich.console import Console

    from wmtp_worker.host.stop import STOP
    from wmtp_worker.storage.sync import open_transfer
    from wmtp_worker.storage.transfer import progress_for
    from wmtp_worker.tracking.console import logging_to_console

    console = Console(stderr=True)
    with (
        logging_to_console(settings.logging.level, console),
        open_transfer(url, settings, STOP.check, progress_for(console, title)) as transfer,
    ):
        yield transfer


def _finish(report: "Report", as_json: bool, dry_run: bool) -> None:
    """Print what was done (a dry run: would be), then raise for what could not be."""
    from wmtp_worker.redact import redact

    if as_json:
        typer.echo(redact(json.dumps(_as_json(report), indent=1)))
    else:
        for action in report.actions:
            typer.echo(redact(f"{action.kind:8}  {action.size:>15,}  {printable(action.key)}"))
        counts = report.planned if dry_run else report.done
        did = ", ".join(f"{counts[kind]:,} {word}" for kind, word in _WORDS.items() if counts.get(kind))
        would = "would be: " if dry_run and did else ""
        speed = f" ({report.bytes / 1e6:,.1f} MB in {report.seconds:.1f} s)" if report.files else ""
        typer.echo(f"{would}{did or 'nothing to do'}{speed}; {counts.get('skip', 0):,} are the same")
    report.raise_for_failures()


def _as_json(report: "Report") -> dict[str, Any]:
    return {
        "planned": report.planned,
        "done": report.done,
        "files": report.files,
        "bytes": report.bytes,
        "seconds": round(report.seconds, 3),
        "actions": [{"kind": action.kind, "key": action.key, "size": action.size} for action in report.actions],
        "failed": [{"key": key, "error": error.what} for key, error in report.failed],
    }
