"""What a run without a bucket does not even import."""

import json
import os
import subprocess
import sys

import pytest

SDKS = ("boto3", "botocore", "s3transfer", "obstore", "google.cloud", "google.auth", "azure", "mlflow")
REPORT = """
import json, sys
from wmtp_worker.cli import main
{code}
print("\\n" + json.dumps([name for name in sys.modules if name.startswith({sdks!r})]))
"""


def imported(code, folder):
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("WMTP_", "CLOUD_"))}
    program = REPORT.format(code=code, sdks=SDKS)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env=environ | {"WMTP_ENV_FILE": os.devnull, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "code",
    [
        "import wmtp_worker.cli.app",
        "import wmtp_worker.storage, wmtp_worker.storage.open, wmtp_worker.storage.cloud, wmtp_worker.assets.manage",
        "assert main(['assets', 'ls']) == 0",
        "import os; os.mkdir('b'); assert main(['sync', 'push', 'b', 'c']) == 0",
    ],
)
def test_no_cloud_package_without_a_cloud(tmp_path, code):
    assert imported(code, tmp_path) == []


def test_a_smoke_run_needs_no_cloud_package(tmp_path, tiny_settings):
    options = [part for setting in (*tiny_settings, "training.max_steps=2") for part in ("--set", setting)]
    code = f"assert main(['train', '--preset', 'smoke', *{options!r}]) == 0"
    assert imported(code, tmp_path) == []
