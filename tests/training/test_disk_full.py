"""A disk that fills up while a run trains: the training never ends for it, and the end says what is missing."""

import sys
from contextlib import suppress

import pytest

from wmtp_worker.checkpoint.manifest import verify
from wmtp_worker.checkpoint.restore import find
from wmtp_worker.errors import DiskFullError, Interrupted
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.host.workdir import prepare
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.metrics import read


def test_the_training_goes_on(small_disk, tiny_run, tmp_path):
    folder = small_disk(2600)  # room for one checkpoint and the exports, not for two checkpoints
    paths = RunPaths(folder, "tiny")
    with pytest.raises(DiskFullError, match="the run is finished, but step_12 could not be saved") as error:
        tiny_run(folder, "checkpoint.keep_last=3")
    assert error.value.exit_code == 78
    assert "step_6 is NOT saved, the training goes on" in paths.training_log.read_text()
    assert find(paths, "auto").manifest.step == 3
    assert [line["step"] for line in read(paths.metrics) if line["kind"] == "train"] == list(range(1, 13))
    tiny_run(tmp_path / "elsewhere")
    final = RunPaths(tmp_path / "elsewhere", "tiny").final.read_bytes()
    assert paths.final.read_bytes() == final
    # once there is room, the same command trains the steps between again
    small_disk(20_000)
    assert tiny_run(folder, "checkpoint.keep_last=3").resumed_from == 3
    assert paths.final.read_bytes() == final


# a checkpoint has 1160 kB, the weights 390; with 4000, three checkpoints are there at last, and no room for final.pt
@pytest.mark.parametrize(("kilobytes", "missing"), [(1400, ["step_11", "final.pt"]), (3000, []), (4000, [])])
def test_whenever_it_fills_up_the_run_gets_to_its_end(kilobytes, missing, small_disk, tiny_run):
    folder = small_disk(kilobytes)
    paths = RunPaths(folder, "tiny")
    said = ""
    try:
        tiny_run(folder, "training.max_steps=11", "checkpoint.every=1", "checkpoint.keep_last=99")
    except DiskFullError as error:
        said = error.what
    assert [name for name in ("step_11", "final.pt") if not (paths.checkpoints / name).exists()] == missing
    assert (f"{' and '.join(missing)} could not be saved" in said) if missing else not said
    for step in paths.steps():
        verify(paths.step(step))
    assert not list(folder.rglob(".tmp-*"))


class Stopped(StopRequest):
    """Asks for a stop in the eighth micro-batch, the second of step 4."""

    polls = 0

    def check(self):
        self.polls += sys._getframe(3).f_code.co_name == "train_step"
        if self.polls == 8:
            self.request("test")
        super().check()


def test_a_disk_full_of_old_checkpoints_keeps_nobody_from_going_on(small_disk, tiny_run):
    every = ("training.max_steps=5", "checkpoint.every=1", "checkpoint.keep_last=99", "evaluation.every=0")
    folder = small_disk(20_000)
    with pytest.raises(Interrupted):
        tiny_run(folder, *every, stop=Stopped())
    small_disk(4000)  # three checkpoints have 3480 kB
    summary = tiny_run(folder, *every)
    assert (summary.resumed_from, summary.step) == (3, 5)


def test_what_a_killed_process_left_half_written_fills_the_disk(small_disk, tiny_run):
    folder = small_disk(5000)
    paths = RunPaths(folder, "tiny")
    with pytest.raises(Interrupted):
        tiny_run(folder, stop=Stopped())
    left = paths.checkpoints / ".tmp-half"
    with left.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    with pytest.raises(DiskFullError):
        prepare(folder)
    summary = tiny_run(folder)
    assert (summary.resumed_from, summary.step) == (3, 12)
    assert not left.exists()
    assert "removed .tmp-half, left half written" in paths.training_log.read_text()


class Filler(StopRequest):
    """Fills the disk to the last byte at the first micro-batch."""

    def __init__(self, path):
        super().__init__()
        self._path = path

    def check(self):
        if sys._getframe(3).f_code.co_name == "train_step" and not self._path.exists():
            with self._path.open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass


def test_when_nothing_at_all_can_be_written_any_more(small_disk, tiny_run):
    folder = small_disk(8000)
    paths = RunPaths(folder, "tiny")
    quick = ("training.max_steps=3", "evaluation.every=0")
    with pytest.raises(DiskFullError, match=r"the run is finished, but step_3 and final\.pt could not be saved"):
        tiny_run(folder, *quick, stop=Filler(folder / "filler"))
    assert read(paths.metrics) == []
    (folder / "filler").unlink()
    assert tiny_run(folder, *quick).resumed_from is None
    assert [line["step"] for line in read(paths.metrics) if line["kind"] == "train"] == [1, 2, 3]
