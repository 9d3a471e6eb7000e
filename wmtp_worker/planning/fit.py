"""How the rows of a step are shared out, and whether they fit: the micro-batch, the accumulation, the sharding."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from wmtp_worker.errors import SettingsError
from wmtp_worker.planning.device import GIB, Device, find, table
from wmtp_worker.planning.memory import Step, parts, total
from wmtp_worker.planning.policy import Shape
from wmtp_worker.settings import Settings

# the allocator's fragments, and what the driver keeps for itself
USABLE = 0.92
MOST_DEVICES = 1024
_RANK = 16  # of the adapters that are proposed


@dataclass(frozen=True)
class Fit:
    """One way to take a step's rows: `passes` micro-batches of `step.rows` on each of `devices`."""

    step: Step
    passes: int
    devices: int

    @property
    def sharding(self) -> str:
        if self.devices == 1:
            return "none"
        return "full" if self.step.shards > 1 else "replicated"


def usable(device: Device) -> int:
    """Bytes of a device's memory that a plan counts on."""
    return int(device.memory * USABLE)


def fits(shape: Shape, step: Step, device: Device) -> bool:
    return total(parts(shape, step)) <= usable(device)


def fit(settings: Settings, shape: Shape, device: Device, devices: int) -> Fit:
    """The step of the settings on so many devices, each with a whole copy if that fits, else with its share of one.

    Raises `SettingsError` where the rows cannot be shared out evenly, and where they do not fit, with what would.
    """
    training = settings.training
    rows = training.micro_batch_size * training.accumulation
    if rows % devices:
        raise SettingsError(
            f"{rows} rows of a step cannot be shared out evenly among {devices} GPUs",
            where=settings.sources["training.accumulation"],
            fix=f"set training.accumulation={_multiple(training.accumulation, training.micro_batch_size, devices)}",
        )
    rows //= devices
    wanted = next(size for size in _divisors(rows) if size <= training.micro_batch_size)
    step = Step(wanted, settings.data.sequence_length, training.precision, cuda=device.key != "cpu")
    step = replace(step, recompute=training.checkpoint_activations == "full")
    for shards in dict.fromkeys((1, devices)):
        if fits(shape, replace(step, shards=shards), device):
            return Fit(replace(step, shards=shards), rows // wanted, devices)
    if (smaller := suggest(shape, replace(step, shards=devices), rows, device, devices)) is not None:
        raise SettingsError(
            f"{wanted} rows of {step.time} tokens need {_gib(shape, replace(step, shards=devices))} of memory, "
            f"{device.name} has {usable(device) / GIB:.1f} GiB to use",
            where=settings.sources["training.micro_batch_size"],
            fix=f"set training.micro_batch_size={smaller.step.rows} training.accumulation="
            f"{smaller.passes * devices}, which makes the same step",
        )
    raise _too_large(settings, shape, replace(step, rows=1, shards=devices), device)


def suggest(shape: Shape, step: Step, rows: int, device: Device, devices: int) -> Fit | None:
    """The largest micro-batch that fits and divides a device's `rows`, None where not even one row does."""
    for size in _divisors(rows):
        if fits(shape, candidate := replace(step, rows=size), device):
            return Fit(candidate, rows // size, devices)
    return None


def least_devices(shape: Shape, step: Step, device: Device) -> int | None:
    """The fewest such devices on which one row fits, sharded where it must be; None where no number is enough."""
    counts = (n for n in range(1, MOST_DEVICES + 1) if fits(shape, replace(step, rows=1, shards=n), device))
    return next(counts, None)


def _too_large(settings: Settings, shape: Shape, step: Step, device: Device) -> SettingsError:
    ways = []
    if device.key != "cpu":
        if (least := least_devices(shape, step, device)) is not None:
            ways.append(f"shard it over {least} or more (--gpus {least})")
        alone = replace(step, shards=1)
        larger = [key for key in table() if _fits_on(shape, alone, key)]
        ways += [f"take a larger one ({', '.join(larger)})"] if larger else []
    if not shape.lora and fits(shape.with_adapters(_RANK), step, device):
        ways.append(f"train adapters only (lora.rank={_RANK})")
    ways.append("shorten data.sequence_length")
    where = settings.sources["model.path"] if settings.model.path else "the model's shape"
    among = f", shared by {step.shards}," if step.shards > 1 else ""
    return SettingsError(
        f"one row of {step.time} tokens needs {_gib(shape, step)} of memory{among} and {device.name} has "
        f"{usable(device) / GIB:.1f} GiB to use",
        where=where,
        fix="; or ".join(ways),
    )


def _fits_on(shape: Shape, step: Step, key: str) -> bool:
    if step.precision == "bf16" and table()[key].bf16 is None:
        return False
    return fits(shape, step, find(key, step.precision, ""))


def _gib(shape: Shape, step: Step) -> str:
    return f"{total(parts(shape, step)) / GIB:.1f} GiB"


def _divisors(number: int) -> Iterator[int]:
    """Largest first."""
    return (size for size in range(number, 0, -1) if number % size == 0)


def _multiple(accumulation: int, rows: int, devices: int) -> int:
    while accumulation * rows % devices:
        accumulation += 1
    return accumulation
