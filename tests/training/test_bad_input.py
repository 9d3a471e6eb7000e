"""What a person may get wrong: one clear error, the right exit code, no traceback, nothing lost."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import write_every_save
from wmtp_worker.checkpoint.manifest import Manifest
from wmtp_worker.cli import main
from wmtp_worker.host.stop import STOP
from wmtp_worker.model.loading import load as load_model

PROBLEM = {"task_id": 1, "text": "Say one.", "code": "print(1)", "test_list": ["assert True or 1"]}


@pytest.fixture
def wmtp(capsys, monkeypatch, tmp_path, tiny_settings):
    """Run a command in this process; returns (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WMTP_WORKDIR", str(tmp_path / "work"))
    write_every_save(monkeypatch)

    def run(*arguments: str) -> tuple[int, str]:
        if arguments[0] == "train":
            # a model from a folder brings its own shape
            given = any(argument.startswith("model.path=") for argument in arguments)
            settings = [item for item in tiny_settings if not (given and item.startswith("model."))]
            # the last one wins: what the test sets
            arguments = ("train", *(part for item in settings for part in ("--set", item)), *arguments[1:])
        try:
            code = main(arguments)
        finally:
            STOP.uninstall()
        output = capsys.readouterr()
        return code, output.out + output.err

    return run


def refused(result: tuple[int, str], *expected: str, code: int = 78) -> None:
    assert result[0] == code, result[1]
    assert "Traceback" not in result[1]
    for text in expected:
        assert text in result[1]


def test_the_disk_is_too_small_from_the_start(wmtp, small_disk, monkeypatch):
    monkeypatch.setenv("WMTP_WORKDIR", str(small_disk(400)))
    refused(wmtp("train"), "a checkpoint needs", "WMTP_WORKDIR")


def test_the_disk_fills_up_while_training(wmtp, small_disk, monkeypatch):
    folder = small_disk(4000)
    monkeypatch.setenv("WMTP_WORKDIR", str(folder))
    # every step is kept: room for some, not for all
    result = wmtp("train", "--run-name", "full", "--set", "checkpoint.every=1", "--set", "checkpoint.keep_last=99")
    assert result[0] == 0
    assert "the disk is full: removed step_1" in (folder / "logs" / "full" / "training.log").read_text()
    assert not list((folder / "checkpoints" / "full").glob(".tmp-*"))
    # what had been saved is whole: with room again it goes on to the end
    code, listed = wmtp("checkpoints", "verify", "full", "--json")
    assert code == 0
    assert len(json.loads(listed)) >= 2
    subprocess.run(["mount", "-o", "remount,size=20000k", str(folder)], check=True)
    assert wmtp("train", "--run-name", "full")[0] == 0


def test_a_work_directory_that_is_a_file(wmtp, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WMTP_WORKDIR", str(tmp_path / "file"))
    refused(wmtp("train"), str(tmp_path / "file"), "WMTP_WORKDIR")


def test_a_read_only_work_directory(wmtp, small_disk, monkeypatch):
    folder = small_disk(4000)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    monkeypatch.setenv("WMTP_WORKDIR", str(folder))
    refused(wmtp("train"), str(folder), "WMTP_WORKDIR")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_work_directory_without_permission(wmtp, tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    monkeypatch.setenv("WMTP_WORKDIR", str(closed))
    refused(wmtp("train"), str(closed), "WMTP_WORKDIR")


@pytest.mark.parametrize("name", ["checkpoints/x/.lock", "logs/x/metrics.jsonl", "logs/x/training.log"])
def test_a_folder_where_a_file_should_be(name, wmtp, tmp_path):
    (tmp_path / "work" / name).mkdir(parents=True)
    refused(wmtp("train", "--run-name", "x"), f"cannot write {tmp_path / 'work' / name}: Is a directory")


def test_odd_things_among_the_checkpoints_stop_nothing(wmtp, tmp_path):
    folder = tmp_path / "work/checkpoints/x"
    for name in ("step_007", "step_-1", "step_1e3"):
        (folder / name).mkdir(parents=True)
    (folder / "step_3").symlink_to("nowhere")
    (folder / "step_6").write_text("a file")
    (folder / ".tmp-step_9-1").symlink_to(tmp_path)
    assert wmtp("train", "--run-name", "x")[0] == 0
    code, listed = wmtp("checkpoints", "verify", "x", "--json")
    assert code == 0
    assert [item["name"] for item in json.loads(listed)] == ["step_9", "step_12"]
    assert (folder / "step_007").is_dir()


@pytest.mark.parametrize(
    ("line", "problem"),
    [("", "empty line"), ("{", "malformed"), ('{"task_id": 1, "text": "x"}', "code: Field required"), ("[1]", "malf")],
)
def test_a_bad_line_of_data(line, problem, wmtp, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    good = json.dumps(PROBLEM)
    (folder / "train.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    (folder / "validation.jsonl").write_text(f"{good}\n")
    refused(wmtp("train", "--set", f"data.dataset={folder}"), problem, f"{folder}/train.jsonl, line 2")


def test_a_data_set_that_is_not_there(wmtp, tmp_path):
    refused(wmtp("train", "--set", "data.dataset=mbbp"), "data.dataset='mbbp'", str(tmp_path / "work/datasets/mbbp"))


@pytest.mark.parametrize("key", ["data.dataset", "model.path", "model.tokenizer"])
def test_a_name_too_long_for_the_file_system(key, wmtp):
    refused(wmtp("train", "--set", f"{key}={'long' * 2000}"), f"{key}='long", "is not there", "that exists")


def test_samples_that_do_not_fit(wmtp):
    refused(wmtp("train", "--set", "data.sequence_length=64"), "longer than data.sequence_length=64")


def test_a_sequence_longer_than_the_model(wmtp, tmp_path, tiny_model_folder):
    result = wmtp("train", "--set", f"model.path={tiny_model_folder}", "--set", "data.sequence_length=2048")
    refused(result, "data.sequence_length=2048", "512")


def test_a_policy_of_other_heads_before_a_value_model_is_trained_for_it(wmtp, tmp_path, tiny_model_folder):
    folder = tmp_path / "of-five"
    shutil.copytree(tiny_model_folder, folder)
    load_model(tiny_model_folder, 5).save_pretrained(folder)
    result = wmtp("train", "--recipe", "critic", "--set", f"model.path={folder}", "--set", "model.heads=2")
    refused(result, "the model has 5 heads, model.heads is 2", "set model.heads=5")
    assert not list(tmp_path.glob("work/checkpoints/*/step_*"))


def test_a_model_that_is_not_there(wmtp):
    refused(wmtp("train", "--set", "model.path=7b_1t_4"), "model.path='7b_1t_4'", "models/7b_1t_4")


@pytest.mark.parametrize("name", ["a/b", "..", "a..b", "-x", "a b"])
def test_a_run_name_that_is_no_name(name, wmtp):
    refused(wmtp("train", f"--run-name={name}"), "run.name")


@pytest.mark.parametrize("step", ["last", "-1", "1.5"])
def test_a_resume_that_is_no_step(step, wmtp):
    refused(wmtp("train", f"--resume={step}"), "run.resume")


def test_a_run_that_is_not_there(wmtp):
    refused(wmtp("checkpoints", "ls", "nothing"), "no run 'nothing'")
    refused(wmtp("evaluate", "nothing"), "no final.pt")


def test_looking_at_a_run_ignores_where_to_go_on(wmtp, monkeypatch):
    assert wmtp("train", "--run-name", "x")[0] == 0
    monkeypatch.setenv("WMTP_RESUME", "1000")
    assert wmtp("checkpoints", "ls", "x")[0] == 0
    code, output = wmtp("evaluate", "x", "--weights", "best")
    assert code == 0
    # which data it was, since it is not the run's own that counts
    assert "data     sample: 18 samples" in output


def test_a_resume_that_finds_nothing_names_what_is_there(wmtp):
    assert wmtp("train", "--run-name", "one")[0] == 0
    code, output = wmtp("train", "--run-name", "two", "--resume", "auto")
    assert code == 0
    assert "run 'two' has no checkpoint to resume; there are one: starting from step 0" in output


def test_a_damaged_checkpoint_is_reported_by_verify(wmtp, tmp_path):
    assert wmtp("train", "--run-name", "x")[0] == 0
    folder = tmp_path / "work/checkpoints/x/step_12"
    (folder / "config.json").write_text("{}")
    code, listed = wmtp("checkpoints", "verify", "x", "--json")
    assert code == 78
    assert [item["status"] for item in json.loads(listed)] == ["verified", "damaged"]
    assert "config.json has 2 bytes" in json.loads(listed)[1]["problem"]
    refused(wmtp("train", "--run-name", "x", "--resume", "12"), "config.json has 2 bytes", "--resume auto")


@pytest.fixture
def sealed(tmp_path):
    """The folder of a checkpoint of run x, step 12, that has a manifest and nothing else."""
    folder = tmp_path / "work/checkpoints/x/step_12"
    folder.mkdir(parents=True)
    manifest = Manifest(step=12, run="x", created="", settings_digest="", worker_version="", torch_version="", files={})
    manifest.write(folder)
    return folder


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd", "..", "", "a\0b", "\ud800", "a\nb", "[/x]"])
def test_a_manifest_that_names_no_file_of_its_folder(name, wmtp, sealed):
    document = json.loads((sealed / "manifest.json").read_text())
    document["files"] = {name: {"size": 0, "sha256": "0" * 64}}
    (sealed / "manifest.json").write_text(json.dumps(document))
    refused(wmtp("checkpoints", "verify", "x", "--json"), "outside its folder, or none")
    refused(wmtp("checkpoints", "verify", "x"), "step_12")
    refused(wmtp("train", "--run-name", "x", "--resume", "12"), "outside its folder, or none")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"format_version": NaN}', "\udcff"])
def test_a_manifest_that_is_none(text, wmtp, sealed):
    (sealed / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(wmtp("checkpoints", "verify", "x", "--json"), "manifest.json is malformed")


def test_a_checkpoint_under_the_name_of_another_step(wmtp, sealed):
    sealed.rename(sealed.with_name("step_99"))
    refused(wmtp("checkpoints", "verify", "x", "--json"), "manifest.json is of step 12")


def test_weights_that_are_not_ours(wmtp, tmp_path):
    assert wmtp("train", "--run-name", "x")[0] == 0
    (tmp_path / "work/checkpoints/x/final.pt").write_bytes(b"no weights")
    refused(wmtp("evaluate", "x"), "final.pt does not load")
    refused(wmtp("evaluate", "x", "--weights", "worst"), "'worst' names no weights")


@pytest.mark.parametrize("shown", [(), ("--json",)])
def test_a_secret_in_a_path_shows_nowhere(shown, wmtp, tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    workdir = tmp_path / "planted-secret"
    monkeypatch.setenv("WMTP_WORKDIR", str(workdir))
    shutil.copytree(tiny_model_folder, workdir / "models/m")
    code, output = wmtp("train", "--set", "model.path=m", "--set", "model.heads=2", *shown)
    assert code == 0
    assert "***" in output
    assert "planted-secret" not in output
    for folder in ("checkpoints", "logs"):
        assert not [path for path in (workdir / folder).rglob("*") if path.is_file() and holds(path, b"planted-secret")]


def holds(path: Path, secret: bytes) -> bool:
    return secret in path.read_bytes()
