"""What a run logs, for people and for machines."""

import io
import json
import logging

import pytest
from rich.console import Console

from wmtp_worker.tracking import console
from wmtp_worker.tracking.console import LogFile, logging_to_console

log = logging.getLogger("wmtp_worker.test")


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    return "planted-secret"


def lines(form, path, planted):
    screen = io.StringIO()
    with logging_to_console("info", Console(file=screen), form), LogFile(path, form) as file:
        file.open()
        log.info("a token: %s", planted)
        try:
            raise ValueError(f"no {planted}")
        except ValueError:
            log.exception("it failed")
        log.debug("for the file")
    return screen.getvalue(), path.read_text()


def test_json_lines_are_whole_and_without_secrets(tmp_path, planted):
    shown, written = lines("json", tmp_path / "training.log", planted)
    records = [json.loads(line) for line in written.splitlines()]
    assert [record["message"] for record in records] == ["a token: ***", "it failed", "for the file"]
    assert [record["level"] for record in records] == ["info", "error", "debug"]
    assert "ValueError: no ***" in records[1]["exception"]
    assert [json.loads(line) for line in shown.splitlines()] == records[:2]


def test_text_is_plain_in_a_pipe(tmp_path, planted):
    shown, written = lines("text", tmp_path / "training.log", planted)
    assert "INFO    a token: ***" in shown
    assert "\x1b" not in shown
    assert planted not in shown + written


def test_a_log_that_grows_is_rotated_and_its_newest_lines_stay_whole(tmp_path, planted, monkeypatch):
    monkeypatch.setattr(console, "_LOG_BYTES", 2000)
    path = tmp_path / "training.log"
    for begin in (0, 200):  # two processes of a run
        with logging_to_console("error", Console(file=io.StringIO())), LogFile(path) as file:
            file.open()
            for number in range(begin, begin + 200):
                log.info("line %d: %s", number, planted)
    names = ["training.log.3", "training.log.2", "training.log.1", "training.log"]
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(names)
    assert all(0 < (tmp_path / name).stat().st_size <= 2000 for name in names)
    kept = "".join((tmp_path / name).read_text() for name in names).splitlines()
    numbers = [int(line.partition("line ")[2].partition(":")[0]) for line in kept]
    assert numbers == list(range(400 - len(kept), 400))
    assert len(kept) > 60
    assert all(line.endswith(": ***") for line in kept)
