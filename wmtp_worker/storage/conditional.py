"""Whether a server does what leases and manifests rest on: writing only where nobody else has written."""

import uuid

from wmtp_worker.errors import PreconditionFailed, SettingsError, StorageError
from wmtp_worker.storage.objects import ObjectStore


def check_conditional_put(store: ObjectStore, prefix: str) -> bool:
    """Try the conditions of `ObjectStore.put` and `delete` on an object of its own, `prefix`…, gone afterwards.

    Some servers that speak S3 ignore them, and of two workers both would win. Six small requests. Returns whether the
    condition of `delete` is heeded, which one can do without. Raises `SettingsError` where a write that must be refused
    is not, or the server does not know the condition; `PreconditionFailed` and `ObjectNotFound` where somebody else
    took the object away; and the store's errors.
    """
    key = f"{prefix}{uuid.uuid4().hex}"
    # no two with the same bytes: who tries again after a lost answer knows its own write by them
    first = _put(store, key, b"1", if_absent=True)
    try:
        _refuses(store, key, b"2", if_absent=True)
        _put(store, key, b"3", if_version=first)
        _refuses(store, key, b"4", if_version=first)
        return _keeps(store, key, first)
    finally:
        store.delete(key)


def _put(store: ObjectStore, key: str, data: bytes, *, if_absent: bool = False, if_version: str | None = None) -> str:
    try:
        return store.put(key, data, if_absent=if_absent, if_version=if_version).version
    except StorageError as error:
        if type(error) is not StorageError:
            raise  # of another kind: nothing that the condition is to blame for
        raise _missing(store, if_absent, f"refuses it: {error.what}") from error


def _refuses(
    store: ObjectStore, key: str, data: bytes, *, if_absent: bool = False, if_version: str | None = None
) -> None:
    try:
        _put(store, key, data, if_absent=if_absent, if_version=if_version)
    except PreconditionFailed:
        return
    raise _missing(store, if_absent, "ignores it")


def _keeps(store: ObjectStore, key: str, old_version: str) -> bool:
    try:
        store.delete(key, if_version=old_version)
    except PreconditionFailed:
        return True
    except StorageError as error:
        if type(error) is not StorageError:
            raise
    return False


def _missing(store: ObjectStore, if_absent: bool, how: str) -> SettingsError:
    feature = "If-None-Match: *" if if_absent else "If-Match: <version>"
    return SettingsError(
        f"the server lacks conditional writes (PUT with {feature}): it {how}",
        where=store.url,
        fix="update the server, or use one that has them: without them two workers could overwrite each other",
    )
