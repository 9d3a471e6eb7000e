"""`wmtp data`: what a data set holds, and labels by execution."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wmtp_worker.cli.options import Json, Set
from wmtp_worker.cli.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from wmtp_worker.data.problems import Split
    from wmtp_worker.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Look into data sets, and label their solutions by running them.")

Source = Annotated[str, typer.Argument(metavar="DATA", help="A name, a folder or a file, as for data.dataset.")]
Format = Annotated[
    Literal["auto", "mbpp", "code_contests", "humaneval", "gsm8k", "labelled"],
    typer.Option(help="The format of the files; auto looks at their first record."),
]


@app.command()
def label(
    source: Source,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the labelled data set is written.")],
    mutations: Annotated[
        int, typer.Option(metavar="N", min=0, help="Wrong solutions to make for each problem, of a right one.")
    ] = 0,
    check: Annotated[
        Literal["missing", "all"], typer.Option(help="Run solutions without a label only, or all.")
    ] = "missing",
    seconds: Annotated[int, typer.Option(metavar="N", min=1, help="CPU time for one run.")] = 10,
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Runs at a time; 0: one a core.")] = 0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="What decides which changes are tried first.")] = 0,
    format: Format = "auto",
    weak_sandbox: Annotated[
        bool, typer.Option("--weak-sandbox", help="Run code even where this machine cannot keep it from secrets.")
    ] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Run solutions against their tests in a sandbox, and write down which are right; make wrong ones of right ones.

    wmtp data label mbpp.jsonl mbpp-pairs --mutations 4     [dim]for pairs of right and wrong[/dim]

    wmtp data label ./generated labelled --check all

    Then: wmtp train --set data.dataset=labelled. Interrupted, the same command goes on.
    """
    from wmtp_worker.assets.resolve import dataset_folder
    from wmtp_worker.data.label import Labelling
    from wmtp_worker.data.labelled import Work, write_labelled
    from wmtp_worker.host.sandbox import Limits, Sandbox
    from wmtp_worker.host.stop import STOP

    settings = _settings(source, set_)
    asked = Labelling(check, mutations, seed, Limits(cpu_seconds=seconds))
    with _progress(settings) as progress, Sandbox(workers, weak=weak_sandbox) as sandbox:
        work = Work(dataset_folder(settings), folder, asked, None if format == "auto" else format, STOP.check, progress)
        report = write_labelled(work, sandbox)
    if as_json:
        typer.echo(json.dumps(report))
        return
    typer.echo(printable(f"{folder}: {', '.join(report['files'])}"))
    typer.echo(", ".join(f"{name} {count:,}" for name, count in report["said"].items()))


@app.command()
def show(source: Source, format: Format = "auto", set_: Set = None, as_json: Json = False) -> None:
    """Count problems and solutions by split, label, language and difficulty, and print the files' SHA-256.

    wmtp data show sample

    wmtp data show ./mbpp-pairs --json
    """
    from wmtp_worker.assets.resolve import dataset_folder
    from wmtp_worker.data.summary import summarise

    report = summarise(dataset_folder(_settings(source, set_)), None if format == "auto" else format)
    if as_json:
        typer.echo(json.dumps(report))
        return
    _show(report)


def _settings(source: str, set_: list[str] | None) -> "Settings":
    from wmtp_worker.settings import load

    return load(overrides=set_ or (), options={"data.dataset": source, "run.resume": "auto"})


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    # a split is a column: narrow terminals hold these, and people read down
    table = Table("split", *report["splits"], title=f"format {report['format']}", title_justify="left")
    for name in ("problems", "with_tests", "with_both"):
        table.add_row(name.replace("_", " "), *(f"{counts[name]:,}" for counts in report["splits"].values()))
    for name in ("correct", "incorrect", "unknown"):
        table.add_row(f"{name} solutions", *(f"{counts['solutions'][name]:,}" for counts in report["splits"].values()))
    for name in ("languages", "difficulties"):
        told = (", ".join(f"{key} {n:,}" for key, n in counts[name].items()) for counts in report["splits"].values())
        table.add_row(name, *told)
    Console().print(table)
    for name, digest in report["files"].items():
        typer.echo(printable(f"{digest}  {name}"))


@contextmanager
def _progress(settings: "Settings") -> "Iterator[Callable[[Split, int], None]]":
    """A live count on a terminal; elsewhere the log lines say it."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from wmtp_worker.tracking.console import logging_to_console

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed} problems"), TimeElapsedColumn())
    with (
        logging_to_console(settings.logging.level, console),
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("data")
        yield lambda split, done: bar.update(task, description=split, completed=done)
