"""`wmtp checkpoints`: list, verify and publish the checkpoints of a run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wmtp_worker.cli.options import Json

if TYPE_CHECKING:
    from wmtp_worker.checkpoint.losses import Losses

app = typer.Typer(no_args_is_help=True, help="List, verify and publish the checkpoints of a run.")

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")]


@app.command()
def ls(run: RunArgument, as_json: Json = False) -> None:
    """List the checkpoints of a run, oldest first, without reading their tensors, and what its interruptions cost.

    wmtp checkpoints ls baseline-smoke
    """
    from wmtp_worker.checkpoint.ledger import read_ledger
    from wmtp_worker.checkpoint.listing import list_checkpoints
    from wmtp_worker.checkpoint.losses import summarise

    paths = _paths(run)
    items = [item.to_json() for item in list_checkpoints(paths)]
    losses = summarise(read_ledger(paths.ledger))
    if as_json:
        typer.echo(json.dumps({"checkpoints": items, "losses": losses.to_json()}, indent=1))
        return
    _show(items)
    if losses.processes:
        _show_losses(losses)


@app.command()
def verify(run: RunArgument, as_json: Json = False) -> None:
    """Read every file of every checkpoint and compare it with the manifest's SHA-256.

    Ends with exit code 78 if one is damaged.

    wmtp checkpoints verify baseline-smoke --json
    """
    from wmtp_worker.checkpoint.listing import list_checkpoints
    from wmtp_worker.errors import WRONG

    items = list_checkpoints(_paths(run), verified=True)
    shown = [item.to_json() for item in items]
    if as_json:
        typer.echo(json.dumps(shown, indent=1))
    else:
        _show(shown)
    if any(item.problem for item in items):
        raise typer.Exit(WRONG)


@app.command()
def push(run: RunArgument) -> None:
    """Publish what is only on this disk: the checkpoints that are newer than the bucket's, exports and logs.

    What a run that ended with exit code 74 tells you to do. No worker may be training the run, here or elsewhere.

    CLOUD_PROVIDER=s3 CLOUD_BUCKET=lab wmtp checkpoints push baseline-smoke
    """
    from wmtp_worker.errors import NotSafeError, SettingsError
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.settings import load
    from wmtp_worker.storage.cloud import CloudSync, Terms

    paths = _paths(run)
    settings = load(options={"run.name": run, "run.resume": "auto"})
    with CloudSync(settings.cloud, paths.workdir, STOP.check, Terms.of(settings.checkpoint)) as cloud:
        if cloud.here:
            raise SettingsError("no bucket is set", where="cloud.bucket", fix="set CLOUD_PROVIDER and CLOUD_BUCKET")
        done = cloud.push_run(run)
    if done.not_safe:
        reason = next(iter(done.not_safe.values()))
        raise NotSafeError(f"not in the bucket yet: {', '.join(done.not_safe)}; {reason}", fix="do it again later")
    if done.behind is not None:
        newest = max(paths.steps(), default=None)
        onwards = "" if newest is None else f", --resume {newest} sets that one aside"
        raise NotSafeError(
            f"the bucket has step_{done.behind}, newer than all that is here: nothing was published",
            where=str(paths.checkpoints),
            fix=f"wmtp train --resume auto goes on from the bucket's{onwards}",
        )
    names = ", ".join(f"step_{step}" for step in done.published)
    typer.echo(f"published: {names}" if names else "the bucket has all checkpoints already")


def _paths(run: str) -> Any:
    from wmtp_worker.errors import InputError
    from wmtp_worker.settings import load
    from wmtp_worker.storage.layout import RunPaths

    # where to go on is no business of a command that only looks
    settings = load(options={"run.name": run, "run.resume": "auto"})
    paths = RunPaths(settings.run.workdir, settings.run.name)
    if not paths.checkpoints.is_dir():
        names = sorted(
            path.name for path in Path(settings.run.workdir, "checkpoints").glob("*") if any(path.glob("step_*"))
        )
        raise InputError(
            f"there is no run {run!r}",
            where=str(paths.checkpoints.parent),
            fix=f"choose one of {', '.join(names)}" if names else "train one first, or set WMTP_WORKDIR",
        )
    return paths


def _show(items: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("checkpoint", "created (UTC)", "size", "status")
    for item in items:
        size = f"{item['bytes'] / 1e6:,.1f} MB" if item["bytes"] is not None else "?"
        style = "red" if item["status"] == "damaged" else "green" if item["status"] == "verified" else ""
        table.add_row(
            item["name"], item["created"] or "?", size, escape(item["problem"] or item["status"]), style=style
        )
    Console().print(table)


def _show_losses(losses: "Losses") -> None:
    from datetime import UTC, datetime

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from wmtp_worker.checkpoint.interval import spell

    console = Console()
    if losses.interruptions:
        right = ("from step", "steps lost", "work", "restart", "GPU time lost", "money", "away")
        table = Table("went on (UTC)", "host", "ended by")
        for column in right:
            table.add_column(column, justify="right", no_wrap=column == "restart")
        for item in losses.interruptions:
            table.add_row(
                f"{datetime.fromtimestamp(item.time, UTC):%Y-%m-%d %H:%M:%S}",
                escape(item.host),
                item.how,
                "0" if item.resumed_from is None else f"{item.resumed_from}",
                f"{item.steps}",
                spell(item.work_seconds),
                # the phases say where a slow start could be made quicker
                "\n".join([spell(item.restart_seconds), *(f"{escape(k)} {spell(v)}" for k, v in item.restart.items())]),
                spell(item.gpu_seconds),
                "" if item.money is None else f"{item.money:,.2f}",
                "?" if item.away is None else spell(item.away),
            )
        console.print(table)
    console.print(losses.sentence(), highlight=False)
