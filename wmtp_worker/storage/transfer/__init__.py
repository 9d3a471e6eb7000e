"""Files to a bucket and back: parallel, checked, resumable, within one memory bound."""

from wmtp_worker.storage.transfer.engine import Transfer
from wmtp_worker.storage.transfer.paths import safe_path
from wmtp_worker.storage.transfer.progress import Progress, progress_for
from wmtp_worker.storage.transfer.report import Action, Report

__all__ = ["Action", "Progress", "Report", "Transfer", "progress_for", "safe_path"]
