"""The package as a wheel: configs, tokenizer and sample data travel with it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_installed_wheel_trains(tmp_path, tiny_settings):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, timeout=240)
    (wheel,) = tmp_path.glob("wmtp_worker-*.whl")
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def python(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=240
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert python("-c", "import wmtp_worker; print(wmtp_worker.__file__)").startswith(str(installed))
    settings = [part for setting in tiny_settings for part in ("--set", setting)]
    output = python("-m", "wmtp_worker", "train", "--preset", "smoke", *settings)
    assert "baseline-smoke: step 12" in output
    assert (elsewhere / "work" / "logs" / "baseline-smoke" / "report.html").is_file()
