"""The commands and their names; each lives in a file of its own and imports torch only when it runs."""

from typing import Annotated

import typer

from wmtp_worker import __version__
from wmtp_worker.cli.assets import app as assets_app
from wmtp_worker.cli.checkpoints import app as checkpoints_app
from wmtp_worker.cli.data import app as data_app
from wmtp_worker.cli.doctor import doctor
from wmtp_worker.cli.evaluate import evaluate
from wmtp_worker.cli.host import app as host_app
from wmtp_worker.cli.launch import app as launch_app
from wmtp_worker.cli.models import app as models_app
from wmtp_worker.cli.plan import plan
from wmtp_worker.cli.report import report
from wmtp_worker.cli.settings import app as settings_app
from wmtp_worker.cli.sync import app as sync_app
from wmtp_worker.cli.tracking import app as tracking_app
from wmtp_worker.cli.train import train

app = typer.Typer(
    name="wmtp",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command()(plan)
app.command()(evaluate)
app.command()(report)
app.add_typer(checkpoints_app, name="checkpoints")
app.add_typer(assets_app, name="assets")
app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")
app.add_typer(sync_app, name="sync")
app.add_typer(tracking_app, name="tracking")
app.add_typer(launch_app, name="launch")
app.command()(doctor)
app.add_typer(host_app, name="host")
app.add_typer(settings_app, name="settings")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"wmtp {__version__}")
        raise typer.Exit


@app.callback()
def wmtp(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Train language models by weighted multi-token prediction, on machines that may vanish at any moment.

    wmtp doctor                             [dim]is this machine fit to train?[/dim]

    wmtp plan --preset smoke                [dim]what will a run need and cost?[/dim]

    wmtp train --preset smoke               [dim]a whole run in under a minute[/dim]

    wmtp train --preset smoke               [dim]again: goes on where it was stopped[/dim]

    wmtp report baseline-smoke              [dim]a page about it; several runs: compared[/dim]

    wmtp checkpoints ls baseline-smoke      [dim]what is saved of it[/dim]

    wmtp assets push ./my-model             [dim]a model that every worker finds[/dim]

    wmtp models show work/models/smollm2    [dim]what a model is; convert: another layout[/dim]

    wmtp data label mbpp.jsonl pairs        [dim]which solutions are right, by running them[/dim]

    wmtp sync pull s3://bucket/logs logs    [dim]copy what differs, either way[/dim]

    wmtp launch ssh gpu-box --preset smoke  [dim]on another machine; status, logs, stop[/dim]

    wmtp tracking check                     [dim]is the MLflow server fit? open: runs without one[/dim]

    wmtp host stop --dry-run                [dim]how this rented machine would be stopped[/dim]

    wmtp settings show --preset production  [dim]every setting and its source[/dim]

    The environment and .env set what the command line does not: WMTP_PRESET, WMTP_WORKDIR, … (docs/settings.md).
    """
