"""`wmtp train`: a whole run, from wherever its newest checkpoint left it."""

from typing import TYPE_CHECKING

from wmtp_worker.cli.options import Json, Preset, Recipe, Resume, RunName, Set

if TYPE_CHECKING:
    from rich.console import Console

    from wmtp_worker.settings import Settings
    from wmtp_worker.training.run import Summary


def train(
    recipe: Recipe = None,
    preset: Preset = None,
    run_name: RunName = None,
    resume: Resume = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Train a run to its end; the same command again goes on after an interruption.

    wmtp train --preset smoke

    wmtp train --recipe baseline --run-name first --set training.lr=5e-4

    wmtp train --run-name first --resume 150

    Ctrl-C and SIGTERM save and end with exit code 75: start the same command again. A second one ends at once.
    """
    import json
    import os
    import sys

    import typer
    from rich.console import Console

    from wmtp_worker.errors import Interrupted
    from wmtp_worker.host.processes import end_with_parent, run_processes
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.redact import redact
    from wmtp_worker.settings import load

    options = {"run.name": run_name, "run.resume": resume}
    settings = load(recipe=recipe, preset=preset, overrides=set_ or (), options=options)
    STOP.check()
    if "WORLD_SIZE" not in os.environ:
        count = _processes(settings)
        if count > 1:
            given = _as_options(recipe, preset, run_name, resume, set_, as_json)
            command = [sys.executable, "-m", "wmtp_worker", "train", *given]
            raise typer.Exit(
                run_processes(command, count, STOP, settings.parallel.restarts, on_restart=["--resume", "auto"])
            )
    end_with_parent()
    first = os.environ.get("RANK", "0") == "0"
    console = Console(stderr=True, quiet=not first)
    with console.status("loading torch"):
        from wmtp_worker.training.run import run
    try:
        summary = run(settings, STOP, console)
    except Interrupted as interruption:
        if first:
            raise
        raise typer.Exit(interruption.exit_code) from None  # the first one says why
    if summary is None:
        return
    if as_json:
        sys.stdout.write(redact(json.dumps(_as_json(summary))) + "\n")
    else:
        _print(summary, Console())


def _processes(settings: "Settings") -> int:
    """What `parallel.processes` means here."""
    import sys

    from wmtp_worker.host.processes import share_gpus, visible_gpus

    wanted, passes = settings.parallel.processes, settings.training.accumulation
    if wanted != "auto":
        return wanted
    gpus = visible_gpus() if settings.host.device in ("auto", "cuda") else 0
    count = share_gpus(gpus, passes, settings.parallel.shards)
    if count < gpus:
        sys.stderr.write(
            f"training on {count} of {gpus} GPUs, which share training.accumulation={passes} micro-batches of a step; "
            f"for all of them set a multiple of {gpus}, and training.micro_batch_size so that a step keeps its rows\n"
        )
    return count


def _as_options(
    recipe: str | None, preset: str | None, run_name: str | None, resume: str | None, set_: list[str] | None, json: bool
) -> list[str]:
    """The options that this command was called with."""
    options = {"--recipe": recipe, "--preset": preset, "--run-name": run_name, "--resume": resume}
    given = [text for name, value in options.items() if value is not None for text in (name, value)]
    return [*given, *(text for value in set_ or () for text in ("--set", value)), *(["--json"] if json else [])]


def _as_json(summary: "Summary") -> dict[str, object]:
    return {
        "run": summary.run,
        "step": summary.step,
        "steps_taken": summary.steps_taken,
        "resumed_from": summary.resumed_from,
        "tokens": summary.tokens,
        "seconds": round(summary.seconds, 3),
        "stopped_early": summary.stopped_early,
        "validation": summary.validation,
        "best": {"step": summary.best_step, "loss": summary.best_loss},
        "bucket": summary.bucket,
        "files": {name: str(path) for name, path in summary.files.items()},
    }


def _print(summary: "Summary", console: "Console") -> None:
    from rich.table import Table

    from wmtp_worker.redact import redact

    if summary.steps_taken:
        since = "from the start" if summary.resumed_from is None else f"resumed from step {summary.resumed_from}"
        did = f"took {summary.steps_taken} steps in {summary.seconds:.1f} s, {since}"
    else:
        did = "was finished already; --resume never starts it anew, --run-name NAME starts another"
    result = summary.validation
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("run", f"{summary.run}: step {summary.step}{' (stopped early)' if summary.stopped_early else ''}")
    table.add_row("this time", did)
    if "value_loss" in result:
        table.add_row("validation", f"value loss {result['value_loss']:.4f}, {result['pairs']} pairs")
        table.add_row("accuracy", f"{result['pairwise_accuracy']:.1%} of the pairs")
        judged = f"explained variance {result['explained_variance']:.3f}, of all tokens "
        table.add_row("judgement", f"{judged}{result['token_explained_variance']:.3f}")
        table.add_row("calibration", f"error {result['calibration']:.3f}")
    else:
        table.add_row("validation", f"loss {result['loss']:.4f}, perplexity of head 1 {result['perplexity']:.2f}")
        accuracies = enumerate(result["head_accuracy"], start=1)
        table.add_row("accuracy", ", ".join(f"head {head} {share:.1%}" for head, share in accuracies))
    table.add_row("best", f"loss {summary.best_loss:.4f} at step {summary.best_step}")
    if summary.bucket:
        table.add_row("safe in", redact(summary.bucket))
    console.print(table)
    console.print("look at", highlight=False)
    for name, path in summary.files.items():
        # never wrapped: paths are there to be copied
        console.print(f"  {name:12} {redact(str(path))}", soft_wrap=True, highlight=False, markup=False, emoji=False)
