"""Checkpoints whose manifest agrees with what they hold, and that make no sense all the same: one clear error each."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wmtp_worker.checkpoint.manifest import verify
from wmtp_worker.errors import CheckpointError, InputError
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.settings import load
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.storage.seal import file_entry
from wmtp_worker.training.evaluate import evaluate_run

QUICK = ("training.max_steps=3", "evaluation.every=0")


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("trained")
    tiny_run(workdir, *QUICK)
    return workdir


@pytest.fixture
def paths(trained, tmp_path) -> RunPaths:
    """A copy of the trained run; its only checkpoint is step_3."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return RunPaths(tmp_path, "tiny")


def seal(folder: Path) -> None:
    """Make the manifest agree with the files as they are now."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {name: file_entry(folder / name).model_dump() for name in manifest["files"]}
    path.write_text(json.dumps(manifest))
    verify(folder)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("state.json", "{", "state.json does not load"),
        ("state.json", "[" * 100_000, "state.json does not load"),
        ("state.json", '{"progress": {"step": "x"}, "threads": 1, "device": "cpu"}', r"progress\.step"),
        ("state.json", '{"progress": {"step": -1}, "threads": 1, "device": "cpu"}', r"progress\.step"),
        ("state.json", '{"progress": {"position": {"row": -1}}, "threads": 1, "device": "cpu"}', r"position\.row"),
        ("state.json", '{"progress": {"step": 2}, "threads": 1, "device": "cpu"}', "state.json is of step 2"),
        ("settings.json", "[]", "settings.json does not load"),
        ("model.safetensors", "no tensors", "model.safetensors does not load"),
    ],
)
def test_content_that_makes_no_sense(name, content, complaint, paths, tiny_run, tmp_path):
    (paths.step(3) / name).write_text(content)
    seal(paths.step(3))
    with pytest.raises(CheckpointError, match=complaint):
        tiny_run(tmp_path, *QUICK)


def without_moments(tensors):
    return {name: value for name, value in tensors.items() if "embed_tokens" not in name}


def short_moments(tensors):
    # the fused kernel would write past the end of them
    return {
        name: value.flatten()[:1].clone() if name.startswith("exp_avg") else value for name, value in tensors.items()
    }


def double_moments(tensors):
    return {name: value.double() for name, value in tensors.items()}


def with_another(tensors):
    return {**tensors, "stranger": torch.zeros(1)}


@pytest.mark.parametrize("change", [without_moments, short_moments, double_moments, with_another, lambda tensors: {}])
def test_moments_that_do_not_fit_the_model(change, paths, tiny_run, tmp_path):
    path = paths.step(3) / "optimizer.safetensors"
    save_file(change(load_file(path)), path)
    seal(paths.step(3))
    with pytest.raises(CheckpointError, match="the optimizer's state does not fit the model"):
        tiny_run(tmp_path, *QUICK)


def test_a_file_that_the_manifest_does_not_vouch_for_is_not_read(paths, tiny_run, tmp_path):
    path = paths.step(3) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": {}}))
    with pytest.raises(CheckpointError, match=r"does not list settings\.json"):
        tiny_run(tmp_path, *QUICK)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([1], CheckpointError),
        ({"model": {}, "config": {}}, CheckpointError),
        ({"model": {}, "config": {"hidden_size": -3}, "step": 3}, InputError),
    ],
)
def test_weights_that_make_no_sense(content, error, paths, tiny_settings, tmp_path):
    torch.save(content, paths.final)
    settings = load(overrides=tiny_settings, options={"run.name": "tiny", "run.workdir": str(tmp_path)}, environ={})
    with pytest.raises(error, match=r"final\.pt"):
        evaluate_run(settings, "final", StopRequest())
