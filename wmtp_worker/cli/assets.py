"""`wmtp assets`: models and data sets by name, in the work directory, in the bucket and on the hub."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from wmtp_worker.cli.options import Json, Set
from wmtp_worker.cli.text import printable

if TYPE_CHECKING:
    from wmtp_worker.assets.inventory import Finding, Holding
    from wmtp_worker.assets.manage import Assets

app = typer.Typer(no_args_is_help=True, help="Models and data sets by name: push, pull, verify and list them.")

Dataset = Annotated[bool, typer.Option("--dataset", help="It is a data set; without this, a model or tokenizer.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A name, or the hub's org/name.")]


@app.command()
def push(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder, a name, or the hub's org/name.")],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Its name in the bucket, if another.")] = None,
    dataset: Dataset = False,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of what has that name.")] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Put a model or data set into the bucket, with the SHA-256 of each of its files.

    wmtp assets push ./SmolLM2-135M --name smollm2

    wmtp assets push HuggingFaceTB/SmolLM2-135M     [dim]fetched from the hub first, if it is not here[/dim]

    wmtp assets push ./mbpp --dataset

    Every worker with the same bucket then finds it: wmtp train --set model.path=smollm2
    """
    with _assets(set_, f"push {source}") as assets:
        done = assets.push(source, "dataset" if dataset else "model", name, replace)
    if as_json:
        _echo(json.dumps(dataclasses.asdict(done)))
        return
    how = "" if done.sent else "was there already: "
    _echo(f"{how}{done.url}  {done.files} files, {done.bytes / 1e6:,.1f} MB, digests recorded")


@app.command()
def pull(name: Name, dataset: Dataset = False, set_: Set = None, as_json: Json = False) -> None:
    """Fetch a model or data set into the work directory: from the bucket, else from the Hugging Face hub.

    wmtp assets pull smollm2

    wmtp assets pull HuggingFaceTB/SmolLM2-135M     [dim]HF_TOKEN for gated and private ones[/dim]

    wmtp assets pull mbpp --dataset

    A run does the same by itself; this is for preparing a machine before.
    """
    with _assets(set_, f"pull {name}") as assets:
        folder, done = assets.pull(name, "dataset" if dataset else "model")
    if as_json:
        report = {"name": name, "folder": str(folder), "fetched": done is not None}
        if done is not None:
            report |= {"source": done.source, "files": done.files, "bytes": done.bytes, "seconds": done.seconds}
        _echo(json.dumps(report))
    elif done is None:
        _echo(f"was there already: {folder}")
    else:
        _echo(f"{folder}  {done.files} files, {done.bytes / 1e6:,.1f} MB from {done.source} in {done.seconds:.1f} s")


@app.command()
def verify(
    name: Name,
    dataset: Dataset = False,
    read: Annotated[
        bool, typer.Option("--read", help="Read the bucket's bytes too, not only the digests kept with them.")
    ] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Compare a model or data set, here and in the bucket, with the digests that were recorded.

    Ends with exit code 78 if a side is damaged, and if none could be verified.

    wmtp assets verify smollm2

    wmtp assets verify mbpp --dataset --read --json
    """
    from wmtp_worker.errors import WRONG

    with _assets(set_, f"verify {name}") as assets:
        findings = assets.verify(name, "dataset" if dataset else "model", read)
    if as_json:
        _echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            _echo(printable(f"{finding.status:13} {finding.place}{_detail(finding)}"))
    states = {finding.status for finding in findings}
    if "damaged" in states or "verified" not in states:
        raise typer.Exit(WRONG)


@app.command()
def ls(set_: Set = None, as_json: Json = False) -> None:
    """List the models and data sets here and in the bucket, with sizes, and whether their digests are recorded.

    wmtp assets ls
    """
    with _assets(set_, "ls") as assets:
        items = assets.list()
    if as_json:
        _echo(json.dumps([dataclasses.asdict(item) for item in items], indent=1))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from wmtp_worker.redact import redact

    table = Table("kind", "name", "here", "in the bucket")
    for item in items:
        table.add_row(item.kind, escape(printable(redact(item.name))), _side(item.local), _side(item.bucket))
    Console().print(table)


def _side(holding: "Holding | None") -> str:
    if holding is None:
        return "-"
    state = "digests recorded" if holding.recorded else "push unfinished" if holding.unfinished else "no digests"
    return f"{holding.bytes / 1e6:,.1f} MB, {state}"


def _detail(finding: "Finding") -> str:
    if finding.problem:
        return f": {finding.problem}"
    return f"  {finding.files} files, {finding.bytes / 1e6:,.1f} MB" if finding.status == "verified" else ""


def _echo(text: str) -> None:
    from wmtp_worker.redact import redact

    typer.echo("\n".join(map(printable, redact(text).split("\n"))))


@contextmanager
def _assets(set_: list[str] | None, title: str) -> "Iterator[Assets]":
    """The work directory and the bucket of the settings; a bar on a terminal, lines in a pipe."""
    from rich.console import Console

    from wmtp_worker.assets.manage import open_assets
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.settings import load
    from wmtp_worker.storage.transfer import progress_for
    from wmtp_worker.tracking.console import logging_to_console

    settings = load(overrides=set_ or (), options={"run.resume": "auto"})
    console = Console(stderr=True)
    with (
        logging_to_console(settings.logging.level, console),
        open_assets(settings, STOP.check, progress_for(console, title)) as assets,
    ):
        yield assets
