"""`wmtp data`: what is counted, what is labelled, and how mistakes are said."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import wmtp_worker

SAMPLE = Path(wmtp_worker.__file__).parent / "data" / "sample"
TESTS = ["assert f(2) == 4", "assert f(0) == 0"]
MBPP = {"task_id": 1, "text": "Double.", "code": "def f(a):\n    return a * 2", "test_list": TESTS}


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_show_counts_the_sample(command):
    files = {
        split: (SAMPLE / f"{split}.jsonl").read_text().removesuffix("\n").split("\n")
        for split in ("train", "validation")
    }
    wrong = {split: sum(len(json.loads(line)["incorrect_code"]) for line in lines) for split, lines in files.items()}
    shown = command("data", "show", "sample").stdout
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if line[0] == "│"]
    assert rows[0] == ["problems", "124", "18"]
    assert rows[4] == ["incorrect solutions", str(wrong["train"]), str(wrong["validation"])]
    assert "…" not in shown
    report = json.loads(command("data", "show", "sample", "--json").stdout)
    assert report["format"] == "mbpp"
    assert report["splits"]["validation"]["solutions"] == {
        "correct": 18,
        "incorrect": wrong["validation"],
        "unknown": 0,
    }
    assert [digest in shown for digest in report["files"].values()] == [True, True]


def test_label_then_show_then_train_on_it(command, tmp_path):
    data = write(tmp_path / "source" / "train.jsonl", MBPP, MBPP | {"task_id": 2, "code": "def f(a):\n    return a"})
    write(tmp_path / "source" / "validation.jsonl", MBPP)
    labelled = tmp_path / "labelled"
    done = command("data", "label", data.parent, labelled, "--mutations", "2", "--check", "all", "--workers", "1")
    assert done.stdout.startswith(f"{labelled}: train.jsonl, validation.jsonl\n")
    assert "contradicted 1" in done.stdout
    assert "problem 2, published as correct: failed" in done.stderr
    report = json.loads(command("data", "show", labelled, "--json").stdout)
    assert report["format"] == "labelled"
    assert report["splits"]["train"]["solutions"] == {"correct": 1, "incorrect": 3, "unknown": 0}
    assert report["splits"]["train"]["with_both"] == 1
    again = command("data", "label", data.parent, labelled, code=78)
    assert "the folder is not empty" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "nowhere"], ["data.dataset='nowhere' is not there"]),
        (["show", "empty"], ["no train.jsonl"]),
        (["label", "bad", "out"], ["malformed problem", "line 1"]),
        (["show", "bad", "--format", "gsm8k"], ["question: Field required"]),
        (["label", "sample"], ["Missing argument"]),
    ],
)
def test_mistakes_are_said_in_one_line(command, tmp_path, arguments, words):
    (tmp_path / "here" / "empty").mkdir()
    write(tmp_path / "here" / "bad" / "train.jsonl", {"task_id": 1})
    done = command("data", *arguments, code=78)
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


def test_odd_characters_do_not_reach_the_terminal(command, tmp_path):
    folder = tmp_path / "\x1b[31mred"
    write(folder / "train.jsonl", MBPP | {"task_id": 2, "code": "raise Exception('\x1b[31m')"})
    done = command("data", "label", folder, f"{folder}-out", "--check", "all", "--workers", "1")
    assert "\x1b" not in done.stdout + done.stderr


def test_a_stopped_label_goes_on_when_repeated(tmp_path):
    slow = {"code": "import time\ndef f(a):\n    time.sleep(0.5)\n    return a * 2"}
    write(tmp_path / "source" / "train.jsonl", *(MBPP | slow | {"task_id": number} for number in range(8)))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WMTP_", "CLOUD_"))}
    options = {"cwd": tmp_path, "env": kept | {"WMTP_ENV_FILE": os.devnull}, "text": True}
    command = [
        sys.executable,
        "-m",
        "wmtp_worker",
        "data",
        "label",
        "source",
        "out",
        "--check",
        "all",
        "--workers",
        "1",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, **options) as process:
        partial = tmp_path / "out" / ".partial-train.jsonl"
        while not partial.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=180)
    assert process.returncode == 75
    assert "Traceback" not in said
    done = subprocess.run(command, capture_output=True, timeout=180, **options)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 8
