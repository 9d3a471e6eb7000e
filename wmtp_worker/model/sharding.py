"""How processes share a run: whose micro-batches are whose, and how many hold one copy of the model together."""

from wmtp_worker.errors import SettingsError
from wmtp_worker.settings import Settings

WEIGHT = GRADIENT = 4  # bytes of a number, fp32
# the rest is for activations, and a head's logits
_SHARE_OF_DEVICE = 0.6


def check_ranks(settings: Settings, world: int) -> None:
    """Raise `SettingsError` unless `world` ranks can share the micro-batches of a step, and the model, evenly."""
    passes = settings.training.accumulation
    if passes % world:
        raise SettingsError(
            f"training.accumulation={passes} micro-batches cannot be shared by {world} processes",
            where=settings.sources.get("training.accumulation", "settings"),
            fix=f"set training.accumulation={-(-passes // world) * world}, and training.micro_batch_size so that a "
            "step has the rows it should have",
        )

    shards = settings.parallel.shards
    if shards != "auto" and world > 1 and world % shards:
        raise SettingsError(
            f"{world} processes cannot hold copies of {shards} shards each",
            where=settings.sources.get("parallel.shards", "settings"),
            fix=f"set parallel.shards to auto, 1, {world} or another number that divides {world}",
        )


def choose_shards(settings: Settings, world: int, needed: int, memory: int | None) -> int:
    """How many of `world` ranks hold one copy of the model: `parallel.shards`, or what the GPUs' memory asks for.

    `needed`: `training_bytes`. `memory`: bytes of each GPU, None where there are none.
    """
    wanted = settings.parallel.shards
    if world == 1:
        return 1
    if wanted != "auto":
        return wanted
    return 1 if memory is None or needed < _SHARE_OF_DEVICE * memory else world


def training_bytes(parameters: int, trained: int, moments: int) -> int:
    """What a whole copy takes on each rank: weights, gradients twice (once on their way), moments.

    `moments`: bytes of a parameter's two.
    """
    return parameters * WEIGHT + trained * (2 * GRADIENT + moments)
