"""What all checks look at, and what earlier ones have measured for later ones."""

import functools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp_worker.host.limits import ROOT
from wmtp_worker.host.where import Host, here
from wmtp_worker.settings import Settings

if TYPE_CHECKING:
    from wmtp_worker.planning.sizes import Sizes


@dataclass
class Case:
    """One run on one machine. Rates are in bytes per second, None where nothing was measured."""

    settings: Settings
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    root: Path = ROOT
    write_rate: float | None = None  # to the work directory, synced
    upload_rate: float | None = None  # to the bucket, by one stream
    skew: tuple[float, str] | None = None  # seconds by which our clock is ahead, and of whose

    @functools.cached_property
    def host(self) -> Host:
        return here(self.environ, self.root)

    @functools.cached_property
    def sizes(self) -> "Sizes":
        """What the run saves. Raises `InputError` where the model is not here (yet)."""
        from wmtp_worker.planning.sizes import sizes_of

        return sizes_of(self.settings)

    def saw_clock(self, theirs: float, whose: str) -> None:
        """Note the time (seconds since the epoch) of somebody whose clock is right; the first one counts."""
        if self.skew is None:
            self.skew = time.time() - theirs, whose
