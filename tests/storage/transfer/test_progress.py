"""How far a transfer is: lines in a log, a bar on a terminal."""

import io
import logging
import threading

import pytest
from rich.console import Console

from wmtp_worker.storage.transfer import progress_for
from wmtp_worker.storage.transfer.progress import LogLines, TerminalBar


@pytest.fixture
def quick_lines(monkeypatch, caplog):
    """A line at every step."""
    monkeypatch.setattr(LogLines, "interval", 0.0)
    caplog.set_level(logging.INFO)
    return LogLines("push")


def test_lines_say_how_much_of_what(quick_lines, caplog):
    quick_lines.start(4_000_000)
    quick_lines.advance(1_000_000, 1)
    assert "push: 1.0 of 4.0 MB, 1 files" in caplog.text
    quick_lines.finish()


def test_several_transfers_are_added_up(quick_lines, caplog):
    quick_lines.start(1_000_000)
    quick_lines.start(2_000_000)
    threads = [threading.Thread(target=quick_lines.advance, args=(100_000, 1)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    quick_lines.finish()
    quick_lines.finish()
    assert "2.0 of 3.0 MB, 20 files" in caplog.text
    quick_lines.start(None)  # and begins anew
    quick_lines.advance(5_000_000)
    assert "push: 5.0 MB, 0 files" in caplog.text
    quick_lines.finish()


def test_what_is_quick_says_nothing(caplog):
    caplog.set_level(logging.INFO)
    lines = LogLines("push")
    lines.start(1)
    lines.advance(1, 1)
    lines.finish()
    assert caplog.text == ""


def test_a_terminal_gets_a_bar_and_a_file_does_not():
    terminal, file = io.StringIO(), io.StringIO()
    bar = progress_for(Console(file=terminal, force_terminal=True, width=100), "pull")
    assert isinstance(bar, TerminalBar)
    bar.start(2_000_000)
    bar.advance(2_000_000, 3)
    bar.finish()
    assert "pull" in terminal.getvalue()
    assert "3 files" in terminal.getvalue()
    assert isinstance(progress_for(Console(file=file), "pull"), LogLines)


def test_transfers_tell_their_progress(transfers, bucket, tmp_path, make_file):
    class Told:
        def __init__(self):
            self.calls = []

        def start(self, total):
            self.calls.append(total)

        def advance(self, size, files=0):
            self.calls.append((size, files))

        def finish(self):
            self.calls.append("finished")

    make_file(tmp_path / "folder" / "large", 300_000)
    make_file(tmp_path / "folder" / "small", 100)
    told = Told()
    transfers(bucket, progress=told).push(tmp_path / "folder")
    steps = [call for call in told.calls if isinstance(call, tuple)]
    assert (told.calls[0], told.calls[-1]) == (None, "finished")
    assert (sum(size for size, _ in steps), sum(files for _, files in steps)) == (300_100, 2)
    told.calls.clear()
    transfers(bucket, progress=told).download_file("large", tmp_path / "copy")
    assert (told.calls[0], told.calls[-1]) == (300_000, "finished")
