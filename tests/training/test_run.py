"""Whole tiny runs in this process: what they leave, how they resume, how they end."""

import fcntl
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.training.stopping import StopAfter
from wmtp_worker.checkpoint.manifest import read_manifest
from wmtp_worker.errors import CheckpointError, InputError, Interrupted, RunHeldError, TrainingDiverged
from wmtp_worker.settings.schema import UNNAMED
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.storage.seal import file_entry
from wmtp_worker.tracking.metrics import read
from wmtp_worker.training.session import SETTINGS


@pytest.fixture
def paths(tmp_path):
    return RunPaths(tmp_path, "tiny")


def steps(paths):
    return sorted(int(path.name.removeprefix("step_")) for path in paths.checkpoints.glob("step_*"))


def kept_aside(paths):
    return sorted(path.name for path in paths.checkpoints.glob("set-aside-*/*"))


def test_a_run_leaves_everything_a_person_looks_for(tiny_run, tmp_path, paths):
    summary = tiny_run(tmp_path, report=True)
    assert (summary.step, summary.steps_taken, summary.resumed_from) == (12, 12, None)
    assert steps(paths) == [9, 12]  # keep_last=2
    assert set(summary.files) == {"report", "metrics", "log", "final model", "best model", "checkpoints"}
    assert "Finished after 12 steps" in paths.record.report.read_text()
    final = torch.load(paths.final, weights_only=True)
    best = torch.load(paths.best, weights_only=True)
    assert final["step"] == 12
    assert best["step"] == summary.best_step
    assert best["validation"]["loss"] == summary.best_loss
    assert json.loads(paths.heartbeat.read_text())["phase"] == "done"
    assert "step 12/12" in paths.training_log.read_text()
    assert not list(paths.checkpoints.glob(".tmp-*"))


def test_the_loss_falls(tiny_run, tmp_path, paths):
    tiny_run(tmp_path, "training.max_steps=30", "training.lr=1e-2", "evaluation.every=0")
    losses = [record["loss"] for record in read(paths.metrics) if record["kind"] == "train"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_checkpoint_tells_what_made_it(tiny_run, tmp_path, paths):
    tiny_run(tmp_path)
    manifest = json.loads((paths.step(12) / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["run"] == "tiny"
    assert manifest["world_size"] == 1
    assert set(manifest["files"]) == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "settings.json",
        "config.json",
    }
    resolved = json.loads((paths.step(12) / "settings.json").read_text())["resolved"]
    assert resolved["training.max_steps"] == 12


def test_a_finished_run_is_left_as_it_is(tiny_run, run_record, tmp_path):
    tiny_run(tmp_path)
    before = run_record(tmp_path)
    again = tiny_run(tmp_path)
    assert again.steps_taken == 0
    assert run_record(tmp_path) == before


def test_auto_passes_over_damaged_checkpoints_loudly(tiny_run, run_record, tmp_path, paths):
    tiny_run(tmp_path)
    expected = run_record(tmp_path)
    model = paths.step(12) / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    summary = tiny_run(tmp_path)
    assert summary.resumed_from == 9
    log = paths.training_log.read_text()
    assert "passed over checkpoint step_12: model.safetensors has" in log
    assert run_record(tmp_path) == expected
    # the damaged one is kept for inspection, out of the way of the one that took its place
    assert kept_aside(paths) == ["final.pt", "step_12"]


def test_a_checkpoint_without_a_manifest_is_passed_over_loudly(tiny_run, tmp_path, paths):
    tiny_run(tmp_path)
    (paths.step(12) / "manifest.json").unlink()
    assert tiny_run(tmp_path).resumed_from == 9
    assert "passed over checkpoint step_12: no manifest.json" in paths.training_log.read_text()


def test_what_is_saved_after_a_damaged_checkpoint_is_kept(tiny_run, tmp_path, paths):
    tiny_run(tmp_path)
    (paths.step(12) / "state.json").unlink()
    # the damaged one is newer by number, and only one is to be kept
    with pytest.raises(Interrupted, match=r"saved: .*step_10"):
        tiny_run(tmp_path, "checkpoint.keep_last=1", stop=StopAfter(4))
    assert steps(paths) == [10, 12]
    assert tiny_run(tmp_path).resumed_from == 10


def test_the_last_good_checkpoint_is_one_that_verifies(tiny_run, tmp_path, paths):
    tiny_run(tmp_path)
    (paths.step(12) / "state.json").unlink()
    diverging = ("training.lr=1e30", "training.grad_clip=0", "run.accept_changes=training.lr,training.grad_clip")
    with pytest.raises(TrainingDiverged, match=r"the last good checkpoint: \S*step_9 "):
        tiny_run(tmp_path, *diverging)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "settings.json"])
