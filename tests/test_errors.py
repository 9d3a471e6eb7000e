"""The table of exit codes and the form of an error."""

import pickle
import re

import pytest

from wmtp_worker import errors

KINDS = {
    errors.WorkerError: 70,
    errors.SettingsError: 78,
    errors.InputError: 78,
    errors.CheckpointError: 78,
    errors.DiskFullError: 78,
    errors.TrainingDiverged: 78,
    errors.RunHeldError: 79,
    errors.Interrupted: 75,
    errors.HostError: 75,
    errors.NotSafeError: 74,
    errors.StorageError: 75,
    errors.ObjectNotFound: 78,
    errors.BucketNotFound: 78,
    errors.AccessDenied: 78,
    errors.PreconditionFailed: 75,
    errors.TransientError: 75,
    errors.ExhaustedError: 75,
    errors.IntegrityError: 78,
}


def test_every_error_has_its_exit_code_and_the_docstring_draws_them_all():
    assert {kind: kind.exit_code for kind in KINDS} == KINDS
    below = errors.WorkerError.__subclasses__() + errors.StorageError.__subclasses__()
    below = [kind for kind in below if kind.__module__ == errors.__name__]  # rooms refine them for their own use
    assert set(below) == set(KINDS) - {errors.WorkerError}
    drawn = dict(re.findall(r"(?:├── |└── |^    )(\w+) +(\d+)", errors.__doc__, re.MULTILINE))
    assert drawn == {kind.__name__: str(code) for kind, code in KINDS.items()}


def test_every_exit_code_is_in_the_table():
    assert set(KINDS.values()) | {0} == set(errors.EXIT_CODES)


@pytest.mark.parametrize(
    ("where", "fix", "text"),
    [
        (None, None, "what"),
        ("a:1", None, "what (from a:1)"),
        (None, "do it", "what -> do it"),
        ("a:1", "do it", "what (from a:1) -> do it"),
    ],
)
def test_an_error_says_what_where_and_what_to_do(where, fix, text):
    assert str(errors.InputError("what", where=where, fix=fix)) == text


def test_an_error_is_whole_after_a_way_between_processes():
    error = pickle.loads(pickle.dumps(errors.CheckpointError("what", where="a:1", fix="do it")))
    assert type(error) is errors.CheckpointError
    assert str(error) == "what (from a:1) -> do it"


def test_what_a_server_says_does_not_reach_the_terminal_as_it_is():
    said = "no\x1b[2J\x07\rdone\x9b1m \u202e ü\tx \ud800\nnext"
    shown = "no\\x1b[2J\\x07\\rdone\\x9b1m \\u202e ü\\tx \\ud800\nnext"
    error = errors.AccessDenied(said, where="a\x1bb", fix="c\x1bd")
    assert error.what == error.args[0] == shown
    error.where = "a\x1bb"  # as stores fill it in
    assert str(error) == f"{shown} (from a\\x1bb) -> c\\x1bd"
