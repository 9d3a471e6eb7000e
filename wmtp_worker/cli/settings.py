"""`wmtp settings show`: every setting of a run, and where it comes from."""

import json

import typer

from wmtp_worker.cli.options import Json, Preset, Recipe, Resume, RunName, Set

app = typer.Typer(no_args_is_help=True, help="Look at the settings a run would have.")


@app.callback()
def settings() -> None:
    """Look at the settings a run would have."""


@app.command()
def show(
    recipe: Recipe = None,
    preset: Preset = None,
    run_name: RunName = None,
    resume: Resume = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Print every setting with its value and its source; start nothing.

    wmtp settings show --preset smoke --set training.lr=1e-4

    wmtp settings show --json | python -m json.tool
    """
    from wmtp_worker.redact import redact
    from wmtp_worker.settings import load

    loaded = load(
        recipe=recipe,
        preset=preset,
        overrides=set_ or (),
        options={"run.name": run_name, "run.resume": resume},
    )
    flat = loaded.flat()
    if as_json:
        report = {
            "digest": loaded.digest(),
            "settings": {key: {"value": value, "source": loaded.sources[key]} for key, value in flat.items()},
        }
        typer.echo(redact(json.dumps(report, indent=2)))
        return
    shown = {key: json.dumps(value) if not isinstance(value, str) else value for key, value in flat.items()}
    wide, wider = max(map(len, shown)), max(map(len, shown.values()))
    for key, value in shown.items():
        typer.echo(redact(f"{key:{wide}}  {value:{min(wider, 40)}}  {loaded.sources[key]}"))
    typer.echo(f"\nsettings digest {loaded.digest()}")