def test_one_changed_byte_is_noticed(name, tiny_run, tmp_path, paths):
    tiny_run(tmp_path, "training.max_steps=3")
    content = bytearray((paths.step(3) / name).read_bytes())
    content[len(content) // 2] ^= 1
    (paths.step(3) / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} was changed"):
        tiny_run(tmp_path, "training.max_steps=3", resume=3)


def test_when_none_verifies_the_run_starts_anew_and_keeps_the_old(tiny_run, run_record, tmp_path, paths):
    tiny_run(tmp_path)
    expected = run_record(tmp_path)
    for step in steps(paths):
        (paths.step(step) / "optimizer.safetensors").unlink()
    summary = tiny_run(tmp_path)
    assert summary.resumed_from is None
    assert run_record(tmp_path) == expected
    assert "no checkpoint of run 'tiny' verifies" in paths.training_log.read_text()
    kept = {path.name for path in paths.checkpoints.glob("set-aside-*/*")}
    assert kept == {"step_9", "step_12", "best_model.pt", "final.pt", "metrics.jsonl", "weights.jsonl", "report.html"}


def test_a_newer_format_is_never_passed_over(tiny_run, tmp_path, paths):
    tiny_run(tmp_path)
    manifest = paths.step(12) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CheckpointError, match="format 2 is newer"):
        tiny_run(tmp_path)
    assert steps(paths) == [9, 12]


def test_never_sets_the_old_run_aside(tiny_run, run_record, tmp_path, paths):
    tiny_run(tmp_path)
    expected = run_record(tmp_path)
    assert tiny_run(tmp_path, resume="never").steps_taken == 12
    assert run_record(tmp_path) == expected
    kept = {path.name for path in paths.checkpoints.glob("set-aside-*/*")}
    assert kept == {"step_9", "step_12", "best_model.pt", "final.pt", "metrics.jsonl", "weights.jsonl", "report.html"}


def test_a_wanted_step_goes_back_to_it(tiny_run, tmp_path, paths):
    tiny_run(tmp_path)
    first = torch.load(paths.final, weights_only=True)["model"]
    summary = tiny_run(tmp_path, resume=9)
    assert (summary.resumed_from, summary.steps_taken) == (9, 3)
    second = torch.load(paths.final, weights_only=True)["model"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert kept_aside(paths) == ["best_model.pt", "final.pt", "step_12"]


def test_going_back_records_no_validation_twice_and_finds_a_best_model(tiny_run, tmp_path, paths):
    tiny_run(tmp_path, "evaluation.every=3")
    summary = tiny_run(tmp_path, "evaluation.every=3", resume=9)
    validated = [record["step"] for record in read(paths.metrics) if record["kind"] == "validation"]
    assert validated == [3, 6, 9, 12]
    assert torch.load(paths.best, weights_only=True)["step"] == summary.best_step


# only the first validation is the best
FIRST_IS_BEST = "training.early_stopping.min_delta=100"


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_killed_while_going_back(moves, tiny_run, tmp_path, paths, monkeypatch):
    class Killed(BaseException):
        pass

    def move(source, target):
        nonlocal moves
        if not moves:
            raise Killed
        moves -= 1
        os.rename(source, target)

    tiny_run(tmp_path, FIRST_IS_BEST)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "move", move)
        with pytest.raises(Killed):
            tiny_run(tmp_path, FIRST_IS_BEST, resume=9)
    assert tiny_run(tmp_path, FIRST_IS_BEST, resume=9).best_step == 12
    assert kept_aside(paths) == ["best_model.pt", "final.pt", "step_12"]
    assert torch.load(paths.best, weights_only=True)["step"] == 12


