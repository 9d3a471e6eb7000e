"""`.env.example`, `docs/settings.md` and the code say the same."""

import re
import subprocess
import sys
from pathlib import Path

from wmtp_worker.settings.environment import KNOWN
from wmtp_worker.settings.secrets import SECRET_VARIABLES

ROOT = Path(__file__).resolve().parents[2]


def test_the_written_reference_is_up_to_date():
    script = ROOT / "scripts/settings_reference.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, timeout=180)
    assert (done.returncode, done.stderr) == (0, "")


def test_env_example_names_every_variable_once_each_with_a_comment():
    lines = (ROOT / ".env.example").read_text().splitlines()
    named = {n: m[1] for n, line in enumerate(lines) if (m := re.match(r"#?([A-Z][A-Z0-9_]*)=", line))}
    known = [*KNOWN, *SECRET_VARIABLES, *(f"{name}_FILE" for name in SECRET_VARIABLES)]
    assert sorted(named.values()) == sorted(known)
    assert all(lines[n - 1].startswith("# ") for n in named)


def test_the_entrypoint_reads_the_same_secrets_from_files():
    script = (ROOT / "entrypoint/entrypoint.sh").read_text()
    listed = re.search(r"SECRET_VARIABLES=\(\n(.*?)\n\)", script, re.DOTALL)
    assert listed
    assert tuple(listed[1].split()) == SECRET_VARIABLES


def test_every_variable_the_scripts_and_templates_name_is_known():
    templates = [path for path in ROOT.glob("docker/**/*") if path.suffix in (".yaml", ".json", ".sh")]
    files = [*ROOT.glob("entrypoint/*.sh"), *ROOT.glob("scripts/*.sh"), ROOT / "Dockerfile", *templates]
    assert len(templates) > 6
    read = {
        name
        for file in files
        for name in re.findall(r"\b(?:WMTP|CLOUD)_[A-Z_]+", file.read_text())
        # the scripts' own, never exported
        if name != "WMTP_ROOT"
    }
    assert read <= set(KNOWN)
