"""Every error this worker raises on purpose, and the exit code each one ends the process with.

    WorkerError          70
    ├── SettingsError    78   settings, variables or credentials are wrong
    ├── InputError       78   data or model files, or a checkpoint that does not fit
    ├── CheckpointError  78   a damaged checkpoint, or one of a newer format
    ├── DiskFullError    78   no room left to write
    ├── TrainingDiverged 78   the loss is NaN or infinite
    ├── RunHeldError     79   another worker holds this run
    ├── Interrupted      75   stopped from outside; what was done is saved
    ├── HostError        75   what the host's own API, or the way to it, would not do
    ├── NotSafeError     74   finished, but some work is not in the bucket yet
    └── StorageError     75   what a bucket, or the way to it, would not do
        ├── ObjectNotFound      78   there is no such object, in a bucket that is there
        ├── BucketNotFound      78   there is no such bucket: never taken for an empty one
        ├── AccessDenied        78   credentials are missing, wrong, expired or not enough
        ├── PreconditionFailed  75   somebody else changed the object first
        ├── TransientError      75   a time-out, a lost connection, a busy server: may work if tried again
        ├── ExhaustedError      75   was tried again and again, and did not work
        └── IntegrityError      78   the bytes are not those whose digest was recorded

An error says three things: what is wrong, where that came from, and what to do about it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

DONE = 0
BUG = 70
NOT_SAFE = 74
AGAIN = 75
WRONG = 78
HELD = 79

EXIT_CODES: Mapping[int, str] = MappingProxyType(
    {
        DONE: "done",
        BUG: "a bug",
        NOT_SAFE: "finished, but some work is not safe in the bucket yet",
        AGAIN: "saved, start me again",
        WRONG: "settings, credentials or input are wrong, do not restart",
        HELD: "another worker holds this run",
    }
)

# after these the same command goes on, or publishes what is missing; after any other it would end the same way again
RESTARTED: frozenset[int] = frozenset({NOT_SAFE, AGAIN})


class WorkerError(Exception):
    """What is wrong, where it came from and how to put it right; ends the process with `exit_code`."""

    exit_code: ClassVar[int] = BUG

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        what = printable(what)  # may be a server's own words
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        return sentence(self.what, self.where, self.fix)

    def __reduce__(self) -> tuple[object, ...]:
        # the default would forget `where` and `fix` on the way between processes
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def _rebuild(kind: type[WorkerError], what: str, where: str | None, fix: str | None) -> WorkerError:
    return kind(what, where=where, fix=fix)


def sentence(what: str, where: str | None, fix: str | None) -> str:
    """The one form in which people read an error: `what (from where) -> fix`."""
    text = f"{what} (from {where})" if where else what
    return printable(f"{text} -> {fix}" if fix else text)


def printable(text: str) -> str:
    """`text` with what would move a terminal's cursor or change its colour spelled out; lines stay lines."""
    lines = text.split("\n")
    if all(map(str.isprintable, lines)):
        return text
    return "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)


class SettingsError(WorkerError):
    """A setting, a variable or a credential is wrong; starting again would not help."""

    exit_code = WRONG


class InputError(WorkerError):
    """A data file, a model file or a checkpoint is not what this run needs."""

    exit_code = WRONG


class CheckpointError(WorkerError):
    """A checkpoint is damaged, or written in a newer format than this version reads."""

    exit_code = WRONG


class DiskFullError(WorkerError):
    """There is no room left where something had to be written."""

    exit_code = WRONG


class TrainingDiverged(WorkerError):
    """The loss is NaN or infinite."""

    exit_code = WRONG


class RunHeldError(WorkerError):
    """Another worker holds this run."""

    exit_code = HELD


class Interrupted(WorkerError):
    """Stopped from outside; the same command goes on from what is saved."""

    exit_code = AGAIN


class NotSafeError(WorkerError):
    """The run is finished, but not everything it made is safe in the bucket yet."""

    exit_code = NOT_SAFE


class HostError(WorkerError):
    """What a host or its API, or the way to it, would not do; the same command may work a little later."""

    exit_code = AGAIN


class StorageError(WorkerError):
    """What a bucket, or the way to it, would not do. `where` says operation and object: `get s3://bucket/key`."""

    exit_code = AGAIN


class ObjectNotFound(StorageError):
    """There is no such object; the bucket itself is there."""

    exit_code = WRONG


class BucketNotFound(StorageError):
    """There is no such bucket (container, folder). Not an `ObjectNotFound`: a wrong name is never an empty bucket."""

    exit_code = WRONG


class AccessDenied(StorageError):
    """Credentials are missing, wrong, expired or not enough."""

    exit_code = WRONG


class PreconditionFailed(StorageError):
    """The object is there already, or is not the version that was expected: somebody else was first."""


class TransientError(StorageError):
    """A time-out, a lost connection, a throttled or failing server: the same call may work a little later."""


class ExhaustedError(StorageError):
    """A transient trouble that did not pass, however often and long it was tried again."""


class IntegrityError(StorageError):
    """The bytes are not those whose size or digest was recorded."""

    exit_code = WRONG
