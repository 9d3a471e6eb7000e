"""Google Compute Engine: preemption and host maintenance, by the metadata server.

https://cloud.google.com/compute/docs/instances/create-use-spot
https://cloud.google.com/compute/docs/gpus/gpu-host-maintenance
https://cloud.google.com/compute/docs/metadata/querying-metadata (waiting for a change)
"""

import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlencode

from wmtp_worker.host.metadata import ADDRESS, ANSWER_SECONDS, Answer, Endpoint, Notice, Unavailable

HOST = "GCE_METADATA_HOST"

_WAIT_SECONDS = 5
# from the preemption to the end of the machine
_PREEMPTION_SECONDS = 30.0
# from TERMINATE_ON_HOST_MAINTENANCE to the stop, with and without GPUs
_GPU_MAINTENANCE_SECONDS = 3600.0
_MAINTENANCE_SECONDS = 60.0


class Gcp:
    """`instance/preempted` is asked to answer when it changes: the half minute that is left is not spent on polling."""

    name = "gcp"

    def __init__(self, environ: Mapping[str, str], root: Path = Path("/")) -> None:
        # by number: looking up metadata.google.internal has no time-out
        self._endpoint = Endpoint((environ.get(HOST) or ADDRESS).rstrip("/"))
        self._has_gpu = (root / "dev/nvidiactl").exists()
        self._etag: str | None = None
        self._asked = False
        self._maintenance: Notice | None = None

    def poll(self) -> list[Notice]:
        preempted = self._preempted()
        if preempted == "TRUE":
            deadline = time.monotonic() + _PREEMPTION_SECONDS
            return [Notice("preempt", self.name, deadline, "the machine is being preempted")]
        event = self._get("instance/maintenance-event", {})
        notices = self._notices_of(event)
        self._asked = True
        return notices

    def clock(self, seconds: float = ANSWER_SECONDS) -> float:
        return self._answer("instance/id", {}, seconds).moment

    def close(self) -> None:
        self._endpoint.close()

    def _preempted(self) -> str | None:
        """TRUE, FALSE, or None where the server does not know; waits for a change, once an answer was seen."""
        query: dict[str, str | int] = {}
        if self._etag is not None:
            # what changed since that answer is told at once, so nothing is missed between two calls
            query = {"wait_for_change": "true", "timeout_sec": _WAIT_SECONDS, "last_etag": self._etag}
        value = self._get("instance/preempted", query)
        if value not in ("TRUE", "FALSE", None):
            raise Unavailable(f"instance/preempted is {value[:60]!r}")
        return value

    def _notices_of(self, event: str | None) -> list[Notice]:
        # a machine that is migrated goes on
        if event != "TERMINATE_ON_HOST_MAINTENANCE":
            self._maintenance = None
            return []
        if self._maintenance is None:
            seconds = _GPU_MAINTENANCE_SECONDS if self._has_gpu else _MAINTENANCE_SECONDS
            # one that stood before we first asked: nobody knows since when
            known = self._asked or not self._has_gpu
            deadline = time.monotonic() + seconds if known else None
            detail = "the machine is stopped for maintenance of its host"
            self._maintenance = Notice("maintenance", self.name, deadline, detail, certain=known)
        return [self._maintenance]

    def _get(self, item: str, query: Mapping[str, str | int]) -> str | None:
        """The value, None where there is no such item."""
        answer = self._answer(item, query, ANSWER_SECONDS)
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise Unavailable(f"{item}: status {answer.status}")
        if item == "instance/preempted":
            self._etag = answer.headers.get("etag")
        return answer.text

    def _answer(self, item: str, query: Mapping[str, str | int], seconds: float) -> Answer:
        waits = bool(query)
        answer = self._endpoint.ask(
            f"/computeMetadata/v1/{item}{'?' if waits else ''}{urlencode(query)}",
            {"Metadata-Flavor": "Google"},
            seconds=seconds + (_WAIT_SECONDS if waits else 0),
        )
        # anything else that answers at this address is not Google's
        if answer.headers.get("metadata-flavor") != "Google":
            raise Unavailable(f"{item}: not answered by a Google metadata server (status {answer.status})")
        return answer
