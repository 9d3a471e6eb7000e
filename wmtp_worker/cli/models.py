"""`wmtp models`: look at a model on the disk, and turn one layout into another."""

import json
from pathlib import Path
from typing import Annotated

import typer

from wmtp_worker.cli.options import Json
from wmtp_worker.cli.text import printable

app = typer.Typer(no_args_is_help=True, help="Models on this disk: what they are, and in another layout.")

Source = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A folder (Hugging Face, ours, Meta), a *.gguf file, or a run's final.pt or best_model.pt.",
    ),
]


@app.command()
def show(source: Source, as_json: Json = False) -> None:
    """Say what a model is: layout, shape, heads, dtype, size. Every tensor's name and shape is checked.

    wmtp models show work/models/smollm2

    wmtp models show 7B_1T_4 --json
    """
    from wmtp_worker.model.layouts import open_stored

    facts = open_stored(source).describe()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    _print(facts)


@app.command()
def convert(
    source: Source,
    destination: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that is not there yet.")],
    to: Annotated[
        str, typer.Option(metavar="hf|ours|meta", help="hf: a plain Llama, head 1 alone; ours, meta: every head.")
    ],
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the tokenizer is, if not beside the model.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model in another layout: the same weights, bit by bit, without holding them all in memory.

    wmtp models convert 7B_1T_4 work/models/7b_1t_4 --to ours

    wmtp models convert work/checkpoints/my-run/final.pt my-llama --to hf --tokenizer work/models/smollm2

    wmtp models convert work/models/mine 7B_mine --to meta
    """
    from rich.console import Console

    from wmtp_worker.assets.convert import convert as convert_model
    from wmtp_worker.errors import SettingsError
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.tracking.console import logging_to_console

    if to not in ("hf", "ours", "meta"):
        raise SettingsError(f"{to!r} is no layout to write", where="--to", fix="use hf, ours or meta")
    with logging_to_console("info", Console(stderr=True)):
        facts = convert_model(source, destination, to, tokenizer, STOP.check).describe()  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps({"folder": str(destination), **facts}))
        return
    typer.echo(printable(str(destination)))
    _print(facts)


def _print(facts: dict[str, object]) -> None:
    for name, value in facts.items():
        text = f"{value:,}" if type(value) is int else json.dumps(value) if isinstance(value, dict) else str(value)
        typer.echo(printable(f"{name.replace('_', ' '):20} {text}"))
