"""`wmtp report`: what a run did, or how runs compare, as a page for the browser."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Name of a run, or the folder of its logs; several: compared.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where to. [dim]Default: report.html in the run's logs; comparison.html here.[/dim]"
        ),
    ] = None,
) -> None:
    """Write a page about a run, or one that compares several, and print where it is.

    wmtp report baseline-smoke

    wmtp report baseline-mbpp gradient-mbpp critic-mbpp --output families.html

    The page is one file that asks for nothing else. Each run leaves its own in logs/<run>/report.html.
    """
    from wmtp_worker.settings import load
    from wmtp_worker.training.report import find_record, write_report

    settings = load(options={"run.resume": "auto"}, needs_bucket=False)
    records = [find_record(run, settings.run.workdir) for run in runs]
    path = output or (records[0].report if len(records) == 1 else Path("comparison.html"))
    write_report(records, path)
    typer.echo(path)
