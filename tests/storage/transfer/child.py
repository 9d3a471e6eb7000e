"""A process that pushes or pulls slowly, to be killed: `child.py push|pull FOLDER STATE BANDWIDTH PART_SIZE KILL_AT`.

The bucket is that of its environment. Says `started` when the first bytes travel, kills itself when KILL_AT bytes are
there (0: never), and says its report at the end.
"""

import json
import os
import signal
import sys
from pathlib import Path

from wmtp_worker.settings import load
from wmtp_worker.storage.open import open_store
from wmtp_worker.storage.transfer import Transfer


class Announce:
    """Progress that tells when the first bytes are there, and ends it all when so many are."""

    def __init__(self, kill_at):
        self._kill_at = kill_at
        self._there = 0
        self.told = False

    def start(self, total):
        pass

    def advance(self, size, files=0):
        if not self.told:
            self.told = True
            print("started", flush=True)
        self._there += size
        if 0 < self._kill_at <= self._there:
            os.kill(os.getpid(), signal.SIGKILL)

    def finish(self):
        pass


def main():
    what, folder, state, bandwidth, part_size, kill_at = sys.argv[1:]
    store = open_store(load(preset="smoke").cloud)
    settings = {
        "bandwidth": float(bandwidth),
        "part_size": int(part_size),
        "progress": Announce(float(kill_at)),
        "concurrency": 8,
    }
    with Transfer(store, Path(state), **settings) as transfer:
        way = {
            "push": lambda: transfer.push(Path(folder), "p"),
            "pull": lambda: transfer.pull("p", Path(folder)),
        }[what]
        report = way()
    store.close()
    print(json.dumps({"bytes": report.bytes, "done": report.done, "failed": len(report.failed)}))


if __name__ == "__main__":
    main()
