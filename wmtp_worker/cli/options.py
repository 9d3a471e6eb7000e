"""The options that every command with settings shares."""

from typing import Annotated

import typer

Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE", help="What is trained: a recipe's name, or a .yaml file. [dim]Default: baseline.[/dim]"
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="How large: smoke, local-light, production, or a .yaml file. [dim]Default: local-light.[/dim]",
    ),
]
RunName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Name of the run and of its folders. [dim]Default: <recipe>-<preset>.[/dim]"),
]
Resume = Annotated[
    str | None,
    typer.Option(
        metavar="auto|never|STEP",
        help="Go on from the newest good checkpoint, start anew, or take one step. [dim]Default: auto.[/dim]",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set any setting, as training.lr=1e-4; may be repeated, the last wins.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
