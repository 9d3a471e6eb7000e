"""Useful (not padded) tokens per CPU second: the same training step on MBPP, packed and padded, alternated."""

import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from common import mbpp, median, record
from rich.console import Console

from wmtp_worker.checkpoint.ledger import Ledger, Phases
from wmtp_worker.host.device import resolve_device
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.settings import load
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.heartbeat import Heartbeat
from wmtp_worker.tracking.metrics import MetricsLog
from wmtp_worker.training.bucket import RunBucket
from wmtp_worker.training.group import Group
from wmtp_worker.training.loop import train_step
from wmtp_worker.training.prefetch import Prefetcher
from wmtp_worker.training.session import Session
from wmtp_worker.training.setup import build_session

STEPS = 12


def session(packing: bool, folder: Path) -> Session:
    settings = load(
        preset="local-light",
        overrides=[f"data.packing={str(packing).lower()}", f"data.dataset={mbpp()}", "training.micro_batch_size=4"],
        options={"run.workdir": str(folder), "run.name": f"packing-{packing}"},
        environ={},
    )
    paths = RunPaths(settings.run.workdir, settings.run.name)
    paths.checkpoints.mkdir(parents=True)
    stop, heartbeat = StopRequest(), Heartbeat(paths.heartbeat, paths.run)
    bucket = RunBucket(settings, paths, stop.check)
    group = Group(resolve_device(settings.host.device))
    made = build_session(settings, paths, group, stop, heartbeat, bucket, Console(quiet=True))
    ledger = Ledger.begin(paths.ledger, paths.metrics, Phases(), gpus=1)
    made.open(MetricsLog(paths.metrics, 0), ledger)
    return made


def prefetcher(made: Session) -> Prefetcher:
    return Prefetcher(made.task.data, made.settings.training, made.group)


def main() -> None:
    rates: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sessions = {packing: session(packing, Path(folder)) for packing in rates}
        ahead = {packing: stack.enter_context(prefetcher(made)) for packing, made in sessions.items()}
        for packing, made in sessions.items():
            train_step(made, ahead[packing])  # the first step allocates
        for _ in range(STEPS):
            for packing, made in sessions.items():
                tokens, started = made.progress.tokens, time.process_time()
                train_step(made, ahead[packing])
                rates[packing].append((made.progress.tokens - tokens) / (time.process_time() - started))
        for made in sessions.values():
            made.metrics.close()
    packed, padded = median(rates[True]), median(rates[False])
    record(
        "packing",
        {"useful tokens per CPU second": {"packed": packed, "padded": padded}, "ratio": round(packed / padded, 2)},
    )


if __name__ == "__main__":
    main()
