"""Small file systems, for the tests of full and of read-only disks."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A tmpfs with these options at `folder`, which is made; gone afterwards, also where the tests are killed."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    # its standard input ends with this process at the latest
    guard = subprocess.Popen(
        ["sh", "-c", 'cat; exec umount -l "$0"', folder], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        guard.communicate(timeout=60)
        assert guard.returncode == 0
