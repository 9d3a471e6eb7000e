"""How the rows of a step are shared out, and whether they fit: the micro-batch, the accumulation, the sharding."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from wmtp_worker.checkpoint.optimizer import moment_bytes
from wmtp_worker.errors import SettingsError
from wmtp_worker.model.sharding import check_ranks, choose_shards, training_bytes
from wmtp_worker.planning.device import GIB, Device, find, table
from wmtp_worker.planning.memory import Step, parts, total
from wmtp_worker.planning.policy import Shape
from wmtp_worker.settings import Settings

# the allocator's fragments, and what the driver keeps for itself
USABLE = 0.92
MOST_DEVICES = 1024
MACHINE = 8  # GPUs that are linked with each other, as machines are rented
# of the memory on a GPU's sheet, what its driver reports: the trainer's rule for `parallel.shards` looks at that
_REPORTED = 0.98
_RANK = 16  # of the adapters that are proposed


@dataclass(frozen=True)
class Fit:
    """One way to take a step's rows: `passes` micro-batches of `step.rows` on each of `devices`."""

    step: Step
    passes: int

    @property
    def devices(self) -> int:
        return self.step.shards * self.step.copies

    @property
    def sharding(self) -> str:
        if self.devices == 1:
            return "none"
        if self.step.shards == 1:
            return "replicated"
        return "full" if self.step.copies == 1 else "hybrid"


def usable(device: Device) -> int:
    """Bytes of a device's memory that a plan counts on."""
    return int(device.memory * USABLE)


def fits(shape: Shape, step: Step, device: Device) -> bool:
    return total(parts(shape, step)) <= usable(device)


