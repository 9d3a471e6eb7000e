"""`wmtp doctor`: is this machine fit to train?"""

import dataclasses
import json

import typer

from wmtp_worker.cli.options import Json, Preset, Recipe, Set

_COLORS = {"pass": "green", "warn": "yellow", "fail": "red"}


def doctor(recipe: Recipe = None, preset: Preset = None, set_: Set = None, as_json: Json = False) -> None:
    """Look whether this machine is fit for a run, and say what to do if it is not.

    Ends with exit code 78 if anything fails; a warning is no failure.

    wmtp doctor

    wmtp doctor --preset production --json
    """
    from wmtp_worker.errors import WRONG
    from wmtp_worker.host.doctor import checks
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.redact import redact
    from wmtp_worker.settings import load

    settings = load(recipe=recipe, preset=preset, overrides=set_ or ())
    found = []
    for check in checks(settings):
        STOP.check()
        found.append(check)
        if not as_json:
            status = typer.style(f"{check.status:4}", fg=_COLORS[check.status])
            advice = f"  -> {check.advice}" if check.advice else ""
            typer.echo(f"{status}  {check.name:14}  {redact(check.found + advice)}")
    failed = any(check.status == "fail" for check in found)
    if as_json:
        report = {"ok": not failed, "checks": [dataclasses.asdict(check) for check in found]}
        typer.echo(redact(json.dumps(report, indent=2)))
    if failed:
        raise typer.Exit(WRONG)
