"""Compiled decoder layers: the numbers of the eager ones, and the same bits after a resume."""

import os
import shutil

import pytest
import torch

from tests.conftest import TINY, TINY_RUN
from wmtp_worker.errors import SettingsError
from wmtp_worker.settings import load
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.training.compiling import compile_layers

LAYERS = "training.compile=layers"


def test_without_a_compiler_it_says_what_to_do(monkeypatch, tmp_path):
    settings = load(overrides=[*TINY, LAYERS], options={"run.workdir": str(tmp_path)}, environ={})
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SettingsError, match=r"no no-such-compiler .*training\.compile=layers.* name another"):
        compile_layers(settings, torch.nn.Linear(1, 1))


@pytest.mark.slow
@pytest.mark.skipif("WMTP_TEST_COMPILE" not in os.environ, reason="compiles for minutes: set WMTP_TEST_COMPILE=1")
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("default")  # of torch's own modules
def test_a_compiled_run_is_nearly_the_eager_one_and_resumes_to_the_same_bits(
    tiny_run, run_record, tmp_path, monkeypatch, one_thread
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    small = ("training.max_steps=6", "evaluation.every=3", "training.accumulation=1")
    tiny_run(tmp_path / "eager", *small)
    tiny_run(tmp_path / "compiled", *small, LAYERS)
    straight, eager = run_record(tmp_path / "compiled"), run_record(tmp_path / "eager")
    assert any((tmp_path / "code").rglob("*.so"))
    assert straight["files"] != eager["files"]
    for line, other in zip(straight["metrics"], eager["metrics"], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
    # the new process begins with the validation after step 3
    shutil.rmtree(RunPaths(tmp_path / "compiled", TINY_RUN).step(6))
    torch.compiler.reset()
    assert tiny_run(tmp_path / "compiled", *small, LAYERS).resumed_from == 3
    assert run_record(tmp_path / "compiled") == straight