def test_stopped_just_after_going_back(tiny_run, tmp_path, paths):
    assert tiny_run(tmp_path, FIRST_IS_BEST).best_step == 4
    with pytest.raises(Interrupted):
        tiny_run(tmp_path, FIRST_IS_BEST, resume=9, stop=StopAfter(1))
    assert not paths.best.exists()
    assert tiny_run(tmp_path, FIRST_IS_BEST).best_step == 12
    assert torch.load(paths.best, weights_only=True)["step"] == 12


def test_a_best_model_that_is_gone_is_found_anew(tiny_run, tmp_path, paths):
    tiny_run(tmp_path)
    paths.best.unlink()
    assert tiny_run(tmp_path).best_step == 12
    assert torch.load(paths.best, weights_only=True)["step"] == 12


def test_a_step_that_is_not_there(tiny_run, tmp_path):
    tiny_run(tmp_path)
    with pytest.raises(InputError, match=r"no checkpoint of step 7.*its steps \(9, 12\)"):
        tiny_run(tmp_path, resume=7)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.lr=2e-3", "training.lr"),
        ("model.hidden_size=64", "model.hidden_size"),
        ("model.heads=3", "model.heads"),
        ("run.seed=7", "run.seed"),
        ("training.max_steps=15", "training.max_steps"),
    ],
)
def test_other_settings_are_named(override, key, tiny_run, tmp_path):
    tiny_run(tmp_path)
    with pytest.raises(InputError, match=rf"made with other settings: {key}: .* in the checkpoint, .* now"):
        tiny_run(tmp_path, override)


def test_a_checkpoint_from_before_a_setting_goes_on(tiny_run, tmp_path, paths):
    tiny_run(tmp_path)
    folder = paths.step(12)
    settings = json.loads((folder / SETTINGS).read_text())
    for key in UNNAMED:
        del settings["identity"][key]
    (folder / SETTINGS).write_text(json.dumps(settings))
    manifest = read_manifest(folder)
    files = {**manifest.files, SETTINGS: file_entry(folder / SETTINGS)}
    manifest.model_copy(update={"files": files}).write(folder)
    assert tiny_run(tmp_path, "training.max_steps=13", "run.accept_changes=training.max_steps").resumed_from == 12
    with pytest.raises(InputError, match=r"training\.moments: 'fp32' in the checkpoint, 'bf16' now"):
        tiny_run(tmp_path, "training.moments=bf16", resume=12)


def test_other_data_is_named(tiny_run, tmp_path):
    tiny_run(tmp_path)
    folder = tmp_path / "datasets" / "mine"
    folder.mkdir(parents=True)
    line = json.dumps({"task_id": 1, "text": "Say one.", "code": "print(1)"}) + "\n"
    (folder / "train.jsonl").write_text(line)
    (folder / "validation.jsonl").write_text(line)
    with pytest.raises(InputError, match=r"data\.dataset: 'sha256 \w{64}' in the checkpoint, 'sha256 \w{64}' now"):
        tiny_run(tmp_path, "data.dataset=mine")
    # as the error says, it may be accepted
    accepted = ("data.dataset=mine", "training.max_steps=13", "run.accept_changes=data.dataset,training.max_steps")
    assert tiny_run(tmp_path, *accepted).steps_taken == 1


def test_a_stop_never_advises_what_would_do_it_all_again(tiny_run, tmp_path):
    with pytest.raises(Interrupted, match=r"saved: .*step_2 -> go on from there with --resume auto"):
        tiny_run(tmp_path, resume="never", stop=StopAfter(5))


