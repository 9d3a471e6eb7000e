"""Keeps secrets out of everything that is printed, logged or stored."""

import base64
import html
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

MASK = "***"
_SHORTEST = 6  # shorter values are words that would mask half of a log

# settings (WMTP_…) are no secrets; *_FILE and GOOGLE_APPLICATION_CREDENTIALS hold paths
_SECRET_NAME = re.compile(
    r"(?!WMTP_)(?!.*_FILE$)(?!GOOGLE_APPLICATION_CREDENTIALS$)"
    r".*(KEY|SECRET|TOKEN(?!IZER)|PASSWORD|PASSWD|CONNECTION_STRING|CREDENTIAL)"
)
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), MASK),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL), MASK),
    (
        re.compile(r"(?P<name>\bauthorization\W{1,12}(?:basic|bearer)\s+)[\w.~+/=-]+", re.IGNORECASE),
        rf"\g<name>{MASK}",
    ),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}\b"), MASK),
    (re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/@:]*:[^\s/]+@"), rf"\g<scheme>{MASK}@"),
    (re.compile(r"(?P<scheme>\bhttps?://)[^\s/@:*]+@"), rf"\g<scheme>{MASK}@"),
    (re.compile(r"(?P<name>\b(?:AccountKey|SharedAccessKey)=)[^;\s]+"), rf"\g<name>{MASK}"),
    (
        re.compile(r"(?P<name>[?&](?:X-Amz-Signature|X-Amz-Credential|X-Amz-Security-Token|sig)=)[^&\s]+"),
        rf"\g<name>{MASK}",
    ),
)


class Redactor:
    """Replaces the secrets of one environment, and whatever looks like a secret, by `***`."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        found = {
            form
            for name, value in environ.items()
            if len(value) >= _SHORTEST and _SECRET_NAME.match(name.upper())
            for form in _forms(value)
        }
        user, password = (environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
        if user and password:  # as HTTP's Basic Auth sends them
            found.add(base64.b64encode(f"{user}:{password}".encode()).decode())
        # the longest first: one secret may contain another
        ordered = sorted(found, key=lambda value: (-len(value), value))
        self._values = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def __call__(self, text: str) -> str:
        if self._values is not None:
            text = self._values.sub(MASK, text)
        for pattern, mask in _PATTERNS:
            text = pattern.sub(mask, text)
        return text


def _forms(value: str) -> Iterator[str]:
    """A value as it stands, and as it stands in a URL, in JSON, in what Python shows, and each of them in HTML."""
    plain = (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1])
    yield quote(value, safe="")
    for form in plain:
        yield form
        yield html.escape(form, quote=False)
        yield html.escape(form)
        yield html.escape(form).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")  # as Jinja writes them


def redact(text: str) -> str:
    """`text` without the secrets of the environment as it is now."""
    return Redactor()(text)


def redact_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, or other JSON values, without secrets in their texts and lists of texts."""
    return {key: _redact_value(value) for key, value in values.items()}


def _redact_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_redact_value(item) for item in value]
    return redact(value) if isinstance(value, str) else value


class RedactingFilter(logging.Filter):
    """Put on a handler, it redacts the finished message, the traceback and the stack of every record."""

    def __init__(self, redactor: Callable[[str], str] = redact) -> None:
        super().__init__()
        self._redact = redactor

    def filter(self, record: logging.LogRecord) -> bool:
        # message and arguments are joined first: a secret may stand in either, or across both
        record.msg, record.args = self._redact(_message(record)), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = self._redact(record.exc_text)
        if record.stack_info:
            record.stack_info = self._redact(record.stack_info)
        return True


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):  # arguments that do not fit: show both rather than lose the line
        args: Any = record.args
        return f"{record.msg} {args!r}"
