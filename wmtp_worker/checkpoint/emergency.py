"""What to save in the time that is left: everything, only what is trained, or nothing more. A pure decision.

rates.wrote(bytes, seconds); rates.uploaded(bytes, seconds)      # of every save and upload, as they happen
plan = choose(step=…, saved_step=…, full_bytes=…, …)
log.warning("%s", plan)
"""

import threading
from dataclasses import dataclass
from typing import Literal

# bytes per second assumed until one was measured: a slow network disk, and a home's uplink
ASSUMED_WRITE = 100e6
ASSUMED_UPLOAD = 10e6
# a rate may fall when a machine is about to go, and what is not whole at the deadline is worth nothing
MARGIN = 1.5
# the snapshot, manifests, renames and the end of the process, whatever their size
FIXED_SECONDS = 2.0

Kind = Literal["full", "trainable", "skip"]


@dataclass(frozen=True)
class Plan:
    """`full`: a checkpoint to go on from. `trainable`: trained weights without optimizer state. `skip`: nothing new."""

    kind: Kind
    seconds_needed: float  # with margin, until all of it is where it counts; 0 for skip
    why: str
    reaches_bucket: bool  # whether there should be time to upload it

    def __str__(self) -> str:
        return f"emergency save: {self.kind}: {self.why}"


class Rates:
    """How fast this machine writes and uploads, in bytes per second, the newest counting most. Thread-safe.

    Bytes and seconds are summed and halved with each new observation, so a small file hardly moves the rate.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._write = self._upload = (0.0, 0.0)

    def wrote(self, size: int, seconds: float) -> None:
        """Count a write of `size` bytes, synced to the disk, that took `seconds`."""
        with self._lock:
            self._write = _fold(self._write, size, seconds)

    def uploaded(self, size: int, seconds: float) -> None:
        """Count an upload of `size` bytes that took `seconds`."""
        with self._lock:
            self._upload = _fold(self._upload, size, seconds)

    @property
    def write(self) -> float | None:
        """Bytes per second to the disk; None before the first write."""
        return _rate(self._write)

    @property
    def upload(self) -> float | None:
        """Bytes per second to the bucket; None before the first upload."""
        return _rate(self._upload)


def _fold(before: tuple[float, float], size: int, seconds: float) -> tuple[float, float]:
    if size <= 0 or seconds <= 0:
        return before
    return before[0] / 2 + size, before[1] / 2 + seconds


def _rate(sums: tuple[float, float]) -> float | None:
    size, seconds = sums
    return size / seconds if seconds > 0 else None


def choose(
    *,
    step: int,
    saved_step: int,
    full_bytes: int,
    trainable_bytes: int,
    write_rate: float | None,
    upload_rate: float | None,
    seconds_left: float | None,
    uploads: bool,
    must_upload: bool,
    unwritten_bytes: int = 0,
    queued_bytes: int = 0,
) -> Plan:
    """Decide what to save at `step`, when `saved_step` is the newest that is saved, or being saved, already.

    Sizes are in bytes, rates in bytes per second (None: assumed as above); `seconds_left` until the process may be
    ended (None: not known). `uploads`: whether there is a bucket. `must_upload`: whether the machine goes with its
    disk, so that only what is in the bucket counts. `unwritten_bytes` of an earlier save are written first,
    `queued_bytes` uploaded first.

    A write takes (unwritten + size)/rate, an upload (queue + size)/rate; what is needed is FIXED_SECONDS + MARGIN times
    their sum.
    """
    if step <= saved_step:
        return Plan("skip", 0.0, f"step {step} is saved already", uploads)

    def needs(size: int, upload: bool) -> float:
        seconds = (unwritten_bytes + size) / (write_rate or ASSUMED_WRITE)
        if upload:
            seconds += (queued_bytes + size) / (upload_rate or ASSUMED_UPLOAD)
        return FIXED_SECONDS + MARGIN * seconds

    counts = uploads and must_upload
    full, trainable = needs(full_bytes, counts), needs(trainable_bytes, counts)
    place = "written and uploaded" if counts else "written"
    if seconds_left is None:
        return Plan("full", full, f"no deadline is known; it takes about {full:.0f} s", uploads)
    left = f"of {seconds_left:.0f} s left"
    in_time = uploads and needs(full_bytes, True) <= seconds_left
    if full <= seconds_left:
        more = "" if in_time or not uploads else ", the upload may not end in time"
        return Plan("full", full, f"{place} in about {full:.0f} s {left}{more}", in_time)
    if trainable <= seconds_left:
        why = f"all of it would take {full:.0f} s, the trained weights alone about {trainable:.0f} s {left}"
        return Plan("trainable", trainable, why, uploads and needs(trainable_bytes, True) <= seconds_left)
    why = f"nothing can be {place} in time: even the trained weights would take {trainable:.0f} s {left}"
    # the disk may outlive the notice; not while an earlier save, which does count, is still being uploaded
    local = needs(full_bytes, False)
    if counts and not queued_bytes and local <= seconds_left:
        return Plan("full", local, f"{why}; written in about {local:.0f} s, in case the disk stays", False)
    return Plan("skip", 0.0, why, False)
