"""The `wmtp` command: one file per command, and one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from wmtp_worker import errors
from wmtp_worker.host.stop import STOP

_BROKEN_PIPE = 128 + 13  # as a shell reports SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see `errors.EXIT_CODES`); never raises."""
    # before anything slow: a signal that comes while modules load is answered as soon as the command polls
    STOP.install()
    try:
        return _run(argv)
    except BrokenPipeError:
        # the reader has gone; python would complain about the same pipe once more while it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except Exception as error:
        return _explain(error)


def _run(argv: Sequence[str] | None) -> int:
    from wmtp_worker.cli.app import app

    result = app(args=None if argv is None else list(argv), prog_name="wmtp", standalone_mode=False)
    sys.stdout.flush()
    return result if isinstance(result, int) else errors.DONE


def _explain(error: Exception) -> int:
    from wmtp_worker.redact import redact

    if isinstance(error, errors.Interrupted):
        _print(f"wmtp: {redact(str(error))}", "yellow")
        return error.exit_code
    if isinstance(error, errors.WorkerError):
        _print(f"error: {redact(str(error))}", "red")
        return error.exit_code
    if _is_usage_error(error):
        _print(redact(_usage(error)), "red")
        return errors.WRONG
    if isinstance(error, OSError) and error.errno == 28:
        _print(f"error: {redact(str(error))} -> make room there, or set WMTP_WORKDIR to a larger disk", "red")
        return errors.WRONG
    sys.stderr.write(redact("".join(traceback.format_exception(error))))
    _print("wmtp: this is a bug of ours, not of yours; please report it with the lines above", "red")
    return errors.BUG


def _is_usage_error(error: Exception) -> bool:
    # typer carries its own copy of click, so its base class is named, not imported
    return any(kind.__name__ == "ClickException" for kind in type(error).__mro__)


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    hint = f"\n{context.get_usage()}\nTry '{context.command_path} --help'." if context else ""
    return f"error: {error.format_message()}{hint}"  # type: ignore[attr-defined]


def _print(text: str, color: str) -> None:
    if not sys.stderr.isatty():
        sys.stderr.write(text + "\n")
        return
    from rich.console import Console

    head, colon, rest = text.partition(":")
    console = Console(stderr=True, soft_wrap=True)
    console.print(head + colon, style=f"bold {color}", end="", highlight=False, markup=False)
    console.print(rest, highlight=False, markup=False)
