"""Whether a file and an object are the same, by size and digest, asking as little as possible."""

import hashlib

from wmtp_worker.storage.objects import ObjectInfo
from wmtp_worker.storage.transfer.digest import hash_file
from wmtp_worker.storage.transfer.limits import Heed
from wmtp_worker.storage.transfer.means import Means
from wmtp_worker.storage.transfer.paths import reading
from wmtp_worker.storage.transfer.plan import Local


def differs(means: Means, local: Local, remote: ObjectInfo, heed: Heed | None = None) -> bool | None:
    """Whether the contents differ. Without `heed` only what costs nothing is looked at, and None means unknown.

    Digests come from the journal, then the listing, then the file and the object's head. An object of which no digest
    is recorded anywhere counts as different.
    """
    if local.stamp.size != remote.size:
        return True
    wanted = remote.sha256 or means.journal.object_digest(remote.key, remote.version)
    if wanted is not None and (found := means.journal.file_digest(local.name, local.stamp)):
        return found != wanted
    if heed is None:
        return None
    md5 = remote.md5
    if wanted is None and md5 is None:
        remote = means.store.head(remote.key)
        wanted, md5 = remote.sha256, remote.md5
    if wanted is None and (md5 is None or _hash(local, heed, "md5") != md5):
        return True
    found = means.journal.file_digest(local.name, local.stamp) or _hash(local, heed, "sha256")
    means.journal.note_file(local.name, local.stamp, found)
    # equal MD5s tell the object's SHA-256, for the next time
    means.journal.note_object(remote.key, remote.version, wanted or found)
    return wanted is not None and found != wanted


def recorded_digest(means: Means, info: ObjectInfo, heed: Heed) -> tuple[str, str]:
    """Kind and value of an object's digest: recorded with it, else the provider's MD5, else of its bytes, read now."""
    if info.sha256 is None and info.md5 is None:
        info = means.store.head(info.key)
    if info.sha256 is not None:
        return "sha256", info.sha256
    if info.md5 is not None:
        return "md5", info.md5
    digest = hashlib.sha256()
    for start in range(0, info.size, means.part_size):
        heed()
        length = min(means.part_size, info.size - start)
        with means.memory.hold(length, heed):
            means.bandwidth.take(length, heed)
            digest.update(means.store.get(info.key, start, length, info.version)[1])
    return "sha256", digest.hexdigest()


def _hash(local: Local, heed: Heed, kind: str) -> str:
    with reading(local.path):
        return hash_file(local.path, heed, kind=kind)
