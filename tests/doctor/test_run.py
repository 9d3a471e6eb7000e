"""Checks of the run that is meant: room and time for what it saves, and where its model and data are."""

import pytest

from wmtp_worker.doctor import run
from wmtp_worker.doctor.check import Probe, examine
from wmtp_worker.planning.sizes import Sizes

GB = 10**9
SIZES = Sizes(checkpoint=12 * GB, trained=4 * GB, frozen=0, export=3 * GB)


@pytest.mark.parametrize(
    ("kept", "free", "held", "status"),
    [
        (3, 60, 0, "pass"),  # 4 × 12 + 2 × 3
        (3, 40, 20, "pass"),
        (3, 50, 0, "warn"),
        (1, 50, 0, "pass"),
        (3, 14, 0, "fail"),
        (3, 14, 20, "warn"),
    ],
)
def test_room_for_what_is_kept(kept, free, held, status):
    check = run.judge_room(SIZES, kept, free * GB, held * GB)
    assert (check.status, bool(check.advice)) == (status, status != "pass")
    assert "12.0 GB a checkpoint" in check.found


@pytest.mark.parametrize(
    ("seconds", "write", "upload", "uploads", "must", "status", "words"),
    [
        (None, None, None, True, False, "pass", "vast promises no time"),
        (120, 1e9, None, False, False, "pass", "vast gives 120 s: written in about 20 s (at 1000 MB/s to the disk)"),
        (5, 1e9, None, False, False, "warn", "nothing can be written in time"),
        (15, 1e9, None, False, False, "warn", "all of it would take 20 s, the trained weights alone about 8 s"),
        # after a signal the disk stays: the upload may go on where it was
        (30, 1e9, 1e7, True, False, "pass", "the upload may not end in time"),
        # after a notice of a cloud only the bucket counts
        (120, 1e9, 1e9, True, True, "pass", "written and uploaded in about 38 s"),
        (120, 1e9, 1e7, True, True, "warn", "10 MB/s to the bucket"),
    ],
)
def test_time_for_the_last_save(seconds, write, upload, uploads, must, status, words):
    check = run.judge_notice(SIZES, seconds, "vast", write, upload, uploads=uploads, must_upload=must)
    assert words in check.found
    assert (check.status, bool(check.advice)) == (status, status != "pass")


def test_who_says_how_much_time_there_is(case):
    assert run._seconds(case(environ={"RUNPOD_POD_ID": "x"})) == (5, "runpod")
    told = {"RUNPOD_POD_ID": "x", "WMTP_STOP_GRACE_SECONDS": "60"}
    assert run._seconds(case(environ=told)) == (60, "WMTP_STOP_GRACE_SECONDS")
    assert run._seconds(case(environ={"WMTP_STOP_GRACE_SECONDS": "soon"})) == (None, "bare")


def test_the_sizes_are_those_of_the_run_s_own_model(case):
    one = case(environ={"RUNPOD_POD_ID": "x"})
    assert run.model(one).status == run.room(one).status == run.notice(one).status == "pass"
    assert one.sizes.checkpoint > 2.5 * one.sizes.trained  # AdamW's two moments
    assert one.sizes.trained == pytest.approx(one.sizes.export, rel=0.1)


def assets(one):
    [check] = examine([Probe("model and data", lambda: run.assets(one))])
    return check


def test_where_model_and_data_are(case, tmp_path):
    assert assets(case()).found == "a new model and the packaged sample"
    here = tmp_path / "work" / "models" / "here"
    here.mkdir(parents=True)
    (tmp_path / "bucket/datasets/there").mkdir(parents=True)
    (tmp_path / "bucket/datasets/there/train.jsonl").write_text("{}\n")
    cloud = {"CLOUD_PROVIDER": "local", "CLOUD_BUCKET": str(tmp_path / "bucket")}
    check = assets(case("model.path=here", "data.dataset=there", variables=cloud))
    assert check.status == "pass"
    assert f"model.path: {here}; data.dataset: in the bucket" in check.found
    check = assets(case("model.path=org/name", variables=cloud))
    assert (check.status, "from the Hugging Face hub" in check.found) == ("pass", True)


@pytest.mark.parametrize(
    ("setting", "bucket"),
    [("data.dataset=nowhere", True), ("data.dataset=nowhere", False), ("model.path=./x/y", False)],
)
def test_what_is_nowhere(case, tmp_path, setting, bucket):
    (tmp_path / "bucket").mkdir()
    cloud = {"CLOUD_PROVIDER": "local", "CLOUD_BUCKET": str(tmp_path / "bucket")} if bucket else {}
    check = assets(case(setting, variables=cloud))
    assert (check.status, setting.partition("=")[0] in check.found, bool(check.advice)) == ("fail", True, True)


def test_a_model_that_is_to_be_fetched_says_nothing_of_sizes(case):
    one = case("model.path=org/name")
    assert run.model(one) is run.room(one) is run.notice(one) is None
