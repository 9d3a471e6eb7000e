"""A stop at a chosen moment of a run."""

import sys

from wmtp_worker.host.stop import StopRequest


class StopAfter(StopRequest):
    """Asks for a stop at the n-th time it is polled while the run trains: per micro-batch and per validation batch."""

    def __init__(self, polls):
        super().__init__()
        self._polls = polls

    def check(self):
        # before the training it is polled as often as there are samples and blocks to read
        self._polls -= sys._getframe(3).f_code.co_name in ("train_step", "between_batches")
        if self._polls == 0:
            self.request("test")
        super().check()
