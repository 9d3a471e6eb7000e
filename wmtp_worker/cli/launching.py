"""What the launchers of `wmtp launch` share: their options, the plan that is shown, the question, the start."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from wmtp_worker.cli.text import printable

if TYPE_CHECKING:
    from wmtp_worker.launch.host import Host, State
    from wmtp_worker.launch.register import Record
    from wmtp_worker.launch.request import Request
    from wmtp_worker.settings import Settings

Name = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Name of the job. [dim]Default: the run's.[/dim]")
]
Env = Annotated[
    list[str] | None,
    typer.Option(
        "--env", metavar="NAME", help="A further variable of here that the job gets, as a secret; repeatable."
    ),
]
NoCredentials = Annotated[
    bool, typer.Option("--no-credentials", help="Send no keys of the bucket: the host has a role of its own.")
]
NoLogs = Annotated[
    bool, typer.Option("--no-logs", help="Keep the run's logs on the host; the rest goes to the bucket.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show exactly what would be sent, and send nothing.")]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="Its GPU, as in `wmtp plan`: hours and money are estimated."),
]
Count = Annotated[int, typer.Option("--count", metavar="N", min=1, help="How many of that GPU it has.")]
Price = Annotated[float | None, typer.Option(metavar="AMOUNT", min=0, help="What the machine costs an hour.")]
Image = Annotated[
    str | None, typer.Option("--image", metavar="IMAGE", help="Run this image by docker; without, wmtp itself.")
]
Gpus = Annotated[str, typer.Option("--gpus", metavar="all|N|''", help="docker's --gpus; '' for none.")]
Volume = Annotated[str, typer.Option("--volume", metavar="NAME", help="Volume or folder that is /workspace.")]
Grace = Annotated[float, typer.Option("--grace", metavar="SECONDS", min=0, help="How long a stop may take.")]


def overrides_of(set_: list[str] | None, no_logs: bool) -> list[str]:
    return [*(set_ or ()), *(["cloud.logs=false"] if no_logs else ())]


def request_of(
    recipe: str | None,
    preset: str | None,
    run_name: str | None,
    resume: str | None,
    overrides: list[str],
    name: str | None,
    env: list[str] | None,
    no_credentials: bool,
    image: str | None,
) -> "tuple[Request, Settings]":
    from wmtp_worker.launch.request import make_request

    return make_request(
        name=name,
        recipe=recipe,
        preset=preset,
        overrides=overrides,
        options={"run.name": run_name, "run.resume": resume},
        passed=env or (),
        credentials=not no_credentials,
        image=image,
    )


def refuse_repeated_start(settings: "Settings") -> None:
    """For hosts that repeat the whole command after an interruption: each time it would begin anew, or at that step."""
    from wmtp_worker.errors import SettingsError

    if settings.run.resume != "auto":
        raise SettingsError(
            f"run.resume={settings.run.resume}, and this host repeats the same command after each interruption",
            where=settings.sources.get("run.resume"),
            fix="leave it out: another --run-name begins anew",
        )


def for_new_machine(request: "Request", settings: "Settings", dry_run: bool) -> "Request":
    """For machines that have nothing but their image: model and data have to be in the bucket or on the hub.

    Raises before anything is paid for: `SettingsError` for a path of this machine, `InputError` for a name that is not
    in the bucket. A bucket that cannot be asked from here is a note; for a dry run it is not asked.
    """
    import contextlib
    import os

    from wmtp_worker.assets.fetch import wanted_assets
    from wmtp_worker.errors import InputError, SettingsError, StorageError
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.storage.layout import is_hub_name
    from wmtp_worker.storage.open import open_store

    wanted = [asset for asset in wanted_assets(settings) if not is_hub_name(asset.name)]
    for asset in wanted:
        # another path may be one of the image's
        if asset.folder is None and (not asset.name.startswith("/") or os.path.exists(asset.name)):
            raise SettingsError(
                f"{asset.key}={asset.name} is a path of this machine, and the new one does not have it",
                where=settings.sources.get(asset.key),
                fix=f"wmtp assets push {asset.name}, then --set {asset.key}=NAME",
            )
    named = [asset for asset in wanted if asset.folder is not None]
    if dry_run or not named or settings.cloud.provider == "local":
        return request
    try:
        with contextlib.closing(open_store(settings.cloud.model_copy(update={"patience": 3.0}), STOP.check)) as store:
            missing = next((asset for asset in named if asset.published(store) is None), None)
    except (StorageError, SettingsError) as error:
        note = f"whether model and data are in the bucket could not be asked from here: {error}"
        return replace(request, notes=(*request.notes, note))
    if missing is not None:
        raise InputError(
            f"{missing.key}={missing.name} is not in the bucket, and the new machine has nothing else",
            where=settings.sources.get(missing.key),
            fix=f"wmtp assets push FOLDER --name {missing.name}, or set {missing.key} to org/name on the hub",
        )
    return request


def estimate(settings: "Settings", gpu: str | None, count: int, price: float | None) -> dict[str, str]:
    """Hours and money, where a GPU is named; `price` is of the whole machine an hour."""
    price = settings.host.price_per_hour if price is None else price
    shown = {"price": "not known" if price is None else f"{price:,.2f} an hour"}
    if gpu is not None:
        from wmtp_worker.host.stop import STOP
        from wmtp_worker.planning.plan import make_plan

        plan = make_plan(settings, gpu, count, None if price is None else price / count, STOP.check)
        shown["hours"] = "{:,.3g} to {:,.3g}, of the steps alone".format(*plan.hours)
        if plan.money is not None:
            shown["money"] = "{:,.2f} to {:,.2f}".format(*plan.money)
    return shown


def show_and_launch(
    host: "Host",
    kind: str,
    where: str,
    request: "Request",
    facts: Mapping[str, str],
    shown: Mapping[str, str],
    yes: bool,
    dry_run: bool,
) -> None:
    """Show the plan, ask, start the job and remember where it is."""
    from wmtp_worker.errors import HostError, RunHeldError, SettingsError
    from wmtp_worker.launch.register import Record, check_writable, remember

    bucket = "/".join(part for part in (request.cloud["bucket"], request.cloud["prefix"]) if part)
    table(
        {
            "job": request.name,
            **shown,
            "bucket": f"{request.cloud['provider']}: {bucket}",
            "command": request.command,
            "variables": " ".join(f"{key}={value}" for key, value in request.shown().items()) or "none",
        }
    )
    for note in request.notes:
        echo(f"note: {note}")
    if dry_run:
        echo(f"\nnothing is sent; this would be:\n\n{host.preview(request)}")
        return
    if not yes:
        if not sys.stdin.isatty():
            raise SettingsError("nobody is here to be asked", where="stdin is no terminal", fix="give --yes to go on")
        if not typer.confirm("launch it?", err=True):
            echo("nothing was launched")
            return
    refuse_second(request.name, kind, where)
    check_writable()
    record = Record(request.name, kind, request.run, where, request.command, dict(facts), dict(request.cloud))
    try:
        found = host.start(request)
    except (HostError, RunHeldError) as error:
        remember_found(host, record, held=isinstance(error, RunHeldError))
        raise
    echo(f"started: {', '.join(f'{key} {value}' for key, value in found.items())}")  # before anything else can fail
    remember(replace(record, facts={**facts, **found}))
    echo(f"launched {request.name}: wmtp launch status|logs|stop {request.name}")


def remember_found(host: "Host", record: "Record", held: bool) -> None:
    """Remember a job that is there all the same: the answer was lost, or another machine launched it (`held`).

    Else no `stop` would find it. What is remembered already of a job that is held is left alone.
    """
    from wmtp_worker.errors import Interrupted, WorkerError
    from wmtp_worker.launch.register import path_of, recall, remember

    try:
        found = host.find()
    except Interrupted:
        raise
    except WorkerError:
        return  # the same launch again finds it
    if found is None:
        return
    facts = {**record.facts, **found}
    if held and path_of(record.name).exists():
        known = recall(record.name)
        if known.kind == record.kind and facts.items() <= known.facts.items():
            return
    remember(replace(record, facts=facts))
    echo(f"found {record.name}: wmtp launch status|logs|stop {record.name}")


def refuse_second(name: str, kind: str, where: str) -> None:
    """A job of this name elsewhere must not be forgotten while it may run, or while its disk may cost."""
    from wmtp_worker.errors import RunHeldError
    from wmtp_worker.launch.register import path_of, recall

    if not path_of(name).exists():
        return
    record = recall(name)
    if (record.kind, record.where) == (kind, where):
        return  # that host looks for itself
    state, error = ask(record)
    if state is None or state.phase not in ("ended", "gone", "unknown"):
        raise RunHeldError(
            f"a job named {name} was launched elsewhere: {error or state}",
            where=f"{record.kind} {record.where}",
            fix=f"`wmtp launch stop {name}`, or another --name; to forget it: rm {path_of(name)}",
        )


def host_of(record: "Record") -> "Host":
    """The host of a job that was remembered."""
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.launch import jobs

    return jobs.host_of(record, STOP.check)


def ask(record: "Record") -> "tuple[State | None, str | None]":
    """How a job is, else why its host cannot be asked."""
    from wmtp_worker.errors import Interrupted, WorkerError

    try:
        return host_of(record).state(), None
    except Interrupted:
        raise
    except WorkerError as error:  # the others are asked all the same
        return None, str(error)


def published(record: "Record") -> str | None:
    """What of the run is in the bucket, where that can be asked from here."""
    import tempfile
    from pathlib import Path

    from wmtp_worker.errors import Interrupted, WorkerError
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.settings import load
    from wmtp_worker.storage.cloud import CloudSync

    if record.cloud.get("provider") == "local":
        return None
    try:
        given = {f"cloud.{key}": value for key, value in record.cloud.items() if value is not None}
        cloud = load(options=given | {"cloud.patience": 0}).cloud
        with tempfile.TemporaryDirectory() as folder, CloudSync(cloud, Path(folder), STOP.check) as sync:
            steps = sync.run(record.run).published_steps()
    except Interrupted:
        raise
    except WorkerError as error:
        return f"what is in the bucket could not be asked from here: {error}"
    if not steps:
        return "no checkpoint of it is in the bucket"
    return f"step {steps[-1]} is in the bucket: any machine goes on from there"


def table(rows: Mapping[str, str]) -> None:
    width = max(map(len, rows))
    for key, value in rows.items():
        echo(f"{key:{width}}  {value}")


def echo(text: str) -> None:
    from wmtp_worker.redact import redact

    typer.echo("\n".join(map(printable, redact(text).split("\n"))))
