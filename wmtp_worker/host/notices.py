"""`NoticeWatcher`: learns from the cloud that this machine will be taken away, while there is time to save.

    with NoticeWatcher(settings.host.notices, STOP):
        ...                                          # STOP is polled, as for a signal

A notice becomes `stop.request(reason, deadline, machine_goes=True)`; a mere warning `stop.warn(reason)`, which asks for
a save and nothing more. On a machine of no known cloud there is no thread, and no address is ever asked.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from wmtp_worker.host.metadata import Notice, Service, Unavailable
from wmtp_worker.host.notices_azure import Azure
from wmtp_worker.host.notices_ec2 import Ec2, disabled
from wmtp_worker.host.notices_gcp import Gcp
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.host.where import ROOT, here

log = logging.getLogger(__name__)

INTERVAL = 5.0  # seconds between two polls
# a machine that goes later than this is used until then
AHEAD = 150.0
_SLOWEST = 60.0  # of the polls of a service that never answered
_PATIENCE = 3  # failures in a row before anybody is told
_GRACE_SECONDS = 5.0

Which = Literal["auto", "ec2", "gcp", "azure", "none"]


def service_of(which: Which, environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> Service | None:
    """The metadata service to ask: the one that is named; with auto, that of the cloud whose machine this is, where it
    may be asked.

    Asks nothing over the network.
    """
    cloud = here(environ, root).cloud if which == "auto" else which
    if cloud == "ec2":
        if disabled(environ):
            log.debug("notices of ec2 are not watched: AWS_EC2_METADATA_DISABLED is set")
            return None
        return Ec2(environ)
    if cloud == "gcp":
        return Gcp(environ, root)
    return Azure(environ) if cloud == "azure" else None


class NoticeWatcher:
    """A thread that polls one metadata service, and turns what it says into requests to stop or to save.

    It begins at once and delays nothing. A service that never answers is asked less and less often; none fails the run.
    Where a machine runs several ranks, one watcher is enough, if they agree on the flag (`training.group`).
    """

    def __init__(
        self,
        which: Which,
        stop: StopRequest,
        *,
        environ: Mapping[str, str] = os.environ,
        root: Path = ROOT,
        interval: float = INTERVAL,
        ahead: float = AHEAD,
    ) -> None:
        """Starts the thread if there is a service to ask. A stop is requested at most `ahead` seconds before a
        deadline; one that is further away is a warning until then."""
        self._stop = stop
        self._interval = interval
        self._ahead = ahead
        self._failures = 0
        self._answered = False
        self._seen: set[tuple[bool, str]] = set()  # what was acted upon: (a stop or a warning, detail)
        self._closing = threading.Event()
        self._service = service_of(which, environ, root)
        self._thread: threading.Thread | None = None
        if self._service is not None:
            self._thread = threading.Thread(target=self._run, args=(self._service,), name="notices", daemon=True)
            self._thread.start()

    @property
    def source(self) -> str | None:
        """Whose notices are watched; None: nobody's."""
        return None if self._service is None else self._service.name

    def close(self) -> None:
        """End the thread and join it; a call under way is cut off."""
        self._closing.set()
        if self._service is not None and self._thread is not None:
            self._service.close()
            self._thread.join(_GRACE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, service: Service) -> None:
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                notices = service.poll()
            except Exception as error:  # whatever it is, the watching goes on
                self._failed(service, error)
            else:
                if not self._answered or self._failures >= _PATIENCE:
                    log.info("notices of %s are watched", service.name)
                self._answered, self._failures = True, 0
                for notice in notices:
                    self._heed(notice)
            # a poll that waited for news has spent the interval already
            self._closing.wait(max(0.0, began + self._pause() - time.monotonic()))

    def _pause(self) -> float:
        """Seconds from one poll to the next. One that has answered before is not given up: the notice may be next."""
        if self._answered:
            return self._interval
        return min(_SLOWEST, self._interval * 2.0 ** min(self._failures, 10))

    def _failed(self, service: Service, error: Exception) -> None:
        if self._closing.is_set():
            return
        self._failures += 1
        log.debug("notices of %s: %s", service.name, error, exc_info=not isinstance(error, Unavailable))
        if self._failures == _PATIENCE:
            log.warning(
                "the metadata service of %s does not answer, so its notices are not seen (%s); signals are heeded all "
                "the same. In a container, EC2 wants a hop limit of 2 for it; host.notices=none asks nobody",
                service.name,
                error,
            )

    def _heed(self, notice: Notice) -> None:
        left = None if notice.deadline is None else notice.deadline - time.monotonic()
        stops = notice.certain and (left is None or left <= self._ahead)
        reason = f"a notice of {notice.source}: {notice.detail}"
        if (stops, notice.detail) in self._seen:
            if stops and _is_earlier(notice.deadline, self._stop.deadline):
                self._stop.request(reason, notice.deadline, machine_goes=True)
            return
        self._seen.add((stops, notice.detail))
        when = "" if left is None else f", in {max(0.0, left):.0f} s"
        if stops:
            log.warning("%s%s: stopping", reason, when)
            self._stop.request(reason, notice.deadline, machine_goes=True)
        else:
            log.warning("%s%s: saving soon", reason, when)
            self._stop.warn(reason)


def _is_earlier(deadline: float | None, known: float | None) -> bool:
    # by a second: the clocks that deadlines are read from show no less
    return deadline is not None and (known is None or deadline < known - 1.0)
