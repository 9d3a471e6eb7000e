"""The GPUs that are known, by their makers' public figures."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field

from wmtp_worker.errors import SettingsError
from wmtp_worker.settings.values import nearest

GIB = 1 << 30
Figure = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]


class Gpu(BaseModel):
    """One line of the table: GiB of memory, dense TFLOP/s, GB/s; `bf16` is None where the hardware has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Text
    memory: Figure
    bf16: Figure | None
    fp32: Figure
    bandwidth: Figure
    link: Figure
    link_name: Text
    source: Text
    url: Annotated[str, Field(pattern=r"^https://")]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    read: Text
    gpus: Mapping[str, Gpu]


@dataclass(frozen=True)
class Device:
    """What the formulas need of a device.

    `memory`: bytes; `flops`: FLOP/s in the precision of the run; `bandwidth`, `link`: B/s of the memory, and of the way
    to the devices beside it, one direction. `peak`: whether these are its maker's peaks, that no program reaches, or
    were measured, here and now.
    """

    key: str
    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    link_name: str
    source: str
    peak: bool = True


@cache
def table() -> Mapping[str, Gpu]:
    """Every GPU of `gpus.yaml` by its key."""
    text = (files("wmtp_worker") / "planning" / "gpus.yaml").read_text(encoding="utf-8")
    return _Table.model_validate(yaml.safe_load(text)).gpus


def find(key: str, precision: str, where: str) -> Device:
    """The GPU of this key. Raises `SettingsError` for one that is not known, and for bf16 that it has not.

    `where`: what set the precision.
    """
    known = table()
    if key not in known:
        near = nearest(key, tuple(known))
        fix = f"did you mean {near}? " if near else ""
        raise SettingsError(
            f"no figures of a GPU {key!r}", where=f"--gpu {key}", fix=f"{fix}choose cpu or one of {', '.join(known)}"
        )
    gpu = known[key]
    peak = gpu.bf16 if precision == "bf16" else gpu.fp32
    if peak is None:
        raise SettingsError(
            f"{gpu.name} has no bf16 in hardware", where=where, fix="set training.precision=fp32, or take another GPU"
        )
    return Device(
        key=key,
        name=gpu.name,
        memory=round(gpu.memory * GIB),
        flops=peak * 1e12,
        bandwidth=gpu.bandwidth * 1e9,
        link=gpu.link * 1e9 / 2,
        link_name=gpu.link_name,
        source=f"{gpu.source}, {gpu.url}",
    )
