"""A push of links that is killed: what it left beside the folder goes with the next push, and nobody else's does."""

import os
import subprocess
import sys

import pytest

from wmtp_worker.assets.links import own_files

HALF = """
import os, sys
from pathlib import Path
from wmtp_worker.assets.links import own_files
with own_files(Path(sys.argv[1])) as own:
    assert (own / "config.json").read_bytes() == b"{}"
    os._exit(9)
"""


@pytest.fixture
def linked(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_bytes(b"{}")
    folder = tmp_path / "models" / "linked"
    folder.mkdir(parents=True)
    (folder / "config.json").symlink_to(tmp_path / "blobs" / "1")
    return folder


@pytest.fixture
def plain(linked):
    folder = linked.with_name("plain")
    folder.mkdir()
    (folder / "config.json").write_bytes(b"{}")
    return folder


def hidden(folder):
    return [name for name in os.listdir(folder.parent) if name.startswith(".")]


@pytest.mark.parametrize("following", ["linked", "plain"])
def test_what_a_killed_one_left_goes_with_the_next(request, linked, following):
    assert subprocess.run([sys.executable, "-c", HALF, str(linked)], timeout=180).returncode == 9
    (left,) = hidden(linked)
    with own_files(request.getfixturevalue(following)) as own:
        assert left not in hidden(linked)
        assert (own / "config.json").read_bytes() == b"{}"
    assert hidden(linked) == []


def test_what_is_in_use_stays(linked, plain):
    with own_files(linked) as first, own_files(linked) as second:
        assert first != second
        with own_files(plain) as own:
            assert own == plain
        assert (first / "config.json").exists()
        assert (second / "config.json").exists()
    assert hidden(linked) == []
