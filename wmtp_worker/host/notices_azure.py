"""Azure: evictions of spot machines, reboots and the like, by Scheduled Events of the Instance Metadata Service.

https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
"""

import contextlib
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from wmtp_worker.host.metadata import ADDRESS, ANSWER_SECONDS, Answer, Endpoint, Notice, Unavailable

ENDPOINT = "AZURE_METADATA_SERVICE_ENDPOINT"

_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
_OWN_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
_HEADERS = {"Metadata": "true"}
# the first call switches the service on, which takes up to two minutes
_FIRST_SECONDS = 150.0
# a Freeze is a pause of seconds, and all of memory is there afterwards
_KINDS = {"Preempt": "preempt", "Terminate": "terminate", "Reboot": "reboot", "Redeploy": "redeploy"}


class Azure:
    """An event says which machines it is for, and the time before which it does not start.

    It is never acknowledged: that would shorten the time that is left.
    """

    name = "azure"

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._endpoint = Endpoint((environ.get(ENDPOINT) or ADDRESS).rstrip("/"))
        self._seconds = _FIRST_SECONDS
        self._own_name: str | None = None

    def poll(self) -> list[Notice]:
        answer = self._ask(_EVENTS, self._seconds)
        events = answer.json().get("Events")
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            raise Unavailable(f"no list of events: {answer.text[:60]!r}")
        self._seconds = ANSWER_SECONDS
        return [_notice(event, answer) for event in events if event.get("EventType") in _KINDS and self._is_ours(event)]

    def clock(self, seconds: float = ANSWER_SECONDS) -> float:
        return self._ask(_OWN_NAME, seconds).moment

    def close(self) -> None:
        self._endpoint.close()

    def _is_ours(self, event: Mapping[str, Any]) -> bool:
        """Whether the event is for this machine: events of a whole scale set are told to every machine in it."""
        names = event.get("Resources")
        if not isinstance(names, list) or not names:
            return True
        if self._own_name is None:
            try:
                self._own_name = self._ask(_OWN_NAME, ANSWER_SECONDS).text.lower()
            except Unavailable:
                return True  # a needless stop costs a restart, one that is missed costs the work
        return self._own_name in [str(name).lower() for name in names]

    def _ask(self, path: str, seconds: float) -> Answer:
        answer = self._endpoint.ask(path, _HEADERS, seconds=seconds)
        if answer.status != 200:
            raise Unavailable(f"{path.partition('?')[0]}: status {answer.status}")
        return answer


def _notice(event: Mapping[str, Any], answer: Answer) -> Notice:
    kind = _KINDS[event["EventType"]]
    deadline = None  # blank once the event has started
    if isinstance(moment := event.get("NotBefore"), str) and moment:
        with contextlib.suppress(ValueError):  # the notice stands, whatever its time
            deadline = answer.deadline(parsedate_to_datetime(moment).timestamp())
    return Notice(kind, Azure.name, deadline, f"scheduled event {kind} {str(event.get('EventId', ''))[:40]!r}")
