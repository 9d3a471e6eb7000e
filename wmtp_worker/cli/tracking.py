"""`wmtp tracking`: is the MLflow server fit, send it what it lacks, look at runs that no server has."""

from typing import TYPE_CHECKING, Annotated

import typer

from wmtp_worker.cli.options import Json, Recipe, Set

if TYPE_CHECKING:
    from wmtp_worker.settings import Settings

app = typer.Typer(
    no_args_is_help=True, help="The record of runs: check a server, send to it, look at runs without one."
)
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's name.")]


@app.command()
def check(recipe: Recipe = None, set_: Set = None, as_json: Json = False) -> None:
    """Is the MLflow server fit? Tries address, password, experiment, a run and an artifact, there and back.

    Ends with 0; with 78 where it refuses us or is not set; with 75 where it cannot be reached or does not work.

    wmtp tracking check

    MLFLOW_TRACKING_URI=https://mlflow.example.com wmtp tracking check --json
    """
    import dataclasses
    import json

    from wmtp_worker.errors import AGAIN, WRONG
    from wmtp_worker.settings import load
    from wmtp_worker.tracking.check import check as findings
    from wmtp_worker.tracking.facts import experiment_name

    settings = load(recipe=recipe, overrides=set_ or ())
    found = []
    for finding in findings(_uri(settings), experiment_name(settings)):
        found.append(finding)
        if not as_json:
            _echo(f"{finding.state:7} {finding.name:11} {finding.seconds:6.2f} s  {finding.detail}")
    if as_json:
        _echo(json.dumps([dataclasses.asdict(finding) for finding in found], indent=1))
    if (state := found[-1].state) != "ok":
        raise typer.Exit(WRONG if state == "denied" else AGAIN)


@app.command()
def push(
    run: Run,
    set_: Set = None,
    seconds: Annotated[float, typer.Option(help="How long to try.")] = 600.0,
) -> None:
    """Send a run's record from the work directory to the MLflow server: what that lacks, and how the run ended.

    wmtp tracking push baseline-smoke
    """
    from wmtp_worker.errors import InputError, NotSafeError
    from wmtp_worker.settings import load
    from wmtp_worker.storage.layout import RunPaths
    from wmtp_worker.storage.runlock import run_lock
    from wmtp_worker.tracking.record import TrackedRun
    from wmtp_worker.tracking.viewer import push as send

    settings = load(overrides=set_ or (), options={"run.name": run})
    uri, paths = _uri(settings), RunPaths(settings.run.workdir, run)
    if TrackedRun.load(paths.tracking_record) is None:
        raise InputError(f"run {run!r} has no record here", where=str(paths.tracking_record), fix="check WMTP_WORKDIR")
    with run_lock(paths.lock):
        done, said = send(paths, uri, seconds=seconds)
    for line in said:
        _echo(line)
    if not done:
        raise NotSafeError(f"not all of run {run!r} is at {uri}", fix="try again when the server is back")
    _echo(f"all of run {run} is at {uri}")


@app.command("open")
def open_(
    mlflow: Annotated[
        str | None, typer.Option(metavar="PROGRAM", help="MLflow with its server, if it is not installed here.")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where the pages are, on this machine alone; 0: any that is free.")
    ] = 5000,
    once: Annotated[bool, typer.Option("--once", help="Fill the server's database, say where it is, and end.")] = False,
    set_: Set = None,
) -> None:
    """Show runs that no server has: fetch their records from the bucket, and start MLflow's pages on loopback.

    The records of the work directory are shown too. Ctrl-C ends it; what was fetched stays for the next time.

    wmtp tracking open

    CLOUD_PROVIDER=s3 CLOUD_BUCKET=my-bucket wmtp tracking open --mlflow ~/mlflow/bin/mlflow
    """
    import time

    from wmtp_worker.errors import InputError, Interrupted
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.settings import load
    from wmtp_worker.storage.cloud import CloudSync
    from wmtp_worker.tracking import viewer

    settings = load(overrides=set_ or (), options={"run.resume": "auto"})
    workdir = settings.run.workdir
    program, mirror = viewer.find_program(mlflow), workdir / "cache" / "tracking"
    with CloudSync(settings.cloud, workdir, STOP.check) as cloud:
        if not cloud.here:
            cloud.download_directory("mlflow", mirror / "mlflow")
            cloud.download_directory("logs", mirror / "logs")
    runs = {paths.run: paths for root in (mirror, workdir) for paths in viewer.records(root)}
    if not runs:
        raise InputError("there is no record of a run", where=str(workdir), fix="check WMTP_WORKDIR and CLOUD_BUCKET")
    with viewer.server(program, mirror / "server", port, STOP.check) as address:
        for paths in runs.values():
            STOP.check()
            done, said = viewer.push(paths, address, seconds=300, viewer=True)
            _echo(f"{paths.run}{'' if done else ': not all of it: ' + '; '.join(said)}")
        if once:
            return
        _echo(f"{len(runs)} runs at {address}  (Ctrl-C ends it)")
        try:
            while True:
                STOP.check()
                time.sleep(0.2)
        except Interrupted:
            return


def _uri(settings: "Settings") -> str:
    from wmtp_worker.errors import SettingsError

    if settings.tracking.uri is None:
        raise SettingsError(
            "no MLflow server is set",
            where=settings.sources["tracking.uri"],
            fix="set MLFLOW_TRACKING_URI; without a server, wmtp tracking open shows what was recorded",
        )
    return settings.tracking.uri


def _echo(text: str) -> None:
    from wmtp_worker.errors import printable
    from wmtp_worker.redact import redact

    typer.echo("\n".join(map(printable, redact(text).split("\n"))))
