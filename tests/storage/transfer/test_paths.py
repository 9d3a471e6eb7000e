"""No key leaves its folder."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp_worker.errors import InputError
from wmtp_worker.storage.transfer.paths import is_hidden, safe_path, selector

_FOLDER = Path("/nowhere/at/all")
LEAVING = [
    "",
    ".",
    "..",
    "../x",
    "a/../../x",
    "a/..",
    "/etc/passwd",
    "a//b",
    "a/./b",
    "a/",
    "a\\..\\b",
    "a\0b",
    "a\nb",
    "a\x1b[2Jb",
    "a\x85b",
    "\udc80",
    "a/\u2025/b",  # two dot leader, .. by NFKC
    "\u2024\u2024/b",  # two one dot leaders
    "a\uff0fb",  # full-width solidus
    "a\uff3cb",  # full-width backslash
    "\ufe52",  # small full stop
    "\uff0e\uff0e",
    "x" * 256,
    "a/" + "ü" * 128,
]
FINE = [
    "a",
    "a/b",
    "a.b/c..d",
    "...",
    ".hidden/x",
    "ünï/日本 file.bin",
    "a:b",
    "a*?[b]",
    "~root",
    "-rf",
    " a",
    "x" * 255,
]


@pytest.mark.parametrize("key", LEAVING, ids=ascii)
def test_keys_that_could_leave_are_refused(tmp_path, key):
    with pytest.raises(InputError):
        safe_path(tmp_path, key)


@pytest.mark.parametrize("key", FINE)
def test_plain_names_of_any_script_are_taken_as_they_are(tmp_path, key):
    assert safe_path(tmp_path, key) == tmp_path / key


def test_links_are_not_followed(tmp_path):
    (tmp_path / "folder" / "real").mkdir(parents=True)
    (tmp_path / "folder" / "link").symlink_to(tmp_path)
    (tmp_path / "folder" / "real" / "file").symlink_to("/etc/passwd")
    for key in ("link/x", "link", "real/file"):
        with pytest.raises(InputError, match="symbolic link"):
            safe_path(tmp_path / "folder", key)
    assert safe_path(tmp_path / "folder", "real/new")


def test_a_file_where_a_folder_is_needed_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError):
        safe_path(tmp_path, "file/x")


@given(st.text())
def test_whatever_is_accepted_is_below_the_folder(key):
    try:
        path = safe_path(_FOLDER, key)
    except InputError:
        return
    assert os.path.normpath(path) == str(path)
    assert path.is_relative_to(_FOLDER)
    assert path != _FOLDER
    assert os.fsencode(path)


def test_temporaries_and_locks_are_hidden():
    hidden = (".tmp-a", "a/.tmp-b/c", ".lock", "a/.lock", ".lock-x", ".partial-y/z")
    assert [key for key in hidden if not is_hidden(key)] == []
    assert [key for key in ("a.tmp-b", "a/x.lock", "locked", ".locks", "a") if is_hidden(key)] == []


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [
        ("*", {"a.txt", "b/a.txt", "b/c/d.bin"}),
        ("*.txt", {"a.txt", "b/a.txt"}),
        ("a.txt", {"a.txt", "b/a.txt"}),
        ("/a.txt", {"a.txt"}),
        ("b/*", {"b/a.txt", "b/c/d.bin"}),
        ("b/", {"b/a.txt", "b/c/d.bin"}),
        ("b/?.txt", {"b/a.txt"}),
        ("[!a]*", {"b/c/d.bin"}),
        ("", set()),
    ],
)
def test_patterns(pattern, taken):
    wanted = selector([pattern], [])
    assert {key for key in ("a.txt", "b/a.txt", "b/c/d.bin") if wanted(key)} == taken
    unwanted = selector([], [pattern])
    assert {key for key in ("a.txt", "b/a.txt", "b/c/d.bin") if not unwanted(key)} == taken
