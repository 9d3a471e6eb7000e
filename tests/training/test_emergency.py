"""How a run that is asked to stop ends, when not all of it can be saved."""

import pytest

from wmtp_worker.checkpoint.emergency import Plan
from wmtp_worker.checkpoint.restore import find
from wmtp_worker.checkpoint.saver import Saver
from wmtp_worker.errors import DiskFullError, Interrupted, TrainingDiverged
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.training import loop, saving
from wmtp_worker.training.bucket import RunBucket


@pytest.fixture
def stopped(tiny_run, tmp_path, monkeypatch):
    """`stopped()` trains five steps, is asked to stop, and returns the error that it ends with."""
    stop, step = StopRequest(), loop.train_step

    def stopping(session, prefetcher):
        if session.progress.step == 5:
            stop.request("SIGTERM")
        return step(session, prefetcher)

    monkeypatch.setattr(loop, "train_step", stopping)

    def run(kind=Interrupted):
        with pytest.raises(kind) as caught:
            tiny_run(tmp_path, "evaluation.every=0", stop=stop)
        return caught.value

    return run


def raising(error):
    def save_now(saver, *arguments):
        saver.flush()  # as it waits for what is being written
        raise error

    return save_now


def test_a_full_disk_keeps_what_was_saved_before(stopped, tmp_path, monkeypatch):
    closed = []
    close = RunBucket.close
    monkeypatch.setattr(Saver, "save_now", raising(DiskFullError("the disk is full")))
    monkeypatch.setattr(RunBucket, "close", lambda self, **options: closed.append(options) or close(self, **options))
    error = stopped()
    assert error.exit_code == 75
    assert str(error).endswith("step_3 -> the same command goes on from what is saved")
    assert "step_5 is NOT saved: the disk is full" in RunPaths(tmp_path, "tiny").training_log.read_text()
    assert "seconds" in closed[0]


def test_what_was_wrong_with_the_weights_is_still_told_and_the_uploads_end_in_time(stopped, monkeypatch):
    closed = []
    close = RunBucket.close
    monkeypatch.setattr(Saver, "save_now", raising(TrainingDiverged("the weights are not finite")))
    monkeypatch.setattr(RunBucket, "close", lambda self, **options: closed.append(options) or close(self, **options))
    stopped(TrainingDiverged)
    assert "seconds" in closed[0]


def test_weights_alone_are_not_said_to_be_gone_on_from(stopped, tmp_path, monkeypatch):
    plan = Plan("trainable", 1.0, "all of it would take too long", False)
    monkeypatch.setattr(saving, "choose", lambda **facts: plan)
    error = stopped()
    assert "step_5 (weights only: --resume auto goes on from step 3, --resume 5 from these" in error.what
    paths = RunPaths(tmp_path, "tiny")
    assert find(paths, "auto").manifest.step == 3
    assert find(paths, 5).manifest.kind == "trainable"
