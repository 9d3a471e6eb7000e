"""The report: what a run did, or how runs compare, as one page of HTML that needs nothing else."""

from wmtp_worker.tracking.report.page import render
from wmtp_worker.tracking.report.record import Record, Save, read_metrics, read_weights

__all__ = ["Record", "Save", "read_metrics", "read_weights", "render"]
