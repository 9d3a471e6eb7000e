"""Benchmarks run seldom: what they import must be there all the same."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_all_benchmarks_can_be_started():
    # compression.py says itself which package it needs beside ours
    names = sorted({path.stem for path in FOLDER.glob("*.py")} - {"compression"})
    assert len(names) > 15
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
