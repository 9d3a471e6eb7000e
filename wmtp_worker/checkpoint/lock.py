"""One worker a run on this machine; see `storage.runlock`."""

from wmtp_worker.storage.runlock import run_lock

__all__ = ["run_lock"]
