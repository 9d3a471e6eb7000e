"""`wmtp report`: finding runs, and where the page goes."""

import pytest

from tests.tracking.test_report import train_record, validation_record, write_lines
from wmtp_worker.storage.layout import RunPaths


@pytest.fixture
def workdir(tmp_path):
    for name in ("one", "two"):
        records = [train_record(1), train_record(2), validation_record(2)]
        write_lines(RunPaths(tmp_path / "work", name).metrics, records)
    return tmp_path / "work"


def test_the_page_of_a_run_lies_in_its_logs(command, workdir):
    page = workdir / "logs" / "one" / "report.html"
    assert command("report", "one", WMTP_WORKDIR=str(workdir)).stdout == f"{page}\n"
    assert "<h1>one</h1>" in page.read_text()


def test_a_folder_of_logs_will_do_and_several_are_compared(command, workdir, tmp_path):
    done = command("report", workdir / "logs" / "one", "two", WMTP_WORKDIR=str(workdir))
    assert done.stdout == "comparison.html\n"
    assert "Comparison of one, two" in (tmp_path / "here" / "comparison.html").read_text()
    command("report", "one", "two", "--output", tmp_path / "x" / "y.html", WMTP_WORKDIR=str(workdir))
    assert (tmp_path / "x" / "y.html").is_file()


def test_a_run_that_is_not_there_names_those_that_are(command, workdir):
    said = command("report", "three", code=78, WMTP_WORKDIR=str(workdir)).stderr
    assert "there is no record of a run 'three'" in said
    assert "choose one of one, two" in said
    assert "wmtp sync pull" in said
