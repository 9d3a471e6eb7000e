"""Planted secrets must not come out anywhere."""

import base64
import html
import io
import json
import logging
from functools import partial

import markupsafe
import pytest

from wmtp_worker.redact import MASK, RedactingFilter, Redactor, redact, redact_values

SECRET = "p1anted/s3cret+value"


@pytest.mark.parametrize(
    "name",
    [
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AZURE_STORAGE_CONNECTION_STRING",
        "HF_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "MY_API_KEY",
        "db_password",
        "SOME_CREDENTIALS",
    ],
)
def test_values_of_variables_that_look_secret(name):
    redactor = Redactor({name: SECRET})
    assert redactor(f"before {SECRET}, after") == f"before {MASK}, after"
    assert redactor("?x=p1anted%2Fs3cret%2Bvalue&y") == f"?x={MASK}&y"


@pytest.mark.parametrize(
    "environ",
    [
        {"HF_TOKEN_FILE": "/run/secrets/token"},
        {"HF_TOKEN": "short"},
        {"HF_TOKEN": ""},
        {"TOKENIZERS_PARALLELISM": "disabled"},
        {"WMTP_MODEL__TOKENIZER": "/srv/tokenizer"},
        {"WMTP_MODEL__KEY_VALUE_HEADS": "12345678"},
        {"HOME": "/home/me/and"},
        {"MLFLOW_TRACKING_USERNAME": "s3://lab-mlflow/"},
    ],
)
def test_values_that_are_no_secrets_stay(environ):
    text = f"nothing secret: {next(iter(environ.values()))}, or is there"
    assert Redactor(environ)(text) == text


def test_a_secret_inside_a_longer_one():
    redactor = Redactor({"A_TOKEN": "abcdef", "B_TOKEN": "abcdefghij"})
    assert redactor("abcdefghij abcdef") == f"{MASK} {MASK}"


def test_a_secret_is_text_not_a_pattern():
    assert Redactor({"A_TOKEN": "a.c(d+[e"})("a.c(d+[e abc(d+[e") == f"{MASK} abc(d+[e"


AWKWARD = "pa\"ss'&w\\o<r>d\n\u00e9"


@pytest.mark.parametrize(
    "encode",
    [
        json.dumps,
        partial(json.dumps, ensure_ascii=False),
        repr,
        html.escape,
        partial(html.escape, quote=False),
        lambda text: str(markupsafe.escape(text)),
        lambda text: html.escape(json.dumps(text)),
        lambda text: str(markupsafe.escape(json.dumps(text))),
        lambda text: base64.b64encode(f"someone:{text}".encode()).decode(),
    ],
)
def test_a_secret_in_whatever_it_is_written_into(encode):
    redactor = Redactor({"MLFLOW_TRACKING_USERNAME": "someone", "MLFLOW_TRACKING_PASSWORD": AWKWARD})
    shown = redactor(f"before {encode(AWKWARD)} after")
    assert shown.replace("&quot;", '"').replace("&#34;", '"') in (
        f"before {quote}{MASK}{quote} after" for quote in ("", '"', "'")
    )


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("key AKIAIOSFODNN7EXAMPLE here", "key *** here"),
        ("temporary ASIAIOSFODNN7EXAMPLE.", "temporary ***."),
        ("token hf_" + "aB3" * 8, "token ***"),
        ("https://me:pa55@host:8080/x@y", "https://***@host:8080/x@y"),
        ("postgresql+psycopg://me:p@55@host/db", "postgresql+psycopg://***@host/db"),
        ("AccountName=a;AccountKey=abc==;Suffix=b", "AccountName=a;AccountKey=***;Suffix=b"),
        ("https://b.s3/k?X-Amz-Signature=12ab&X-Amz-Date=3", "https://b.s3/k?X-Amz-Signature=***&X-Amz-Date=3"),
        ("https://b.blob/k?sv=1&sig=ab%2B&se=2", "https://b.blob/k?sv=1&sig=***&se=2"),
        ("Authorization: Basic d210cDpwYXNz==, next", "Authorization: Basic ***, next"),
        ("{'authorization': 'Bearer ab.c-d_e'}", "{'authorization': 'Bearer ***'}"),
        ('{\\"Authorization\\": \\"Basic d210cA==\\"}', '{\\"Authorization\\": \\"Basic ***\\"}'),
        ("basic facts, bearer of news", "basic facts, bearer of news"),
        ("https://t0ken@host/path", "https://***@host/path"),
        ("ssh://git@host/path", "ssh://git@host/path"),
        ("https://host:8080/path", "https://host:8080/path"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("mail me@host: hello", "mail me@host: hello"),
        ("hf_hub and AKIA are words", "hf_hub and AKIA are words"),
    ],
)
def test_what_looks_like_a_secret(text, masked):
    assert Redactor({})(text) == masked


def test_the_environment_is_read_when_it_is_asked(monkeypatch):
    assert redact(SECRET) == SECRET
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert redact(SECRET) == MASK


@pytest.fixture
def log():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(RedactingFilter(Redactor({"HF_TOKEN": SECRET})))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    return logger, stream


def test_messages_and_arguments(log):
    logger, stream = log
    logger.info(f"in the message {SECRET}")
    logger.info("in the arguments %s and %r", SECRET, {"token": SECRET})
    logger.info("in a mapping %(token)s", {"token": SECRET})
    logger.info("across " + SECRET[:8] + "%s", SECRET[8:])
    lines = stream.getvalue().splitlines()
    assert lines == [
        f"in the message {MASK}",
        f"in the arguments {MASK} and {{'token': '{MASK}'}}",
        f"in a mapping {MASK}",
        f"across {MASK}",
    ]


def test_exceptions_and_their_causes(log):
    logger, stream = log
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise RuntimeError(f"with {SECRET}") from error
    except RuntimeError:
        logger.exception("failed")
    text = stream.getvalue()
    assert f"RuntimeError: with {MASK}" in text
    assert f"KeyError: '{MASK}'" in text
    assert SECRET not in text


def test_an_exception_as_argument_and_stack(log):
    logger, stream = log
    logger.warning("caught %s", ValueError(SECRET), stack_info=True)
    assert stream.getvalue().startswith(f"caught {MASK}\nStack")


def test_arguments_that_do_not_fit_are_shown_not_lost(log):
    logger, stream = log
    logger.info("two %s %s", SECRET)
    assert stream.getvalue() == f"two %s %s ('{MASK}',)\n"


def test_lists_of_settings_hold_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    shown = redact_values({"tags": ["note=planted-secret", "a=b"], "name": "planted-secret", "step": 3, "none": None})
    assert shown == {"tags": [f"note={MASK}", "a=b"], "name": MASK, "step": 3, "none": None}
