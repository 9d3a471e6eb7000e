"""What every single transfer needs: the store, the limits, the journal, the threads."""

from dataclasses import dataclass, field

from wmtp_worker.errors import AccessDenied, ExhaustedError, Interrupted, TransientError
from wmtp_worker.storage.objects import ObjectStore
from wmtp_worker.storage.transfer.journal import Journal
from wmtp_worker.storage.transfer.limits import Bandwidth, MemoryBudget
from wmtp_worker.storage.transfer.pool import Pool, Stopped
from wmtp_worker.storage.transfer.progress import Progress


@dataclass(frozen=True)
class Means:
    """Shared by all transfers of one `Transfer`. `part_size` is also the largest file that goes in one request."""

    store: ObjectStore
    journal: Journal
    memory: MemoryBudget
    bandwidth: Bandwidth
    progress: Progress
    requests: Pool
    part_size: int


@dataclass
class Sent:
    """Bytes that travelled, noted by many threads."""

    pieces: list[int] = field(default_factory=list)

    def add(self, size: int) -> None:
        self.pieces.append(size)

    @property
    def total(self) -> int:
        return sum(self.pieces)


def can_go_on(error: BaseException) -> bool:
    """Whether what was done so far serves the next attempt: an interruption, a lost network, expired credentials."""
    if isinstance(error, Stopped):
        error = error.reason
    return not isinstance(error, Exception) or isinstance(
        error, Interrupted | TransientError | ExhaustedError | AccessDenied
    )
