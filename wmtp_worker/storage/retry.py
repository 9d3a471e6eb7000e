"""Trying again what is in transient trouble: the one place that does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from tenacity import RetryCallState, RetryError, Retrying, retry_if_exception_type, wait_random_exponential
from tenacity.wait import wait_base

from wmtp_worker.errors import ExhaustedError, PreconditionFailed, StorageError, TransientError
from wmtp_worker.storage.objects import ObjectInfo, ObjectStore, PartUpload

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

_AT_LEAST = 3
_SLICE = 0.2
# exponential with full jitter: up to 0.5, 1, 2, … 15 seconds, so that many workers do not come back at once
_WAIT = wait_random_exponential(multiplier=0.5, max=15)


class Patience:
    """Calls a function until it succeeds, fails for good, or has been failing for `seconds` and three times.

    `check` is called before and during each wait and may raise; `sleep` and `clock` are those of `time`.
    """

    def __init__(
        self,
        seconds: float,
        check: Callable[[], None] = lambda: None,
        *,
        wait: wait_base = _WAIT,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._check = check
        self._wait = wait
        self._sleep = sleep
        self._clock = clock

    def call(self, function: Callable[[], T]) -> T:
        """The function's result. Raises `ExhaustedError`, or whatever else the function or `check` raises."""
        try:
            return function()
        except TransientError as error:
            # nearly no call comes here, and setting up the machinery costs more than a small request
            return self._again(function, error)

    def _again(self, function: Callable[[], T], first: TransientError) -> T:
        failed = [first]
        began = self._clock()

        def attempt() -> T:
            if failed:
                raise failed.pop()
            return function()

        def enough(state: RetryCallState) -> bool:
            return state.attempt_number >= _AT_LEAST and self._clock() - began >= self._seconds

        retrying = Retrying(
            retry=retry_if_exception_type(TransientError), wait=self._wait, stop=enough, sleep=self._pause
        )
        try:
            return retrying(attempt)
        except RetryError as error:
            last = error.last_attempt.exception()
            assert isinstance(last, TransientError)
            tried = f"tried {error.last_attempt.attempt_number} times in {self._clock() - began:.0f} s"
            fix = last.fix or "see whether the server and the network are up; cloud.patience is how long to try"
            raise ExhaustedError(f"{last.what} ({tried})", where=last.where, fix=fix) from last

    def _pause(self, seconds: float) -> None:
        self._check()
        while seconds > 0:
            self._sleep(min(seconds, _SLICE))
            seconds -= _SLICE
            self._check()


class RetryingStore:
    """`ObjectStore` that tries again for another one, and knows its own writes whose answers were lost."""

    def __init__(
        self,
        store: ObjectStore,
        patience: float,
        check: Callable[[], None] = lambda: None,
        *,
        wait: wait_base = _WAIT,
    ) -> None:
        self.store = store
        self._patience = Patience(patience, check, wait=wait)

    @property
    def url(self) -> str:
        """See `ObjectStore`."""
        return self.store.url

    def __repr__(self) -> str:
        return f"RetryingStore({self.store!r})"

    def head(self, key: str) -> ObjectInfo:
        """See `ObjectStore`."""
        return self._patience.call(lambda: self.store.head(key))

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore`. After trouble it goes on behind the last key: none comes twice."""
        listing = self.store.list(prefix, after)

        def following() -> ObjectInfo | None:
            nonlocal listing
            try:
                return next(listing, None)
            except TransientError:
                # an iterator that raised is at its end
                listing = self.store.list(prefix, after)
                raise

        while (info := self._patience.call(following)) is not None:
            after = info.key
            yield info

    def get(
        self, key: str, start: int = 0, length: int | None = None, version: str | None = None
    ) -> tuple[ObjectInfo, Buffer]:
        """See `ObjectStore`."""
        return self._patience.call(lambda: self.store.get(key, start, length, version))

    def put(
        self,
        key: str,
        data: Buffer,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
        sha256: str | None = None,
    ) -> ObjectInfo:
        """See `ObjectStore`.

        If a condition fails after an answer was lost, the object is read: with our bytes in it, we were first. So
        writers that race must write different bytes.
        """
        lost = False

        def attempt() -> ObjectInfo:
            nonlocal lost
            try:
                return self.store.put(key, data, if_absent=if_absent, if_version=if_version, sha256=sha256)
            except TransientError:
                lost = True
                raise
            except PreconditionFailed:
                if lost and (ours := self._ours(key, data, sha256)) is not None:
                    return ours
                raise

        return self._patience.call(attempt)

    def _ours(self, key: str, data: Buffer, sha256: str | None) -> ObjectInfo | None:
        info, there = self.store.get(key, 0, memoryview(data).nbytes)
        ours = info.size == memoryview(data).nbytes and memoryview(there) == memoryview(data)
        return replace(info, sha256=sha256 or info.sha256) if ours else None

    def begin(self, key: str, size: int, sha256: str, part_size: int, token: Mapping[str, str] | None) -> PartUpload:
        """See `ObjectStore`."""
        upload = self._patience.call(lambda: self.store.begin(key, size, sha256, part_size, token))
        return _RetryingUpload(upload, self._patience, lambda: self.store.head(key), sha256)

    def copy(self, source: str, target: str) -> None:
        """See `ObjectStore`."""
        self._patience.call(lambda: self.store.copy(source, target))

    def delete(self, key: str, *, if_version: str | None = None) -> None:
        """See `ObjectStore`."""
        self._patience.call(lambda: self.store.delete(key, if_version=if_version))

    def sweep(self, prefix: str, older_than: timedelta) -> int:
        """See `ObjectStore`."""
        return self._patience.call(lambda: self.store.sweep(prefix, older_than))

    def close(self) -> None:
        """See `ObjectStore`."""
        self.store.close()


class _RetryingUpload:
    """`PartUpload` that tries again; `head` looks at the finished object."""

    def __init__(self, upload: PartUpload, patience: Patience, head: Callable[[], ObjectInfo], sha256: str) -> None:
        self._upload = upload
        self._patience = patience
        self._head = head
        self._sha256 = sha256

    @property
    def part_size(self) -> int:
        return self._upload.part_size

    @property
    def sequential(self) -> bool:
        return self._upload.sequential

    @property
    def token(self) -> Mapping[str, str]:
        return self._upload.token

    def has(self, number: int, data: Buffer) -> bool:
        return self._patience.call(lambda: self._upload.has(number, data))

    def put(self, number: int, data: Buffer) -> None:
        self._patience.call(lambda: self._upload.put(number, data))

    def finish(self) -> ObjectInfo:
        """An upload that is gone after a lost answer is done if the object has our digest."""
        lost = False

        def attempt() -> ObjectInfo:
            nonlocal lost
            try:
                return self._upload.finish()
            except TransientError:
                lost = True
                raise
            except StorageError:
                if lost and (info := self._head()).sha256 == self._sha256:
                    return info
                raise

        return self._patience.call(attempt)

    def abort(self) -> None:
        self._patience.call(self._upload.abort)