def fit(settings: Settings, shape: Shape, device: Device, devices: int) -> Fit:
    """The step of the settings on so many devices, shared out as `wmtp train` does it: with run.stage=value, the value
    model's.

    Raises `SettingsError` where the devices cannot share the step, and where it does not fit, with what would.
    """
    check_ranks(settings, devices)
    training, count = settings.training, shape.total
    moments, cuda = moment_bytes(training.moments), device.key != "cpu"
    needed = training_bytes(count.all, count.trained, moments)
    shards = choose_shards(settings, devices, needed, int(device.memory * _REPORTED) if cuda else None)
    step = Step(training.micro_batch_size, settings.data.sequence_length, training.precision, cuda=cuda)
    step = replace(step, shards=shards, copies=devices // shards, moments=moments)
    step = replace(step, recompute=training.checkpoint_activations == "full")
    if settings.run.stage == "value":
        step = replace(step, sides=2 if settings.value.objective == "pairwise" else 1)
    elif settings.weighting.looks_at_losses:
        step = replace(step, looked_at=settings.weighting.weighed_share)
    passes = training.accumulation // devices
    if fits(shape, step, device):
        return Fit(step, passes)
    if not fits(shape, replace(step, rows=1), device):
        raise _too_large(settings, shape, replace(step, rows=1), device)
    raise _too_many(settings, shape, step, passes, device)


def suggest(shape: Shape, step: Step, rows: int, device: Device) -> Fit | None:
    """The largest micro-batch that fits and divides a device's `rows`, None where not even one row does."""
    for size in _divisors(rows):
        if fits(shape, candidate := replace(step, rows=size), device):
            return Fit(candidate, rows // size)
    return None


def suggest_shards(shape: Shape, chosen: Fit, device: Device) -> Fit | None:
    """`suggest` with the sharding of which the micro-batch is the largest, with the fewest shards where several are.

    One copy a device, one a machine, or one in all. None where nothing fits.
    """
    rows, devices = chosen.step.rows * chosen.passes, chosen.devices
    ways = {1, MACHINE, devices} if devices % MACHINE == 0 else {1, devices}
    steps = [replace(chosen.step, shards=shards, copies=devices // shards) for shards in sorted(ways)]
    found = [fit for step in steps if (fit := suggest(shape, step, rows, device))]
    return max(found, key=lambda fit: fit.step.rows, default=None)


def least_devices(shape: Shape, step: Step, device: Device) -> int | None:
    """The fewest such devices on which one row fits, sharded where it must be; None where no number is enough."""
    counts = (n for n in range(1, MOST_DEVICES + 1) if _in_shards(shape, step, device, n))
    return next(counts, None)


def _in_shards(shape: Shape, step: Step, device: Device, shards: int) -> bool:
    return fits(shape, replace(step, rows=1, shards=shards, copies=1), device)


def _with_less(shape: Shape, step: Step, device: Device) -> list[str]:
    """What makes the step smaller where it is."""
    if not step.recompute and fits(shape, replace(step, recompute=True), device):
        return ["set training.checkpoint_activations=full"]
    return []


def _too_many(settings: Settings, shape: Shape, step: Step, passes: int, device: Device) -> SettingsError:
    value, key = settings.run.stage == "value", "training.micro_batch_size"
    rows = step.rows if value else step.rows * passes
    smaller = suggest(shape, step, rows, device)
    assert smaller is not None  # one row fits
    less = f"{key}={smaller.step.rows} training.accumulation={smaller.passes * step.shards * step.copies}"
    way = f"set {less}, which makes the same step"
    if value:  # the accumulation is the policy's, too
        way = f"set value.micro_batch_size={smaller.step.rows}, which makes smaller steps of the value model"
        key = key if settings.value.micro_batch_size is None else "value.micro_batch_size"
    return SettingsError(
        f"{_rows(settings, step)} need {_gib(shape, step)} of memory, "
        f"{device.name} has {usable(device) / GIB:.1f} GiB to use",
        where=settings.sources[key],
        fix="; or ".join([way, *_with_less(shape, step, device)]),
    )


def _rows(settings: Settings, step: Step) -> str:
    rows = step.sides * step.rows
    of = " of the value model" if settings.run.stage == "value" else ""
    return f"{'one row' if rows == 1 else f'{rows} rows'} of {step.time} tokens{of}"


def _too_large(settings: Settings, shape: Shape, step: Step, device: Device) -> SettingsError:
    ways = _with_less(shape, step, device)
    devices = step.shards * step.copies
    if device.key != "cpu":
        least = least_devices(shape, step, device)
        if least is not None and step.copies > 1 and least <= devices:
            ways.append(f"shard it over all (parallel.shards={devices})")
        elif least is not None:
            among = _sharing(settings, least)
            chosen = "" if settings.parallel.shards == "auto" else f" parallel.shards={among}"
            ways.append(f"shard it over {least} or more (--gpus {among}{chosen})")
        alone = replace(step, shards=1, copies=1)
        larger = [key for key, gpu in table().items() if gpu.memory * GIB > device.memory]
        larger = [key for key in larger if _fits_on(shape, alone, key)]
        ways += [f"take a larger one ({', '.join(larger)})"] if larger else []
    if not shape.lora and fits(shape.with_adapters(_RANK), step, device):
        key = "value.lora_rank" if settings.run.stage == "value" else "lora.rank"
        ways.append(f"train adapters only ({key}={_RANK})")
    ways.append("shorten data.sequence_length")
    other = settings.run.stage == "value" and settings.value.backbone
    where = settings.sources["model.path"] if settings.model.path else "the model's shape"
    where = settings.sources["value.backbone"] if other else where
    shared = f", shared by {step.shards}," if step.shards > 1 else ""
    return SettingsError(
        f"{_rows(settings, step)} need{'s' if step.sides == 1 else ''} {_gib(shape, step)} of memory{shared} and "
        f"{device.name} has {usable(device) / GIB:.1f} GiB to use",
        where=where,
        fix="; or ".join(ways),
    )


def _sharing(settings: Settings, least: int) -> int:
    """So many devices or a few more, that can share the micro-batches of a step."""
    passes = settings.training.accumulation
    return next((number for number in range(least, passes + 1) if passes % number == 0), least)


def _fits_on(shape: Shape, step: Step, key: str) -> bool:
    if step.precision == "bf16" and table()[key].bf16 is None:
        return False
    return fits(shape, step, find(key, step.precision, ""))


def _gib(shape: Shape, step: Step) -> str:
    return f"{total(parts(shape, step)) / GIB:.1f} GiB"


def _divisors(number: int) -> Iterator[int]:
    """Largest first."""
    return (size for size in range(number, 0, -1) if number % size == 0)
