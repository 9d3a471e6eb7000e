"""What the ranks that are not the first have in the place of what one alone may do.

They have no heartbeat file, no bucket and no ledger either: `Heartbeat`, `RunBucket` and `Ledger` can do without.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wmtp_worker.checkpoint.snapshot import Snapshot
from wmtp_worker.checkpoint.tensorfile import Tensors
from wmtp_worker.host.stop import StopRequest


class NoMetrics:
    """Of `tracking.metrics.MetricsLog`."""

    size = 0

    def write(self, kind: str, step: int, **values: Any) -> None: ...

    def sync(self) -> None: ...


class NoTracking:
    """Of `tracking.session.Tracking`."""

    run_id = None

    def mark(self, status: str) -> None: ...


class NoSaving:
    """Of `training.saving.Saving`, for ranks that hold what the first one saves."""

    def prepare(self, tensors: Mapping[str, Tensors], exported: Tensors, to_come: int) -> None: ...

    def due(self, step: int, saved_at: int) -> bool:
        return False

    def save(self, take: Callable[[], Snapshot]) -> None: ...

    def export(self, path: Path, step: int, tensors: Tensors, facts: Mapping[str, Any]) -> None: ...

    def gate(self) -> None: ...

    def stepped(self, seconds: float) -> None: ...

    def finish(self) -> None: ...

    def make_room(self) -> None: ...

    def emergency(self, snapshot: Callable[[], Snapshot], step: int, saved_at: int, stop: StopRequest) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
