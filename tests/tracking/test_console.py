"""What a run logs, for people and for machines."""

import io
import json
import logging

import pytest
from rich.console import Console

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