def test_the_log_says_how_the_run_ended(tiny_run, tmp_path, paths):
    # it is what is left when the machine with the console is gone
    with pytest.raises(Interrupted):
        tiny_run(tmp_path, "logging.level=error", stop=StopAfter(5))
    log = paths.training_log.read_text()
    assert "ended by stopped by test; saved:" in log
    assert "Traceback" not in log


def test_an_accepted_change_extends_a_finished_run(tiny_run, tmp_path, paths):
    tiny_run(tmp_path)
    summary = tiny_run(tmp_path, "training.max_steps=15", "run.accept_changes=[training.max_steps]")
    assert (summary.resumed_from, summary.step) == (12, 15)
    assert torch.load(paths.final, weights_only=True)["step"] == 15
    (before,) = paths.checkpoints.glob("set-aside-*/final.pt")
    assert torch.load(before, weights_only=True)["step"] == 12


def test_what_does_not_matter_may_change(tiny_run, tmp_path):
    tiny_run(tmp_path, "training.max_steps=6", "checkpoint.every=3", "logging.every=4")
    assert tiny_run(tmp_path, "training.max_steps=6", "checkpoint.every=2", "logging.every=1").steps_taken == 0


def test_two_workers_never_train_one_run(tiny_run, tmp_path, paths):
    paths.checkpoints.mkdir(parents=True)
    with paths.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"pid {os.getpid()} on here")
        lock.flush()
        with pytest.raises(RunHeldError, match=f"already being trained by pid {os.getpid()}") as error:
            tiny_run(tmp_path)
    assert error.value.exit_code == 79


def test_nan_stops_before_it_reaches_the_weights(tiny_run, tmp_path, paths):
    # a learning rate that blows up within a few steps
    settings = ("training.lr=1e30", "training.grad_clip=0", "checkpoint.every=1", "training.warmup_steps=0")
    with pytest.raises(TrainingDiverged, match=r"the last good checkpoint: ") as error:
        tiny_run(tmp_path, *settings, report=True)
    assert "Ended with an error at step" in paths.record.report.read_text()
    assert error.value.exit_code == 78
    newest = paths.step(steps(paths)[-1])
    assert str(newest) in error.value.what
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())


def test_early_stopping_survives_a_resume(tiny_run, run_record, tmp_path):
    settings = ("training.early_stopping.patience=1", "training.early_stopping.min_delta=100", "evaluation.every=2")
    summary = tiny_run(tmp_path / "straight", *settings)
    assert (summary.stopped_early, summary.step) == (True, 4)
    # after the first validation, before the one that stops the run
    with pytest.raises(Interrupted, match=r"saved: .*step_3"):
        tiny_run(tmp_path / "interrupted", *settings, stop=StopAfter(10))
    tiny_run(tmp_path / "interrupted", *settings)
    assert run_record(tmp_path / "interrupted") == run_record(tmp_path / "straight")
    assert tiny_run(tmp_path / "interrupted", *settings).steps_taken == 0


def test_accumulation_and_one_large_batch_agree(tiny_run, tmp_path):
    quick = ("training.max_steps=3", "evaluation.every=0")
    tiny_run(tmp_path / "a", *quick, "training.micro_batch_size=4", "training.accumulation=1")
    tiny_run(tmp_path / "b", *quick, "training.micro_batch_size=1", "training.accumulation=4")
    one, other = (
        [record["loss"] for record in read(RunPaths(tmp_path / name, "tiny").metrics) if record["kind"] == "train"]
        for name in "ab"
    )
    assert one == pytest.approx(other, rel=1e-4)


def test_bf16_trains_and_resumes_exactly(tiny_run, run_record, tmp_path):
    tiny_run(tmp_path / "straight", "training.precision=bf16", "training.max_steps=6")
    with pytest.raises(Interrupted, match=r"saved: .*step_4"):
        tiny_run(tmp_path / "interrupted", "training.precision=bf16", "training.max_steps=6", stop=StopAfter(11))
    tiny_run(tmp_path / "interrupted", "training.precision=bf16", "training.max_steps=6")
    assert run_record(tmp_path / "interrupted") == run_record(tmp_path / "straight")
