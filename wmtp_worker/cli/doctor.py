"""`wmtp doctor`: is this machine fit to train?"""

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from wmtp_worker.cli.options import Json, Preset, Recipe, Set

if TYPE_CHECKING:
    from wmtp_worker.doctor.check import Check

_COLORS = {"pass": "green", "warn": "yellow", "fail": "red"}


def doctor(
    recipe: Recipe = None,
    preset: Preset = None,
    set_: Set = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Under a second: without torch, the bucket and the tracking server.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Look whether this machine is fit for a run, and say what to do if it is not: docs/doctor.md has all checks.

    Ends with exit code 78 if anything fails; a warning is no failure.

    wmtp doctor

    wmtp doctor --preset production --json
    """
    import sys

    from wmtp_worker.doctor.checks import checks
    from wmtp_worker.errors import WRONG
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.settings import load

    found: list[Check] = []
    looks = checks(load(recipe=recipe, preset=preset, overrides=set_ or ()), quick=quick, poll=STOP.check)
    show = _as_nothing if as_json else _as_table if sys.stdout.isatty() else _as_lines
    for check in show(looks):
        found.append(check)
    failed = any(check.status == "fail" for check in found)
    if as_json:
        report = {"ok": not failed, "checks": [dataclasses.asdict(check) for check in found]}
        typer.echo(json.dumps(report, indent=2))
    if failed:
        raise typer.Exit(WRONG)


def _as_nothing(checks: "Iterator[Check]") -> "Iterator[Check]":
    return checks


def _as_lines(checks: "Iterator[Check]") -> "Iterator[Check]":
    from wmtp_worker.errors import printable

    for check in checks:
        advice = f"  -> {check.advice}" if check.advice else ""
        typer.echo(printable(f"{check.status:4}  {check.name:14}  {check.found}{advice}"))
        yield check


def _as_table(checks: "Iterator[Check]") -> "Iterator[Check]":
    """A row as soon as it is known: a table that is drawn again and again would fill the terminal's memory."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from wmtp_worker.errors import printable

    console = Console()
    for check in checks:
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for width in (4, 14, None):
            row.add_column(width=width, ratio=None if width else 1, overflow="fold")
        text = Text(printable(check.found))
        if check.advice:
            text.append(f"\n→ {printable(check.advice)}", style=_COLORS[check.status])
        row.add_row(Text(check.status, style=_COLORS[check.status]), check.name, text)
        console.print(row)
        yield check
