"""Whether a tracking server would take a run's record: asked by doing all of it once, and taking it back."""

import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wmtp_worker.redact import redact
from wmtp_worker.tracking.server import find_experiment, make_client

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_DENIED = (401, 403)


@dataclass(frozen=True)
class Finding:
    """One thing that a run needs of a server."""

    name: str
    state: Literal["ok", "denied", "failed"]
    seconds: float
    detail: str


def check(uri: str, experiment: str) -> Iterator[Finding]:
    """Try server, experiment, run, metrics and artifacts in this order, up to the first that fails. Never raises.

    What it makes in the experiment is deleted again; an experiment that was not there stays.
    """
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # whoever asks wants to know how it is now
    state: dict[str, str] = {}
    holder: list[MlflowClient] = []

    def server() -> str:
        holder.append(make_client(uri))
        holder[0].search_experiments(max_results=1)
        return f"{uri} answers, {_credentials()}"

    def an_experiment() -> str:
        state["experiment"] = find_experiment(holder[0], experiment)
        return f"{experiment!r} has the id {state['experiment']}"

    def a_run() -> str:
        client = holder[0]
        state["run"] = run_id = client.create_run(state["experiment"], run_name="wmtp tracking check").info.run_id
        client.log_metric(run_id, "check", 1.5, step=1)
        if client.get_run(run_id).data.metrics.get("check") != 1.5:
            raise ValueError("the metric that was logged is not there")
        return "a run was made, and has the metric that was logged"

    def artifacts() -> str:
        content = secrets.token_bytes(1 << 16)
        with tempfile.TemporaryDirectory() as name:
            sent, folder = Path(name) / "check.bin", Path(name) / "back"
            sent.write_bytes(content)
            folder.mkdir()
            holder[0].log_artifact(state["run"], str(sent), "checkpoints")
            back = holder[0].download_artifacts(state["run"], "checkpoints/check.bin", str(folder))
            if Path(back).read_bytes() != content:
                raise ValueError("the file that was uploaded came back with another content")
        return "64 kB went there and came back"

    steps: dict[str, Callable[[], str]] = {
        "server": server, "experiment": an_experiment, "run": a_run, "artifacts": artifacts,
    }  # fmt: skip
    try:
        for name, step in steps.items():
            began = time.perf_counter()
            try:
                detail, outcome = step(), "ok"
            except Exception as error:  # MLflow raises whatever its libraries do
                detail = redact((str(error).strip().splitlines() or [type(error).__name__])[0][:300])
                outcome = "denied" if _refused(error) else "failed"
            finding = Finding(name, outcome, time.perf_counter() - began, detail)  # type: ignore[arg-type]
            yield finding
            if finding.state != "ok":
                return
    finally:
        if run_id := state.get("run"):
            try:
                holder[0].set_terminated(run_id, status="KILLED")
                holder[0].delete_run(run_id)
            except Exception as error:  # what matters was found out already
                del error


def _credentials() -> str:
    """What MLflow's client sends of them: a token only where there is no user with a password."""
    given = {name for name in ("USERNAME", "PASSWORD", "TOKEN") if os.environ.get(f"MLFLOW_TRACKING_{name}")}
    if {"USERNAME", "PASSWORD"} <= given:
        return "with a password"
    return "with a token" if "TOKEN" in given else "without a password"


def _refused(error: Exception) -> bool:
    """Whether the server answered, and does not want us. Not told by digits of the text, which quotes ports, too."""
    from mlflow.exceptions import MlflowException, RestException

    response = getattr(error, "response", None)  # of an artifact: requests' own error
    if response is not None:
        return bool(response.status_code in _DENIED)
    if isinstance(error, RestException) and "error_code" not in error.json:  # of somebody before MLflow
        return re.search(r"\b(Unauthorized|Forbidden)\b", str(error), re.IGNORECASE) is not None
    return isinstance(error, MlflowException) and error.get_http_status_code() in _DENIED
