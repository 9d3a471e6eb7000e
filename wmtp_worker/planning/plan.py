"""The plan of a run: memory, time, money and saves, from settings and a device's figures."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from wmtp_worker.checkpoint.interval import choose
from wmtp_worker.errors import SettingsError
from wmtp_worker.host.device import set_threads
from wmtp_worker.host.limits import memory_limit
from wmtp_worker.planning.device import Device, find
from wmtp_worker.planning.fit import MACHINE, Fit, fit, least_devices, suggest_shards, usable
from wmtp_worker.planning.measure import measure, predict
from wmtp_worker.planning.memory import parts, recomputed_bytes, total
from wmtp_worker.planning.policy import Shape, policy_on_meta, value_on_meta
from wmtp_worker.planning.sizes import Sizes
from wmtp_worker.planning.work import link_bytes, step_bytes, token_flops
from wmtp_worker.settings import Settings
from wmtp_worker.settings.stages import value_run

CPU = "cpu"
# Model FLOPs utilisation that is assumed of a GPU, low and high. Tuned systems report 46 % (PaLM, 2022, on TPUs) and 38
# to 43 % (Llama 3, 2024, on H100s); torch without a compiler stays below.
MFU = (0.2, 0.4)
# assumed, as in benchmarks/saving.py: B/s over the bus to pinned memory, and to a local NVMe disk
_BUS, _DISK = 25e9, 2e9
_CALLS = 0.005  # seconds to queue the copies of a save
_SLOWER = 0.05  # of steps beside a save, as in benchmarks/fleet.py


@dataclass(frozen=True)
class Times:
    """Seconds of a step. The bounds are what no program beats; `expected`: low and high, and on what ground."""

    flops: int
    bytes: int
    link_bytes: int
    by_flops: float
    by_bandwidth: float
    by_link: float
    expected: tuple[float, float]
    basis: str


@dataclass(frozen=True)
class Saves:
    """Bytes of a checkpoint, seconds of a save; `host_memory`: for the copies that are written behind the training."""

    bytes: int
    frozen_bytes: int
    export_bytes: int
    host_memory: int
    copy_seconds: float
    write_seconds: float
    pause_seconds: float
    interval: str | None


@dataclass(frozen=True)
class Plan:
    """Everything there is to say, in bytes, seconds, FLOP and tokens; `to_json` is what machines read.

    `first`: the plan of the value model that is trained before; its hours and money are within this one's.
    """

    shape: Shape
    device: Device
    fit: Fit
    steps: int
    times: Times
    saves: Saves
    suggested: Fit
    least_devices: int | None
    money_per_hour: float | None
    notes: tuple[str, ...]
    first: "Plan | None" = None

    @property
    def tokens_per_step(self) -> int:
        """Positions of a step, padding included."""
        return self.fit.step.tokens * self.fit.passes * self.fit.devices

    @property
    def hours(self) -> tuple[float, float]:
        low, high = (seconds * self.steps / 3600 for seconds in self.times.expected)
        return (low, high) if self.first is None else (low + self.first.hours[0], high + self.first.hours[1])

    @property
    def money(self) -> tuple[float, float] | None:
        if self.money_per_hour is None:
            return None
        return self.hours[0] * self.money_per_hour, self.hours[1] * self.money_per_hour

    def to_json(self) -> dict[str, Any]:
        shape, step, fit, times = self.shape, self.fit.step, self.fit, self.times
        found, stacked = parts(shape, step), parts(shape, step, stacked=True)
        return {
            "model": {"parameters": shape.total.all, "trained": shape.total.trained, **_plain(shape)},
            "device": {**asdict(self.device), "count": fit.devices, "usable": usable(self.device)},
            "step": {
                "tokens": self.tokens_per_step,
                "sequence_length": step.time,
                "precision": step.precision,
                "micro_batch_size": step.rows,
                "accumulation": fit.passes,
                "sharding": fit.sharding,
                "shards": step.shards,
            },
            "memory": {
                "parts": [asdict(part) for part in found],
                "total": total(found),
                "stacked": {"parts": [asdict(part) for part in stacked], "total": total(stacked)},
                "trunk_if_recomputed": recomputed_bytes(shape, step),
            },
            "time": {
                **asdict(times),
                "expected": list(times.expected),
                "tokens_per_second": [self.tokens_per_step / seconds for seconds in times.expected],
            },
            "run": {
                "steps": self.steps,
                "tokens": self.steps * self.tokens_per_step,
                "hours": list(self.hours),
                "money": None if self.money is None else list(self.money),
            },
            "checkpoint": asdict(self.saves),
            "suggestion": {
                "micro_batch_size": self.suggested.step.rows,
                "accumulation": self.suggested.passes,
                "sharding": self.suggested.sharding,
                "shards": self.suggested.step.shards,
                "least_devices": self.least_devices,
            },
            "notes": list(self.notes),
            "value_model": None if self.first is None else self.first.to_json(),
        }


def make_plan(
    settings: Settings, gpu: str, gpus: int, price: float | None = None, poll: Callable[[], None] = lambda: None
) -> Plan:
    """The plan for `gpus` devices called `gpu` in the table; `cpu`: this machine, whose speeds are measured.

    Of both stages where a value model is trained first; with run.stage=value of that alone.
    `price`: of one GPU an hour; else `host.price_per_hour` counts, of the whole machine. Raises `SettingsError` where
    the run cannot fit, and `InputError` for a model that is not there. No weights are read. `poll` may raise to stop.
    """
    if gpu == CPU and gpus > 1:
        raise SettingsError("a CPU is planned for alone", where=f"--gpus {gpus}", fix="drop it, or name a --gpu")
    first = None
    if settings.trains_values:
        first = _make_plan(value_run(settings), gpu, gpus, price, poll)
        if settings.run.stage == "value":
            return first
    return _make_plan(settings, gpu, gpus, price, poll, first)


def _make_plan(
    settings: Settings, gpu: str, gpus: int, price: float | None, poll: Callable[[], None], first: Plan | None = None
) -> Plan:
    """Of one stage: run.stage=value is that of the value model."""
    model = value_on_meta(settings) if settings.run.stage == "value" else policy_on_meta(settings)
    shape = Shape.of(model)
    poll()
    if gpu == CPU:
        set_threads(settings.host.threads)
        device = _this_cpu()
    else:
        device = find(gpu, settings.training.precision, settings.sources["training.precision"])
    chosen = fit(settings, shape, device, gpus)
    if gpu == CPU:
        times, device = _measured(shape, chosen, device, poll)
    else:
        times = _bounded(shape, chosen, device)
    money = price * gpus if price is not None else settings.host.price_per_hour
    return Plan(
        shape=shape,
        device=device,
        fit=chosen,
        steps=settings.training.max_steps,
        times=times,
        saves=_saves(settings, model, chosen, device, times),
        suggested=suggest_shards(shape, chosen, device) or chosen,
        least_devices=None if gpu == CPU else least_devices(shape, chosen.step, device),
        money_per_hour=money,
        notes=tuple(_notes(settings, chosen)),
        first=first,
    )


def _this_cpu() -> Device:
    memory = memory_limit()
    if memory is None:
        raise SettingsError("nobody knows how much memory this machine has", where="--gpu cpu", fix="name a --gpu")
    name = f"this CPU with {torch.get_num_threads()} threads"
    return Device(CPU, name, memory, 0.0, 0.0, 0.0, "none", "measured here and now")


def _bounded(shape: Shape, fit: Fit, device: Device) -> Times:
    tokens = fit.step.tokens * fit.passes
    flops = token_flops(shape, fit.step) * tokens
    moved = step_bytes(shape, fit.step, fit.passes)
    sent = link_bytes(shape, fit.step, fit.passes)
    bounds = flops / device.flops, moved / device.bandwidth, sent / device.link
    low, high = (max(flops / device.flops / share, *bounds) for share in reversed(MFU))
    return Times(flops, moved, sent, *bounds, (low, high), f"MFU {MFU[0]:.0%} to {MFU[1]:.0%}, assumed")


def _measured(shape: Shape, fit: Fit, device: Device, poll: Callable[[], None]) -> tuple[Times, Device]:
    speeds = measure(shape, fit.step, poll=poll)
    seconds = predict(shape, fit.step, fit.passes, speeds)
    flops = token_flops(shape, fit.step) * fit.step.tokens * fit.passes
    moved = step_bytes(shape, fit.step, fit.passes)
    bounds = flops / speeds.products, moved / speeds.simple, 0.0
    basis = "speeds measured here: matrix products, attention, simple operations, loss"
    found = Device(**{**asdict(device), "flops": speeds.products, "bandwidth": speeds.simple, "link": speeds.simple})
    return Times(flops, moved, 0, *bounds, (seconds, seconds), basis), found


def _saves(settings: Settings, model: torch.nn.Module, fit: Fit, device: Device, times: Times) -> Saves:
    sizes = Sizes.of(model, settings.training.moments)
    size = sizes.checkpoint
    background = settings.checkpoint.background
    shards = fit.step.shards
    copy = size / shards / (device.bandwidth / 2 if device.key == CPU else _BUS)
    write = size / _DISK
    # until the optimizer's step, nothing that is copied changes
    pause = _CALLS + max(0.0, copy - times.expected[0]) if background else write
    per_day, interval = settings.checkpoint.interruptions_per_day, None
    if per_day is not None:
        cost = pause + (_SLOWER * write if background else 0.0)
        interval = str(choose(cost, write, per_day, times.expected[0]))
    host = settings.checkpoint.buffers * size + sizes.export if background else 0
    return Saves(size, sizes.frozen, sizes.export, host, copy, write, pause, interval)


def _notes(settings: Settings, fit: Fit) -> list[str]:
    notes = ["hours are of the steps alone: no validation, set-up, saves or interruptions; tokens count padding"]
    weighting, value = settings.weighting, settings.run.stage == "value"
    if settings.trains_values and not value:
        notes.append(
            "the value model is in the hours with all its steps, though it may stop early or be trained already"
        )
    frozen = (settings.trains_values or weighting.critic.value) and not weighting.learns_values
    if not value and (weighting.needs_reference or weighting.needs_reward_model or frozen):
        notes.append("what frozen models say of the data is computed before the training, and is not in these figures")
    memory = settings.training.precision == "fp32" and fit.step.cuda
    if memory:
        notes.append("training.precision=fp32 leaves the tensor cores idle; bf16 is many times faster")
    if fit.devices > MACHINE:
        notes.append(
            f"{fit.devices} GPUs are more than one machine, as a rule of {MACHINE}: between machines it is the network "
            "that sends, slower than the link in these figures"
        )
    return notes


def _plain(shape: Shape) -> dict[str, int | bool]:
    return {
        "layers": shape.layers,
        "heads": shape.heads,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "attention_heads": shape.attention_heads,
        "vocabulary": shape.vocabulary,
        "tied": shape.tied,
    }
