"""Shared by all tests: runs so small that they take a second, and what they leave, made comparable."""

import hashlib
import io
import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from rich.console import Console

from tests.disks import mounted
from tests.servers.azure import azure_server  # noqa: F401
from tests.servers.directory import directory_server  # noqa: F401
from tests.servers.gcs import fake_gcs_server, gcs_process, gcs_server  # noqa: F401
from tests.servers.hub import hub  # noqa: F401
from tests.servers.nvidia.acting import acting_driver  # noqa: F401
from tests.servers.s3 import s3_server, s3_tls_server, seaweed  # noqa: F401
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.settings import load
from wmtp_worker.storage.layout import RunPaths

# the same examples each time: a failure is one of the change that is tested; --hypothesis-profile=default draws others
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")

TINY_RUN = "tiny"
# twelve steps with every kind of event between them: validations, saves, pruning, several epochs' borders
TINY = (
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.layers=3",
    "model.attention_heads=2",
    "model.key_value_heads=1",
    "model.heads=2",
    "data.sequence_length=320",
    "training.micro_batch_size=1",
    "training.accumulation=2",
    "training.max_steps=12",
    "training.warmup_steps=2",
    "evaluation.every=4",
    "evaluation.max_batches=2",
    "checkpoint.every=3",
    "checkpoint.keep_last=2",
    "checkpoint.buffers=1",  # with two a busy machine drops saves: tests could not say which steps are there
    "logging.every=4",
    "host.threads=1",
    "host.device=cpu",
)


CREDENTIALS = ("AWS_", "AZURE_", "GOOGLE_", "GCLOUD_", "STORAGE_EMULATOR_", "BOTO_")
# what the tests themselves are told by
FOR_THE_TESTS = (
    "WMTP_TEST_DATA",
    "WMTP_TEST_COMPILE",
    "WMTP_TEST_MACHINES",
    "WMTP_BASE_IMAGE",
    "WMTP_REQUIRE_CONTAINERS",
    "WMTP_VENV",
)


@pytest.fixture
def use_environ(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give the process these variables, and nobody else's credentials."""

    def use(environ: Any) -> None:
        for name in list(os.environ):
            if name.startswith(CREDENTIALS):
                monkeypatch.delenv(name)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.fixture(scope="session", autouse=True)
def _heed_signals():
    """Under nohup, or behind `&` in a script, signals are ignored, and whatever the tests start would inherit it."""
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """No setting of the person who runs the tests reaches the code under test."""
    for name in list(os.environ):
        if name.startswith(("WMTP_", "CLOUD_", "MLFLOW_")) and name not in FOR_THE_TESTS:
            monkeypatch.delenv(name)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of so many kilobytes, or give the one that is there another size."""
    folder = tmp_path / "disk"
    with ExitStack() as stack:

        def mount(kilobytes):
            if folder.is_mount():
                subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", folder], check=True)
            else:
                stack.enter_context(mounted(folder, f"size={kilobytes}k"))
            return folder

        yield mount


@pytest.fixture
def one_thread():
    """Torch with one thread: tiny tensors gain nothing from more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_settings() -> tuple[str, ...]:
    """`--set` values of a run that takes about a second."""
    return TINY


def write_every_save(patch: pytest.MonkeyPatch) -> None:
    """Let no save take another's place, however busy the machine: tests say which steps are there."""
    from wmtp_worker.checkpoint import saver
    from wmtp_worker.checkpoint.queue import Queue

    patch.setattr(saver, "Queue", lambda replaces, tick: Queue(replaces=False, tick=tick))


@pytest.fixture(scope="session")
def tiny_run() -> Callable[..., Any]:
    """Train the tiny run in this process: `tiny_run(workdir, *overrides, stop=…, resume=…)` returns the summary.

    Without `report=True` the report is empty: making it takes as long as all the rest.
    """

    def train(
        workdir: Path,
        *overrides: str,
        stop: StopRequest | None = None,
        resume: Any = "auto",
        report: bool = False,
    ) -> Any:
        from wmtp_worker.training import report as pages
        from wmtp_worker.training import run

        settings = load(
            overrides=[*TINY, *overrides],
            options={"run.name": TINY_RUN, "run.workdir": str(workdir), "run.resume": resume},
            environ={},
        )
        with pytest.MonkeyPatch.context() as patch:
            write_every_save(patch)
            if not report:
                patch.setattr(pages, "write_report", lambda records, path: path.touch())
            return run.run(settings, stop or StopRequest(), Console(file=io.StringIO()))

    return train


@pytest.fixture(scope="session")
def run_record() -> Callable[..., dict[str, Any]]:
    """Everything about a finished run that must not depend on how often it was interrupted."""

    def record(workdir: Path, run: str = TINY_RUN) -> dict[str, Any]:
        from wmtp_worker.tracking.metrics import read

        paths = RunPaths(workdir, run)
        timeless = [
            {key: value for key, value in line.items() if key not in ("seconds", "wait", "time")}
            for line in read(paths.metrics)
        ]
        last = max(paths.checkpoints.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
        progress = json.loads((last / "state.json").read_text())["progress"]
        files = (last / "model.safetensors", last / "optimizer.safetensors", paths.final, paths.best)
        return {
            "metrics": timeless,
            # a stop within the last validation saves before it; its numbers are in final.pt all the same
            "progress": {key: progress[key] for key in ("step", "position", "tokens", "stopped_early")},
            "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        }

    return record


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> Path:
    """A Llama folder as transformers saves it, with the packaged tokenizer, 512 positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from wmtp_worker.data.tokenizer import PACKAGED, load_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(PACKAGED).save_pretrained(folder)
    return folder
