"""What a server is told of a run, without a server."""

import pytest

from wmtp_worker.settings import load
from wmtp_worker.tracking.artifacts import folder_of
from wmtp_worker.tracking.facts import describe
from wmtp_worker.tracking.record import TrackedRun, read_servers, write_server
from wmtp_worker.tracking.rows import Row, rows_of


def test_numbers_become_rows_with_the_time_of_their_line():
    line = {"kind": "train", "step": 3, "time": 2.5, "loss": 1.5, "head_loss": [1, 2.0], "rows": "abc", "whole": True}
    assert rows_of(line) == [
        Row("loss", 1.5, 2500, 3),
        Row("head_loss_1", 1.0, 2500, 3),
        Row("head_loss_2", 2.0, 2500, 3),
    ]
    assert rows_of(line) == rows_of(dict(line))


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ({"kind": "value", "step": 1, "time": 1.0, "loss": 2.0}, ["value_loss"]),
        ({"kind": "validation", "step": 1, "perplexity": 2.0}, ["validation_perplexity"]),
        (
            {"kind": "train", "step": 1, "td_error_mean": 0.1, "weight_entropy": 0.9},
            ["td_error_mean", "weight_entropy"],
        ),
        ({"kind": "system", "step": 1, "cpu_utilization_percentage": 5}, ["system/cpu_utilization_percentage"]),
        ({"kind": "train", "step": 1, "scores": {"a": 1, "b": {"c": 2}}}, ["scores_a", "scores_b_c"]),
        ({"kind": "train", "loss": 2.0}, []),
        ({"step": 1, "loss": 2.0}, []),
    ],
)
def test_names(line, keys):
    assert [row.key for row in rows_of(line)] == keys


def record(**changes) -> TrackedRun:
    return TrackedRun(run="r", experiment="e", settings_digest="d").model_copy(update=changes)


@pytest.mark.parametrize(
    ("earlier", "start", "resume", "same"),
    [
        (record(status="KILLED"), 20, "auto", True),
        (record(status="RUNNING"), 0, "auto", True),  # killed before the first save
        (record(status="FINISHED"), 60, "auto", True),
        (record(status="FAILED"), 20, "auto", True),
        (record(status="FAILED"), 0, "auto", False),
        (record(status="FINISHED"), 0, "auto", False),
        (record(status="KILLED", settings_digest="other"), 0, "auto", False),
        (record(status="KILLED"), 0, "never", False),
        (record(status="KILLED"), 20, 20, False),
    ],
)
def test_which_run_goes_on(earlier, start, resume, same):
    now = record(params={"lr": "2"})
    found = earlier.continued_by(now, start, resume)
    assert (found.key == earlier.key) == same
    assert found.previous == (None if same else earlier.key)
    assert found.params == {"lr": "2"}
    assert (found.created == earlier.created) == same


def test_a_record_survives_its_file(tmp_path):
    one = record(tags={"a": "b"})
    one.write(tmp_path / "run.json")
    assert TrackedRun.load(tmp_path / "run.json") == one
    (tmp_path / "run.json").write_text("{")
    assert TrackedRun.load(tmp_path / "run.json") is None
    write_server(tmp_path / "servers.json", "http://a", {"run_id": "1"})
    write_server(tmp_path / "servers.json", "http://b", {"run_id": "2"})
    assert read_servers(tmp_path / "servers.json") == {"http://a": {"run_id": "1"}, "http://b": {"run_id": "2"}}


def test_a_run_is_described_without_its_secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("WMTP_IMAGE_DIGEST", "sha256:abc")
    monkeypatch.setenv("WMTP_GIT_COMMIT", "c0ffee")
    settings = load(
        preset="smoke",
        recipe="gradient",
        overrides=["tracking.tags=team=nlp,note=planted-secret", "data.dataset=/data/mbpp"],
        environ={},
    )
    found = describe(settings, {"data.dataset": "sha256 " + "ab" * 32}, "cpu", "s3://b/checkpoints/r")
    assert found.experiment == "wmtp/gradient"
    assert found.tags["algo"] == "gradient"
    assert found.tags["horizon"] == str(settings.model.heads)
    assert found.tags["checkpoints"] == found.home == "s3://b/checkpoints/r"
    assert (found.tags["image"], found.tags["git_commit"]) == ("sha256:abc", "c0ffee")
    assert (found.tags["team"], found.tags["note"]) == ("nlp", "***")
    assert found.params["data.version"] == "mbpp@abababababab"
    assert found.params["data.dataset.sha256"] == "ab" * 32
    assert found.params["training.max_steps"] == str(settings.training.max_steps)
    assert "planted-secret" not in found.model_dump_json()


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("training.log", "logs"),
        ("training.log.1", "logs"),
        ("report.png", "reports"),
        ("weights.jsonl", "weight_stats"),
        ("predictions.jsonl", "predictions"),
        ("predictions/mbpp.jsonl", "predictions"),
        ("metrics.jsonl", None),
        (".tmp-report.png-1", None),
    ],
)
def test_where_files_go(name, folder):
    assert folder_of(name) == folder
