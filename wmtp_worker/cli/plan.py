"""`wmtp plan`: what a run will need and cost, before a machine is rented."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from wmtp_worker.cli.options import Json, Preset, Recipe, Set

if TYPE_CHECKING:
    from wmtp_worker.planning.plan import Plan


_PIPE = 160  # columns where nobody wraps lines


def plan(
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="A GPU of the table, as h100-sxm; cpu measures this machine.")
    ] = "cpu",
    gpus: Annotated[int, typer.Option(metavar="N", min=1, max=1024, help="How many of them share each step.")] = 1,
    price: Annotated[
        float | None,
        typer.Option(
            metavar="AMOUNT", min=0, help="What one GPU costs an hour. [dim]Default: host.price_per_hour for all.[/dim]"
        ),
    ] = None,
    recipe: Recipe = None,
    preset: Preset = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Say what a run will need and cost: memory by part, step time, hours, money, checkpoints. Nothing is trained.

    Ends with exit code 78 where it cannot fit, and says what would.

    wmtp plan --preset smoke

    wmtp plan --preset production --set model.path=./7b --gpu h100-sxm --gpus 8 --price 2.50

    Of a model on the disk only config.json is read.
    """
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.redact import redact
    from wmtp_worker.settings import load

    settings = load(recipe=recipe, preset=preset, overrides=set_ or ())
    STOP.check()
    from wmtp_worker.planning.plan import make_plan

    made = make_plan(settings, gpu, gpus, price, STOP.check)
    if as_json:
        typer.echo(redact(json.dumps(made.to_json(), indent=1)))
    else:
        _show(made)


def _show(made: "Plan") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from wmtp_worker.planning.memory import parts, total

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE
    found, stacked = (parts(made.shape, made.fit.step, stacked=stacked) for stacked in (False, True))
    memory = Table("memory of one device, GiB", box=None, pad_edge=False)
    for name in ("as it is", "stacked logits"):
        memory.add_column(name, justify="right")
    memory.add_column("how")
    for part, other in zip(found, stacked, strict=True):
        memory.add_row(part.name, _gib(part.bytes), _gib(other.bytes), part.formula)
    share = f"{total(found) / made.device.memory:.0%} of {_gib(made.device.memory)}"
    memory.add_row("total", _gib(total(found)), _gib(total(stacked)), share, style="bold")
    console.print(memory)
    console.print()
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, text in _facts(made):
        facts.add_row(name, escape(text))
    console.print(facts)
    for note in made.notes:
        console.print(f"note: {escape(note)}")


def _facts(made: "Plan") -> Iterator[tuple[str, str]]:
    from wmtp_worker.checkpoint.interval import spell
    from wmtp_worker.planning.fit import usable
    from wmtp_worker.planning.memory import recomputed_bytes

    shape, fit, device, times, saves = made.shape, made.fit, made.device, made.times, made.saves
    sizes = f"{shape.total.all / 1e9:,.3f} B parameters, {shape.total.trained / 1e9:,.3f} B trained"
    yield ("model", f"{sizes}, {shape.heads} heads") if shape.heads else ("value model", sizes)
    if made.first is not None:
        yield "value model", _first(made.first)
    count = f"{fit.devices} × " if fit.devices > 1 else ""
    yield (
        "device",
        f"{count}{device.name}: {_gib(usable(device))} GiB to use, {device.flops / 1e12:,.4g} TFLOP/s in "
        f"{fit.step.precision}, {device.bandwidth / 1e9:,.4g} GB/s",
    )
    yield "figures", device.source
    yield (
        "step",
        f"{made.tokens_per_step:,} tokens: micro-batch {fit.step.rows} × accumulation {fit.passes}"
        f"{f' on each of {fit.devices}' if fit.devices > 1 else ''}, sharding {fit.sharding}"
        f"{f', {fit.step.copies} copies in {fit.step.shards} shards' if fit.sharding == 'hybrid' else ''}",
    )
    yield (
        "at least",
        f"{spell(times.by_flops)} by {times.flops:.3g} FLOP, {spell(times.by_bandwidth)} by "
        f"{times.bytes / 1e9:,.3g} GB of memory traffic"
        + (
            f", {spell(times.by_link)} by {times.link_bytes / 1e9:,.3g} GB over {device.link_name}"
            if times.link_bytes
            else ""
        ),
    )
    yield "a step takes", f"{_range(times.expected, spell)} ({times.basis})"
    yield (
        "tokens/s",
        _range([made.tokens_per_step / seconds for seconds in reversed(times.expected)], lambda v: f"{v:,.0f}"),
    )
    yield (
        "the run",
        f"{made.steps:,} steps, {made.steps * made.tokens_per_step / 1e9:,.3g} B tokens: "
        f"{_range(made.hours, lambda v: f'{v:,.3g}')} hours{'' if made.first is None else ', with the value model'}",
    )
    if made.money is not None:
        yield "money", _range(made.money, lambda v: f"{v:,.2f}")
    frozen = f", {_gb(saves.frozen_bytes)} of frozen weights once a run" if saves.frozen_bytes else ""
    yield "checkpoint", f"{_gb(saves.bytes)}{frozen}; {_gb(saves.host_memory)} of host memory for copies"
    yield (
        "a save",
        f"stops the loop for {spell(saves.pause_seconds)} (copied in {spell(saves.copy_seconds)}, written in "
        f"{spell(saves.write_seconds)}: assumed)",
    )
    if saves.interval:
        yield "save", saves.interval
    best, section = made.suggested, "training" if shape.heads else "value"
    yield (
        "suggested",
        f"{section}.micro_batch_size={best.step.rows} training.accumulation={best.passes * best.devices}"
        + (f" parallel.shards={best.step.shards}" if best.devices > 1 else "")
        + ("" if made.least_devices is None else f"; fits from {made.least_devices} on"),
    )
    if not fit.step.recompute:
        kept = _gib(recomputed_bytes(shape, fit.step))
        yield "recomputing", f"training.checkpoint_activations=full: the trunk's layers would keep {kept} GiB"


def _first(made: "Plan") -> str:
    from wmtp_worker.checkpoint.interval import spell
    from wmtp_worker.planning.memory import parts, total

    return (
        f"trained first: {made.shape.total.trained / 1e9:,.3f} of {made.shape.total.all / 1e9:,.3f} B parameters, "
        f"{_gib(total(parts(made.shape, made.fit.step)))} GiB; "
        f"{made.steps:,} steps of {made.tokens_per_step:,} tokens, "
        f"{_range(made.times.expected, spell)} each: {_range(made.hours, lambda v: f'{v:,.3g}')} hours"
    )


def _range(values: Sequence[float], spelled: Callable[[float], str]) -> str:
    low, high = (spelled(value) for value in values)
    return low if low == high else f"{low} to {high}"


def _gib(size: int) -> str:
    return f"{size / (1 << 30):,.2f}"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.3g} GB"
