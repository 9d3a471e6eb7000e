"""Copies within one Azure account, without the bytes passing through here."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from azure.storage.blob import BlobBlock, BlobClient, generate_blob_sas

from wmtp_worker.errors import TransientError
from wmtp_worker.storage.azure_upload import block_name

# Azure's limit for a copy that names an encryption scope
_AT_ONCE = 256 << 20
_BLOCK = 100 << 20
_POLL_SECONDS = 0.2
_LONGEST_SECONDS = 600.0
_GOOD_FOR = timedelta(hours=1)
_AUDIENCE = "https://storage.azure.com/.default"


def copy(old: BlobClient, new: BlobClient, credential: Any, options: Mapping[str, Any], where: str) -> None:
    """Copy a blob, metadata and all; `options` are those of every write. Atomic.

    Raises `TransientError` where it takes too long or the source is changed meanwhile, and what the SDK raises.
    """
    if not options:
        _wait(new, new.start_copy_from_url(old.url)["copy_status"], where)
        return
    # Azure's own, unhurried copy takes no encryption scope
    source = old.get_blob_properties()
    address, proof = _readable(old, credential)
    if source.size <= _AT_ONCE:
        new.start_copy_from_url(address, requires_sync=True, **proof, **options)
        return
    blocks = []
    for number, start in enumerate(range(0, source.size, _BLOCK)):
        name = block_name(number, hashlib.sha256(str(source.etag).encode()).hexdigest())
        new.stage_block_from_url(name, address, start, min(_BLOCK, source.size - start), **proof, **options)
        blocks.append(BlobBlock(name))
    if old.get_blob_properties().etag != source.etag:
        raise TransientError("the source was changed while it was copied", where=where)
    new.commit_block_list(blocks, metadata=source.metadata, **options)


def _wait(new: BlobClient, status: Any, where: str) -> None:
    until = time.monotonic() + _LONGEST_SECONDS
    while status == "pending" and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        status = new.get_blob_properties().copy.status
    if status != "success":
        raise TransientError(f"the copy is {status}", where=where)


def _readable(old: BlobClient, credential: Any) -> tuple[str, dict[str, Any]]:
    """An address, and what else Azure wants to see, with which it reads the source in our name."""
    if key := getattr(credential, "account_key", None):
        signature = generate_blob_sas(
            credential.account_name,
            old.container_name,
            old.blob_name,
            account_key=key,
            permission="r",
            expiry=datetime.now(UTC) + _GOOD_FOR,
        )
        return f"{old.url}?{signature}", {}
    if hasattr(credential, "get_token"):
        return old.url, {"source_authorization": f"Bearer {credential.get_token(_AUDIENCE).token}"}
    # with a shared access signature it is in the address already
    return old.url, {}
