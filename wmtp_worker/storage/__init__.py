"""Where things lie, and how they travel: the layout, atomic local writes, buckets, transfers, `CloudSync`.

`CloudSync` and `get_cloud_sync_from_env` are for everybody; they are imported when they are asked for.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wmtp_worker.storage.cloud import CloudSync, Synced, get_cloud_sync_from_env

__all__ = ["CloudSync", "Synced", "get_cloud_sync_from_env"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from wmtp_worker.storage import cloud

    return getattr(cloud, name)
