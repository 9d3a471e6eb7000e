"""`wmtp evaluate`: validation numbers of a trained run."""

import json
from dataclasses import fields
from typing import Annotated

import typer

from wmtp_worker.cli.options import Json, Preset, Recipe, Set


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")],
    weights: Annotated[
        str,
        typer.Option(metavar="final|best|STEP", help="Which weights: the final, the best, or a checkpoint's."),
    ] = "final",
    recipe: Recipe = None,
    preset: Preset = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Measure validation loss, perplexity and per-head accuracy of a run's weights.

    The data is what the settings given here name, not what the run was trained on.

    wmtp evaluate baseline-smoke --preset smoke

    wmtp evaluate first --weights best --set data.dataset=mbpp --json
    """
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.redact import redact
    from wmtp_worker.settings import load

    settings = load(recipe=recipe, preset=preset, overrides=set_ or (), options={"run.name": run, "run.resume": "auto"})
    STOP.check()
    from wmtp_worker.training.evaluate import evaluate_run

    result = evaluate_run(settings, weights, STOP)
    if as_json:
        typer.echo(redact(json.dumps(result)))
        return
    typer.echo(f"weights  {result['weights']} of {run}, step {result['step']}")
    if "value_loss" in result:
        from wmtp_worker.training.values import ValueReport

        typer.echo(redact(f"data     {result['dataset']}: {result['samples']} samples, {result['pairs']} pairs"))
        typer.echo(str(ValueReport(**{field.name: result[field.name] for field in fields(ValueReport)})))
        return
    typer.echo(redact(f"data     {result['dataset']}: {result['samples']} samples, {result['tokens']:,} tokens"))
    typer.echo(f"loss     {result['loss']:.4f}, perplexity of head 1 {result['perplexity']:.2f}")
    for head, (loss, share) in enumerate(zip(result["head_loss"], result["head_accuracy"], strict=True), start=1):
        typer.echo(f"head {head}: loss {loss:.4f}  accuracy {share:.1%}")
