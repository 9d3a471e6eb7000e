"""One run on an MLflow server (or in an MLflow store on this disk): found or made, and sent what it lacks.

Exactly once by (metric, step): the server itself says how far it has each metric, and only later steps are sent. It
takes a batch and remembers that in one transaction, so a batch whose answer was lost counts as sent when it arrived;
and one that arrives after the question is taken for the same, because a row always has the same timestamp.
"""

import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp_worker.errors import RunHeldError, TransientError
from wmtp_worker.tracking.record import Status, TrackedRun
from wmtp_worker.tracking.rows import Row

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

BATCH = 1000  # metrics a request; the protocol's limit
_PARAMS, _TAGS = 100, 100  # the same
_LONGEST_PARAM, _LONGEST_TAG = 500, 5000  # characters that servers of every version take
PUSHED = "push/"  # how the names of owners begin that are no training
KEY, OWNER, HOME, DIGEST = "wmtp.run", "wmtp.process", "wmtp.checkpoints", "wmtp.settings"
_TIMEOUT, _RETRIES = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_LARGE = 100_000_000  # bytes
_SLOWEST = 5e6  # bytes a second from a server to its bucket
_DEFAULTS = {
    # artifacts go through the server, whatever their size: it may be the only one with a way to the bucket
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # a server that is away is tried again by us, with what is known by then
    _RETRIES: "1",
    _TIMEOUT: "30",
    # for who names a folder: CI, smoke runs
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def make_client(uri: str) -> "MlflowClient":
    """A client of the server or store at `uri`. The first one of a process imports MLflow: two seconds of CPU."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def upload_seconds(size: int) -> float:
    """How long the answer to a file of so many bytes may take."""
    return 30 + size / _SLOWEST


def find_experiment(client: "MlflowClient", name: str) -> str:
    """Its id; made if need be. Raises what MLflow raises, and `TransientError` while it lies in the trash."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # somebody else made it meanwhile
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    if found.lifecycle_stage != "active":
        fix = "restore it there, or set tracking.experiment"
        raise TransientError(f"the experiment {name!r} is deleted", where="the MLflow server", fix=fix)
    return str(found.experiment_id)


class ServerRun:
    """The run of a record, as one process owns it. Every method raises what MLflow raises; all may be called again."""

    def __init__(self, client: "MlflowClient", record: TrackedRun, owner: str, run_id: str | None) -> None:
        """`run_id` is what this server called the run, as far as that is known."""
        self._client = client
        self._record = record
        self._owner = owner
        self._known = run_id
        self.run_id = ""
        self.experiment_id = ""
        self.marks: dict[str, int] = {}  # metric -> the last step that the server has

    def open(self, *, take_over: bool = True) -> None:
        """Find the run or make it, tell what describes it, and take it over from the process before.

        Without `take_over` only from one that pushed it: raises `RunHeldError` where a training logs it.
        """
        run = self._find() or self._make()
        owner = run.data.tags.get(OWNER, PUSHED)
        if not take_over and not owner.startswith(PUSHED):
            raise RunHeldError(f"the run is logged by {owner}", where=f"MLflow run {run.info.run_id}")
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        self._describe(run)
        self._client.set_tag(self.run_id, OWNER, self._owner)
        self._client.update_run(self.run_id, status="RUNNING")
        self.look()

    def look(self) -> None:
        """Ask how far the server has each metric. Raises `RunHeldError` once another process owns the run."""
        run = self._client.get_run(self.run_id)
        if (owner := run.data.tags.get(OWNER)) != self._owner:
            raise RunHeldError(f"the run is now logged by {owner}", where=f"MLflow run {self.run_id}")
        self.marks = {metric.key: metric.step for metric in run.data._metric_objs}

    def send(self, rows: Iterable[Row]) -> int:
        """Log those rows that the server lacks, in order; how many that were."""
        from mlflow.entities import Metric

        batch: list[Metric] = []
        sent, marks = 0, dict(self.marks)

        def flush() -> None:
            nonlocal sent
            if batch:
                self._client.log_batch(self.run_id, metrics=batch)
                sent += len(batch)
                self.marks = dict(marks)
                batch.clear()

        for row in rows:
            if row.step > marks.get(row.key, -1):
                batch.append(Metric(row.key, row.value, row.timestamp, row.step))
                marks[row.key] = row.step
                if len(batch) == BATCH:
                    flush()
        flush()
        return sent

    def upload(self, file: Path, folder: str) -> None:
        """The server takes all of it first, and answers when its bucket has it, too."""
        size = file.stat().st_size
        patience = {_TIMEOUT: str(max(int(os.environ[_TIMEOUT]), math.ceil(upload_seconds(size))))}
        if size > _LARGE:
            patience[_RETRIES] = "0"  # all of it would be sent once more
        before = {name: os.environ[name] for name in patience}
        os.environ.update(patience)  # MLflow reads them at each request
        try:
            self._client.log_artifact(self.run_id, str(file), folder)
        finally:
            os.environ.update(before)

    def upload_json(self, document: Mapping[str, Any], path: str) -> None:
        self._client.log_dict(self.run_id, dict(document), path)

    def end(self, status: Status, when: float) -> None:
        """`when` is Unix time. A run that is only looked at may still be running."""
        if status == "RUNNING":
            return
        self._client.set_terminated(self.run_id, status=status, end_time=math.floor(when * 1000))

    # --- found or made ---------------------------------------------------------------------------------------

    def _find(self) -> "Run | None":
        from mlflow.exceptions import MlflowException

        if self._known is not None:
            try:
                run = self._client.get_run(self._known)
                if run.info.lifecycle_stage == "active":
                    return run
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        self.experiment_id = find_experiment(self._client, self._record.experiment)
        return self._search(f"tags.`{KEY}` = '{self._record.key}'") or self._adopt()

    def _search(self, wanted: str, newest: bool = False) -> "Run | None":
        order = [f"attributes.start_time {'DESC' if newest else 'ASC'}", "attributes.run_id ASC"]
        found = self._client.search_runs([self.experiment_id], wanted, max_results=1, order_by=order)
        return found[0] if found else None

    def _adopt(self) -> "Run | None":
        """Where this machine knows of no earlier process, though there may be one: the disk was lost with its record
        before anything was saved in the bucket.
        """
        if self._record.home is None or not self._record.fresh:
            return None
        run = self._search(f"tags.`{HOME}` = '{self._record.home}'", newest=True)
        if run is None or run.info.status not in ("RUNNING", "KILLED"):
            return None
        return run if run.data.tags.get(DIGEST) == self._record.settings_digest else None

    def _make(self) -> "Run":
        record = self._record
        made = self._client.create_run(
            self.experiment_id,
            start_time=math.floor(record.created * 1000),
            tags={KEY: record.key, OWNER: self._owner},
            run_name=record.run,
        )
        # an answer that was lost has left a run behind: all who ask agree on the first
        first = self._search(f"tags.`{KEY}` = '{record.key}'")
        if first is not None and first.info.run_id != made.info.run_id:
            self._client.delete_run(made.info.run_id)
            return first
        return made

    def _describe(self, run: "Run") -> None:
        """Log params and tags; a param that is another now keeps its first value there, and a tag tells the new one."""
        from mlflow.entities import Param, RunTag

        record, there = self._record, run.data.params
        params = {key: _cut(value, _LONGEST_PARAM) for key, value in record.params.items()}
        new = [Param(key, value) for key, value in params.items() if key not in there]
        changed = {f"changed.{key}": value for key, value in params.items() if there.get(key, value) != value}
        tags = {**record.tags, **changed, KEY: record.key, DIGEST: record.settings_digest}
        if record.home is not None:
            tags[HOME] = record.home
        if record.previous is not None:
            tags["wmtp.branched_off"] = record.previous
        told = [RunTag(key, _cut(value, _LONGEST_TAG)) for key, value in tags.items()]
        for begin in range(0, len(new), _PARAMS):
            self._client.log_batch(self.run_id, params=new[begin : begin + _PARAMS])
        for begin in range(0, len(told), _TAGS):
            self._client.log_batch(self.run_id, tags=told[begin : begin + _TAGS])


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
