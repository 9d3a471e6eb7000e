"""The files that a run has on a tracking server: logs, reports, statistics, and where its checkpoints are."""

import json
import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp_worker.redact import redact
from wmtp_worker.storage.layout import MANIFEST, RunPaths, step_name
from wmtp_worker.tracking.record import BestModel, TrackedRun

if TYPE_CHECKING:
    from wmtp_worker.tracking.server import ServerRun

_EVERY = 300.0  # seconds between looks at files that grow
_TEXT = (".log", ".json", ".jsonl", ".html", ".txt", ".csv", ".md")
_FOLDERS = ("predictions", "weight_stats", "reports")


def folder_of(name: str) -> str | None:
    """The folder that a file of `logs/<run>/` has on a server; None: its content is there in another form."""
    first, slash, _ = name.partition("/")
    if slash and first in _FOLDERS:
        return name.rpartition("/")[0]
    if name == "metrics.jsonl" or Path(name).name.startswith("."):
        return None
    if name.startswith("report"):
        return "reports"
    if name.startswith("weights"):
        return "weight_stats"
    return "predictions" if name.startswith("predictions") else "logs"


class Artifacts:
    """Uploads what is new in a run's logs, without secrets, and a list of its checkpoints instead of themselves."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._sent: dict[Path, tuple[int, int]] = {}  # file -> its size and time when it was sent
        self._looked = time.monotonic()
        self._listed: object = None

    @property
    def due(self) -> bool:
        return time.monotonic() - self._looked >= _EVERY

    def sync(self, server: "ServerRun", best_model: BestModel = "link", deadline: float = math.inf) -> None:
        """Upload what changed since the last time, the largest file last.

        Raises what the server raises, and `TimeoutError` where files are left at `deadline` (`time.monotonic`); the
        next call goes on from there.
        """
        self._looked = time.monotonic()
        for file in sorted(self._paths.logs.rglob("*")):
            folder = folder_of(file.relative_to(self._paths.logs).as_posix())
            if folder is not None and file.is_file():
                _in_time(deadline)
                self._upload(server, file, folder)
        _in_time(deadline)
        self._link(server)
        best = self._paths.best
        if best_model != "link" and best.exists():
            _in_time(deadline)
            server.upload(best, "checkpoints")
            if best_model == "move":
                best.unlink()

    def _upload(self, server: "ServerRun", file: Path, folder: str) -> None:
        status = file.stat()
        state = (status.st_size, status.st_mtime_ns)
        if self._sent.get(file) == state:
            return
        if file.suffix not in _TEXT:
            server.upload(file, folder)
        else:
            with tempfile.TemporaryDirectory() as copies:
                clean = Path(copies) / file.name
                clean.write_text(redact(file.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")
                server.upload(clean, folder)
        self._sent[file] = state

    def _link(self, server: "ServerRun") -> None:
        """Where the checkpoints are: they are large, and in the bucket already."""
        paths = self._paths
        record = TrackedRun.load(paths.tracking_record)
        home = (record and record.home) or str(paths.checkpoints)
        steps = [step_name(step) for step in paths.steps() if (paths.step(step) / MANIFEST).exists()]
        files = [path.name for path in (paths.final, paths.best) if path.exists()]
        listed = {"url": home, "steps": steps, "files": files}
        if listed != self._listed:
            server.upload_json(json.loads(redact(json.dumps(listed))), "checkpoints/checkpoints.json")
            self._listed = listed


def _in_time(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise TimeoutError("there was no time left for them")
